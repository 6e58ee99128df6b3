"""A tiny model of random weights, and images of several sizes."""

import numpy as np
import pytest
from PIL import Image

from san_hf.modeling import SANImageProcessor, SANProcessor
from tests.tiny import segmenting_model, tiny_tokenizer


SAMPLE = "san_hf/checkpoints/picture-book/sample.png"


def four_pages(width: int, height: int) -> Image.Image:
    """A page's sample four times, (width, height), each turned otherwise, so that windows are unlike each other."""
    with Image.open(SAMPLE) as file:
        page = file.convert("RGB").resize((width // 2, height // 2))
    picture = Image.new("RGB", (width, height))
    places = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2)]
    for number, place in enumerate(places):
        picture.paste(page.rotate(90 * number), place)
    return picture


@pytest.fixture(scope="module")
def model():
    return segmenting_model()


@pytest.fixture(scope="module")
def processor():
    size = {"shortest_edge": 64, "longest_edge": 256}
    return SANProcessor(SANImageProcessor(size=size), tiny_tokenizer())


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Five images of three sizes, so that some of them share a shape."""
    rng = np.random.default_rng(0)
    sizes = [(90, 64), (64, 80), (90, 64), (120, 64), (64, 80)]
    noise = [Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, sizes)]
