"""The page about fine-tuning, and the script that makes its example."""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.pages import ROOT, blocks, run_in_a_fork


PAGE = ROOT / "san_hf" / "training" / "FINETUNING.md"
# A training as long as the page's takes ten minutes.
QUICK = ["training.steps=2", "training.batch_size=2", "evaluation.every=1", "checkpoints.every=1", "evaluation.limit=2"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fine_tune_drawings", ROOT / "scripts" / "fine_tune_drawings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_show_what_their_labels_say(script, tmp_path, monkeypatch):
    """Catches labels beside the classes, snowmen that are no snowmen, and drawings that differ from run to run."""
    monkeypatch.setattr(script, "COUNTS", {"train": 4, "validation": 2})
    script.write_data(tmp_path)
    assert (tmp_path / "classes.txt").read_text().split() == list(script.CLASS_NAMES)
    seen = set()
    for split, count in script.COUNTS.items():
        files = sorted((tmp_path / split / "labels").iterdir())
        assert len(files) == count
        for file in files:
            labels = np.asarray(Image.open(file))
            pixels = np.asarray(Image.open(tmp_path / split / "images" / file.name), np.float32)
            assert labels.shape == pixels.shape[:2] and labels.max() < len(script.CLASS_NAMES)
            seen.update(np.unique(labels))
            snowman = labels == script.CLASS_NAMES.index("snowman")
            assert 0.02 < snowman.mean() < 0.3 and pixels[snowman].mean() > 150
            assert pixels[labels == script.CLASS_NAMES.index("snow")].mean() > 200
    assert {script.CLASS_NAMES[label] for label in seen} >= {"snowman", "snow", "sky"}
    first, again = (np.asarray(script.draw_winter([script.SEED, 0, 0])[0]) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs(tmp_path):
    """Catches commands and code on the page that don't work, and adapters that are not what was trained."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for mark, language, code in blocks(PAGE):
        if mark != "run":
            continue
        if language == "python":
            run_in_a_fork(code, tmp_path)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] == "python":
                done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            else:
                assert words[0] == "san-hf"
                words += QUICK if words[1] == "train" else []
                run_in_a_fork(f"from san_hf.cli import app\napp({words[1:]!r})", tmp_path, timeout=400)
    weights = load_file(tmp_path / "runs" / "winter" / "final" / "side_adapter.safetensors")
    assert not [name for name in weights if name.startswith("text_model")]
    assert Image.open(tmp_path / "finetuning.png").width > 1000
    assert {path.name for path in Path(tmp_path, "before").iterdir()}
