"""Peak memory of `san-hf segment` at full size: a large photograph and a large vocabulary."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from san_hf.conversion import RELEASES, clip_tokenizer
from san_hf.inference import Predictor
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from tests.cli.test_bounds import MEASURE


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A folder with a B/16 of random weights, and a vocabulary of 847 classes."""
    folder = tmp_path_factory.mktemp("full-size")
    model = SANForSemanticSegmentation(RELEASES["san-vit-b-16"].config()).eval()
    processor = SANProcessor(image_processor=SANImageProcessor(), tokenizer=clip_tokenizer())
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    names = [f"thing {number}" for number in range(847)]
    Predictor(model, processor).vocabulary(names, templates=["a {}."]).save(folder / "names.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("size, most", [((4000, 3000), 1.2e9), ((8192, 6144), 1.8e9)])
def test_peak_memory_of_a_job(full_size, size, most, tmp_path):
    """Catches a map of all scores, a second copy of the weights, and drawings that are copied again and again."""
    small = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size).save(tmp_path / "photo.jpg")
    command = [sys.executable, "-S", "-c", MEASURE, sys.executable, "-m", "san_hf", "segment", tmp_path / "photo.jpg"]
    command += ["--model", full_size / "model", "--classes", full_size / "names.safetensors", "-o", tmp_path / "out"]
    formats = [word for name in ("overlay", "mask", "png-labels") for word in ("-f", name)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run([*map(str, command), *formats], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    status, peak = map(int, process.stdout.split()[-2:])
    assert status == 0, process.stderr[-2000:]
    assert peak * 1024 < most
