"""The demo of README.md; its blocks and links are tested with those of the other pages, in test_pages.py."""

import re
import shlex
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from san_hf.cards import load_facts
from san_hf.cli import app
from tests.pages import ROOT


def test_the_readme_is_short():
    """Catches what belongs on a page of its own."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_demo_runs(tmp_path, monkeypatch):
    """Catches a `make demo` that fails, writes no picture, shows no legend, or asks for what the sample hasn't."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
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
