"""Code on the pages: its blocks, and running them as a reader would, in a folder of the reader's."""

import multiprocessing
import os
import re
import traceback
from pathlib import Path


def blocks(page: Path) -> list[tuple[str | None, str, str]]:
    """(mark, language, code) of each block in a page; the mark is in a comment before it, `<!-- test: run -->`."""
    pattern = r"(?:<!-- test: (\w+) -->\s*\n)?^```(\w*)\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_in_a_fork(code: str, folder: Path, timeout: float = 120) -> None:
    """Runs Python in a process that has imported torch already: that takes seconds for each block."""
    errors = multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        os.chdir(folder)
        try:
            exec(compile(code, "page", "exec"), {"__name__": "__main__"})
        except BaseException:
            errors.put(traceback.format_exc())
            raise

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    assert process.exitcode == 0, f"{code}\n{errors.get() if not errors.empty() else process.exitcode}"
