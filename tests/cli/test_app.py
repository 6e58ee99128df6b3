"""`san-hf app`: its start, its end, and what it refuses before that. What it shows is tested in tests/app."""

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from san_hf.app.limits import Limits
from san_hf.app.state import WORDS_AT_A_TIME
from san_hf.app.views import LONGEST_SIDE
from san_hf.cli import app
from tests.pages import blocks


ROOT = Path(__file__).parents[2]


def test_without_gradio(monkeypatch):
    """Catches a stack trace where a package is missing, and a model that is loaded before."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["app", "--model", "no-such-model"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert (
        result.output.strip()
        == "Error: The app needs the package gradio, which isn't installed: pip install 'san_hf[app]'"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "There is no model 'no-such-model'"),
        (["--adapter", "no/such/adapter"], "The side adapter 'no/such/adapter' can't be loaded"),
        (["--examples", "{folder}"], "There is no image in the folder"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    """Catches an app that starts without what it was to show."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'san_hf[app]'")
    result = CliRunner().invoke(app, ["app", *(word.format(folder=tmp_path) for word in arguments)])
    assert result.exit_code == 2 and message in result.output and result.output.count("Error:") == 1


@pytest.mark.slow
def test_start_and_end(tmp_path):
    """Catches an app that listens to other machines, calls home, ends with a stack trace or leaves files behind."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'san_hf[app]'")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "san_hf", "app", "--port", "0"]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        while not lines or "Open http" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        address = re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0]
        assert "Name it, and see where it is" in urllib.request.urlopen(address).read().decode()
        assert any(tmp_path.glob("san-hf-app-*"))
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_the_page():
    """Catches options on the app's page that don't exist, and limits there that aren't those of the code."""
    page = ROOT / "san_hf" / "app" / "README.md"
    help_text = CliRunner().invoke(app, ["app", "--help"], env={"COLUMNS": "200"}).output
    (code, container) = [code for _, _, code in blocks(page)]
    assert all(f"#   {line}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8") for line in container.splitlines())
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["san-hf", "app"]
        assert all(f" {word} " in help_text for word in words if word.startswith("-")), line
    text, limits = page.read_text(encoding="utf-8"), Limits()
    for stated in (
        f"{limits.pixels // 10**6} million pixels",
        f"files of {limits.upload // 2**20} MB",
        f"{limits.names:,} with those of the preset and the others; {limits.name_length} letters each",
        f"{limits.sessions} pictures are kept",
        f"{limits.waiting} questions",
        f"after every {WORDS_AT_A_TIME} words",
        f"{LONGEST_SIDE:,} pixels at most",
    ):
        assert stated in text, stated
