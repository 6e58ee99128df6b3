"""`san-hf export`, and its folders where no torch is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.inference import Segmenter
from tests.export.conftest import skip_without


# Tracing takes half a minute of an idle processor.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "run_exported.py"
NAMES = ["wall", "floor", "person", "car"]
# Of the example's process: it has NumPy, Pillow and the runtime, and none of these.
ABSENT = ("torch", "transformers", "safetensors", "san_hf", "scipy", "onnx")


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def export_closed(model_folder, folder, target):
    """With label maps, by the command."""
    skip_without(target)
    options = ["--to", target, "--form", "closed", "--label-maps", "--classes", ", ".join(NAMES), "--output", folder]
    result = invoke("export", model_folder, *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"Wrote {folder}: closed, {target}, float32" and lines[1] == f"Classes: {', '.join(NAMES)}"
    assert lines[2].startswith("Verified in float32 on 6 batches: largest difference ") and len(lines) == 3
    return folder


@pytest.fixture(scope="module")
def closed_folder(model_folder, tmp_path_factory):
    """A closed ONNX export."""
    return export_closed(model_folder, tmp_path_factory.mktemp("exported") / "closed", "onnx")


def run_example(folder, photo, output, python=sys.executable, blocked=ABSENT):
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [python, "-c", code, SCRIPT, folder, photo, output]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(output))


def test_a_closed_folder_runs_without_torch(closed_folder, model_folder, photo, tmp_path):
    """Catches an example, or a folder, that needs more than the runtime, NumPy and Pillow, or gives other labels."""
    photo.save(tmp_path / "photo.png")
    labels = run_example(closed_folder, tmp_path / "photo.png", tmp_path / "labels.png")
    expected = Segmenter.from_pretrained(model_folder, NAMES)(photo).label_map
    assert labels.shape == (64, 96) and len(np.unique(expected)) > 1
    assert (labels != expected).mean() < 0.005
    assert json.loads((closed_folder / "san_hf.json").read_text())["class_names"] == NAMES
    assert not (closed_folder / "text.safetensors").exists()


@pytest.mark.slow
def test_a_closed_openvino_folder_runs_without_torch(model_folder, photo, tmp_path):
    """Catches an example that knows one runtime only."""
    folder = export_closed(model_folder, tmp_path / "closed", "openvino")
    photo.save(tmp_path / "photo.png")
    labels = run_example(folder, tmp_path / "photo.png", tmp_path / "labels.png")
    expected = Segmenter.from_pretrained(model_folder, NAMES)(photo).label_map
    assert len(np.unique(expected)) > 1 and (labels != expected).mean() < 0.005


def test_what_the_commands_refuse(closed_folder, model_folder, photo, tmp_path):
    """Catches stack traces, a second export into a folder, and a closed graph that is asked for new names."""
    photo.save(tmp_path / "photo.png")
    to_onnx = ["export", model_folder, "--to", "onnx", "--output"]
    for arguments, message in (
        ([*to_onnx, closed_folder], "exists already"),
        ([*to_onnx, tmp_path, "--overwrite"], "isn't an exported folder"),
        ([*to_onnx, tmp_path / "x", "--form", "closed"], "this model carries none"),
        ([*to_onnx, tmp_path / "x", "--expand", "coco"], "are for class names"),
        ([*to_onnx, tmp_path / "x", "--images", tmp_path], "Labels of images need classes"),
        (["segment", tmp_path / "photo.png", "--model", closed_folder, "--runtime", "onnx"], "of the closed form"),
        (["segment", tmp_path / "photo.png", "--model", model_folder, "--runtime", "onnx"], "is no exported folder"),
        (["segment", tmp_path / "photo.png", "--model", closed_folder], "--runtime"),
    ):
        result = invoke(*arguments, *(["--output", tmp_path / "out"] if arguments[0] == "segment" else []))
        assert result.exit_code == 2 and message in result.output, result.output
        assert result.output.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_an_open_folder(runtime, model_folder, photo, tmp_path):
    """Catches a vocabulary that isn't beside the graph, and a runtime that isn't used."""
    skip_without(runtime)
    folder = tmp_path / "open"
    names = ", ".join(NAMES)
    assert invoke("export", model_folder, "--to", runtime, "--classes", names, "--output", folder).exit_code == 0
    photo.save(tmp_path / "photo.png")
    expected = Segmenter.from_pretrained(model_folder, NAMES)(photo).label_map
    assert len(np.unique(expected)) > 1
    for classes in (names, folder / "vocabulary.safetensors"):
        options = ["--format", "png-labels", "--output", tmp_path / "out", "--overwrite"]
        common = ["segment", tmp_path / "photo.png", "--model", folder, "--classes", classes, *options]
        result = invoke(*common, "--runtime", runtime)
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / "out").glob("*.png")
        assert (np.asarray(Image.open(file)) != expected).mean() < 0.005


@pytest.mark.slow
def test_in_an_environment_of_its_own(closed_folder, photo, tmp_path):
    """Catches a requirement that only a blocked import of this environment hides. It takes a package index."""
    photo.save(tmp_path / "photo.png")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = ["numpy", "pillow", "onnxruntime"]
    command = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *packages]
    if subprocess.run(list(map(str, command)), capture_output=True).returncode:
        pytest.skip("needs a package index")
    run_example(closed_folder, tmp_path / "photo.png", tmp_path / "labels.png", python, blocked=())
