"""Code on the pages: its blocks, running them as a reader would, in a folder of the reader's, and checking the rest."""

import ast
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import traceback
from pathlib import Path

from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.training.config_file import load_config


ROOT = Path(__file__).resolve().parents[1]


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


def check_python(code: str) -> None:
    """Syntax, and the names that are imported, of code that can't be run here."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def check_bash(code: str) -> None:
    """Syntax, and the commands of this project with their options, of lines that can't be run here."""
    assert subprocess.run(["bash", "-n", "-c", code]).returncode == 0, code
    for line in code.replace("\\\n", " ").splitlines():
        check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    """That the command, its options and a training's keys exist, and files of the checkout that it names."""
    for module in ("san_hf", "san_hf.cli"):
        if module in words and "-m" in words:  # under accelerate launch and torchrun
            words = ["san-hf", *words[words.index(module) + 1 :]]
    for script in [word for word in words if word.startswith("scripts/")]:
        source = (ROOT / script).read_text(encoding="utf-8")
        after = words[words.index(script) + 1 :]
        missing = [word for word in options(after) if f'"{word}"' not in source and script != "scripts/train.py"]
        assert not missing, f"{script} has no {missing}"
        if script == "scripts/train.py":
            words = ["san-hf", "train", *after]
    if words[:1] == ["make"]:
        if shutil.which("make"):
            assert subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[:1] == ["san-hf"]:
        result = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, f"san-hf has no command {words[1]}"
        for option in options(words):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", result.output), f"san-hf {words[1]} has no {option}"
        if words[1] == "train":
            recipe = words[words.index("--config") + 1] if "--config" in words else None
            changes = [word for word in words[2:] if re.match(r"[a-z_.]+=", word)]
            needed = ["output=x", "data.source=x", *([] if recipe else ["model.checkpoint=x"])]
            load_config(recipe, [*needed, *changes])


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("-")]


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures, without those in code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings: lower case, no punctuation, hyphens for blanks, repeated ones numbered."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)
