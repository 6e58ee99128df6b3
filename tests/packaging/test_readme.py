"""What README.md tells people to type is typed here.

A comment before each ```bash and ```python block says how: `<!-- test: run -->` runs it, all blocks one after the other
in one new folder that holds a picture, photo.jpg; `<!-- test: network -->` checks it as far as that goes offline:
syntax, imported names, options of the command line; `<!-- test: make -->` is for what can't run inside the tests
themselves, `make demo` and `make test`: the targets must exist, and the demo is run by the test of its own below.
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cards import load_facts
from san_hf.cli import app
from tests.pages import blocks, run_in_a_fork


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SAMPLE = ROOT / "san_hf" / "checkpoints" / "picture-book" / "sample.png"


def marked(mark: str) -> list[tuple[str, str]]:
    return [(language, code) for found, language, code in blocks(README) if found == mark]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a picture, and an environment in which `san-hf` and `python` are this checkout's."""
    folder = tmp_path_factory.mktemp("readme")
    programs = tmp_path_factory.mktemp("bin")
    command = programs / "san-hf"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m san_hf.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    with Image.open(SAMPLE) as image:
        image.convert("RGB").save(folder / "photo.jpg", quality=95)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return folder, os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


def test_every_block_says_how_it_is_tested():
    """Catches a command that is added to the README and never run."""
    unmarked = [code for mark, language, code in blocks(README) if language in ("bash", "sh", "python") and not mark]
    assert not unmarked
    assert {mark for mark, _, _ in blocks(README) if mark} <= {"run", "network", "make"}
    assert marked("run")


def test_blocks_run(workplace):
    """Catches commands and code in the README that no longer work."""
    folder, environment = workplace
    for language, code in marked("run"):
        if language == "python":
            run_in_a_fork(code, folder)
            continue
        program = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_blocks_that_need_a_network():
    """Catches renamed imports, methods' modules and options in code that can't be run here."""
    for language, code in marked("network"):
        if language == "python":
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
            continue
        assert subprocess.run(["bash", "-n", "-c", code]).returncode == 0, code
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["san-hf"]:
                help_text = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}).output
                options = [word.split("=")[0] for word in words if word.startswith("-")]
                assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", help_text) for option in options), line


def test_make_targets_exist():
    """Catches a renamed target."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    for _, code in marked("make"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
            else:
                assert words[:1] in ([], ["git"], ["cd"]), f"only make, git and cd here: {line}"


def test_the_demo_runs(tmp_path, monkeypatch):
    """Catches a `make demo` that fails, writes no picture, shows no legend, or asks for what the sample hasn't."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    recipe = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in recipe.replace("\\\n", " ").splitlines() if "san-hf segment" in line]
    words = shlex.split(command)
    assert words[words.index("--classes") + 1].split(", ") == load_facts("picture-book")["sample_classes"]
    words[words.index("--output") + 1] = str(tmp_path)
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    (overlay,) = tmp_path.glob("*.overlay.png")
    assert str(overlay) in done.stdout
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", done.stdout)]
    assert len(shares) >= 3 and abs(sum(shares) - 100) < 0.5
