"""What is built and installed, away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# What goes into the sdist and is needed to build from it.
SOURCES = ["san_hf", "modeling", "model_cards", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Runs code in a new process that finds `path` before anything installed, and this checkout not at all."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    output.mkdir()
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(output)!r})"
    run_python(code, source)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the checkout: building writes into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.part*")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("wheel", checkout, tmp_path_factory.mktemp("wheels") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def package_files(folder: Path) -> dict[str, bytes]:
    """What `san_hf` consists of, links followed: path below `folder` -> contents."""
    return {
        os.path.relpath(Path(parent) / name, folder): (Path(parent) / name).read_bytes()
        for parent, _, names in os.walk(folder / "san_hf", followlinks=True)
        for name in names
        if "__pycache__" not in parent
    }


def test_the_wheel_has_every_file(checkout, installed):
    """Catches code or data (checkpoint, vocabularies, tokenizer, cards, py.typed) that is not packaged."""
    expected, got = package_files(checkout), package_files(installed)
    assert sorted(got) == sorted(expected)
    assert got == expected
    assert {"san_hf/py.typed", "san_hf/modeling/modeling_san.py"} <= set(got)


def test_the_wheel_has_nothing_else(installed):
    """Catches `modeling` at the top level, where it would be a second set of classes, and packaged tests."""
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["san_hf"]


def test_an_sdist_gives_the_same_wheel(checkout, installed, tmp_path):
    """Catches files that MANIFEST.in forgets."""
    sdist = build("sdist", checkout, tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert package_files(tmp_path / "installed") == package_files(installed)


def test_a_checkout_without_links_builds_the_same_wheel(checkout, installed, tmp_path):
    """Catches a wheel that needs the links: on Windows git writes a text file in the place of each."""
    source = tmp_path / "source"
    shutil.copytree(checkout, source, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    links = [path for path in (source / "san_hf").iterdir() if path.is_symlink()]
    assert {path.name for path in links} == {"modeling", "model_cards"}
    for link in links:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    with zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")) as archive:
        archive.extractall(tmp_path / "installed")
    assert package_files(tmp_path / "installed") == package_files(installed)


def test_the_installed_package_runs_elsewhere(installed, tmp_path):
    """Catches an installation that works in the checkout only: imports, data, command, registration."""
    code = """
import importlib.metadata, pathlib, sys
import san_hf, san_hf.cli, san_hf.modeling, san_hf.visualization
from transformers import AutoConfig, AutoModelForSemanticSegmentation
assert "modeling" not in sys.modules
for module in (san_hf, san_hf.cli, san_hf.modeling):
    assert pathlib.Path(module.__file__).is_relative_to(sys.path[1]), module.__file__
assert san_hf.SANConfig is san_hf.modeling.SANConfig
assert type(AutoConfig.for_model("san")) is san_hf.SANConfig
(command,) = [e for e in importlib.metadata.distribution("san_hf").entry_points if e.name == "san-hf"]
assert command.load() is san_hf.cli.app
print(importlib.metadata.version("san_hf"), san_hf.__version__)
"""
    versions = run_python(code, tmp_path, installed).split()
    assert versions[0] == versions[1] != ""


def test_the_checkout_runs_uninstalled(checkout, tmp_path):
    """Catches a link that is gone: `python` at the root of a checkout would not find san_hf.modeling."""
    # That its modules can be imported, the test before has shown, of the same files.
    code = "from importlib.util import find_spec; print(find_spec('san_hf.modeling').origin)"
    assert Path(run_python(code, tmp_path, checkout).strip()) == checkout / "san_hf" / "modeling" / "__init__.py"
    assert os.readlink(ROOT / "san_hf" / "modeling") == os.path.join("..", "modeling")
