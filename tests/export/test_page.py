"""The page about exporting, typed as it stands."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cli import app
from tests.export.conftest import skip_without
from tests.pages import blocks


# Tracing takes half a minute of an idle processor.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "san_hf" / "export" / "README.md"
SAMPLE = ROOT / "san_hf" / "checkpoints" / "picture-book" / "sample.png"


def test_every_block_says_how_it_is_tested():
    """Catches code that is added to the page and never run."""
    assert {mark for mark, _, _ in blocks(PAGE)} == {"run", "script", "install"}


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    """Catches commands and code on the page that don't work."""
    skip_without("onnx")
    skip_without("openvino")
    monkeypatch.chdir(tmp_path)
    Image.open(SAMPLE).convert("RGB").save("photo.jpg", quality=95)
    shutil.copy(ROOT / "scripts" / "run_exported.py", tmp_path)
    for mark, language, code in blocks(PAGE):
        if mark == "install":
            continue
        if language == "python":
            # Not in a fork, as OpenVINO's threads don't survive one.
            assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
        elif mark == "script":
            assert os.system(code.replace("python", shlex.quote(sys.executable), 1)) == 0
        else:
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"})
                assert result.exit_code == 0, f"{line}\n{result.output}"
    assert Path("labels.png").is_file() and list(Path("segmented").glob("*.overlay.png"))
