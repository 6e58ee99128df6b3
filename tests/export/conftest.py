"""A tiny model of random weights, and what is exported of it once."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from san_hf.export import export_model
from san_hf.export.targets import TARGETS
from san_hf.inference import Predictor
from san_hf.modeling import SANImageProcessor, SANProcessor
from tests.tiny import segmenting_model, tiny_tokenizer


NAMES = ["cat", "grass", "sky", "red boat"]


def skip_without(target: str) -> None:
    """Skips where the extra isn't installed, or Transformers is older than its exporter."""
    module = TARGETS[target]
    lacking = [name for name in (*module.PACKAGES, module.EXPORTER) if find_spec(name) is None]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")


@pytest.fixture(scope="session")
def model():
    return segmenting_model(decoder_hidden_size=260)  # as wide as no 8-bit index counts


@pytest.fixture(scope="session")
def processor():
    return SANProcessor(SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), tiny_tokenizer())


@pytest.fixture(scope="session")
def vocabulary(model, processor):
    return Predictor(model, processor).vocabulary(NAMES)


@pytest.fixture(scope="session")
def exported(model, processor, vocabulary, tmp_path_factory):
    """A folder of a target and form, exported when it is asked for first."""
    folders = {}

    def export(target: str, form: str):
        if (target, form) not in folders:
            skip_without(target)
            folder = tmp_path_factory.mktemp("exported") / f"{target}-{form}"
            folders[target, form] = folder
            closed = form == "closed"
            facts = export_model(
                model, processor, folder, target=target, form=form, vocabulary=vocabulary, label_maps=closed
            )
            assert facts["verification"]["largest_difference"] < 1e-3
        return folders[target, form]

    return export


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Of several sizes, two of one shape."""
    rng = np.random.default_rng(0)
    sizes = [(90, 64), (64, 80), (90, 64), (120, 64)]
    noise = [Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, sizes)]
