"""What the tests of the commands share: a tiny model of random weights and an image."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.modeling import SANImageProcessor, SANProcessor
from tests.tiny import segmenting_model, tiny_tokenizer


def run_command(*arguments: str, status: int = 0, stdin: bytes | None = None) -> str:
    """What `san-hf` says, whose status has to be this one; errors that aren't the command's own are raised."""
    result = CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved model and processor: random weights that give more than one label to the picture below."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = segmenting_model()
    model.save_pretrained(folder)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    SANProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """96 x 64, and not alike when turned or mirrored."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)
