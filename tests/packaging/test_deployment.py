"""Container and Space start what `san-hf app` starts. No container is built here."""

import json
import re
import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import pytest
import yaml

from san_hf.app import interface
from san_hf.cli import app as command_line
from tests.packaging.test_sources import ROOT


SPACE = ROOT / "scripts" / "space"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.fixture
def served(monkeypatch):
    """What the app was started with; it ends at once, and needs no Gradio."""
    calls = []

    def serve(models, limits, examples, *, host, port, ready):
        calls.append({"models": models.names, "host": host, "port": port})

    monkeypatch.setattr(interface, "serve", serve)
    monkeypatch.setitem(sys.modules, "gradio", module_from_spec(ModuleSpec("gradio", None)))
    return calls


def test_the_space(served, monkeypatch):
    """Catches a Space that starts anything else, or that doesn't listen where a Space has to."""
    monkeypatch.setenv("APP_OPTIONS", "--device cpu")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert ended.value.code == 0
    assert served == [{"models": ["picture-book"], "host": "0.0.0.0", "port": 7860}]
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(re.findall(r"^(\S+?)==([^;\s]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert (header["sdk"], header["sdk_version"], header["app_file"]) == ("gradio", pins["gradio"], "app.py")
    assert f"torch=={pins['torch']}" in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()


def test_the_container(served):
    """Catches an entry point that isn't the app's, a health check at another port, and one that runs as root."""
    program, *arguments = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1])
    assert program == "san-hf"
    with pytest.raises(SystemExit) as ended:
        command_line([*arguments, "--device", "cpu"])
    assert ended.value.code == 0
    assert served == [{"models": ["picture-book"], "host": "0.0.0.0", "port": 7860}]
    assert "EXPOSE 7860" in DOCKERFILE and "urlopen('http://127.0.0.1:7860/'" in DOCKERFILE
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)


def test_the_container_has_what_installing_takes():
    """Catches a file that setup.py or a pin needs and that isn't copied, or is copied and left out of the context."""
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == {
        *("LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py"),
        *("model_cards", "modeling", "san_hf"),
    }
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
