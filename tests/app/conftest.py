"""What the tests of the app share: a tiny model of random weights, and pictures as files."""

import tempfile

import numpy as np
import pytest
from PIL import Image

from san_hf.app.models import Models
from san_hf.inference import Predictor
from san_hf.modeling import SANImageProcessor, SANProcessor
from tests.tiny import segmenting_model, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def temporary_folders(tmp_path_factory):
    """Gradio makes the first app's temporary folder again for each later one of a process."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def predictor():
    processor = SANProcessor(SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), tiny_tokenizer())
    return Predictor(segmenting_model(), processor)


@pytest.fixture
def models(predictor):
    chosen = Models()
    chosen.add("tiny", predictor)
    return chosen


@pytest.fixture
def pictures(tmp_path):
    """Four files, 96 x 64, of different noise."""
    files = []
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        files.append(tmp_path / f"{seed}.png")
        Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC).save(files[-1])
    return files
