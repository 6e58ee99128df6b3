"""Generated photographs for the benchmarks: times and memory depend on sizes, not on what is seen."""

import numpy as np
from PIL import Image


REGIONS = 8  # in a photograph


def draw_photo(rng: np.random.Generator, num_labels: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A photograph of that (height, width), of a few smooth regions with noise; and its labels, 255 unlabelled."""
    height, width = size
    fields = [
        np.asarray(Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
        for noise in rng.standard_normal((REGIONS, 6, 8))
    ]
    regions = np.argmax(fields, axis=0)
    colors = rng.integers(30, 226, (REGIONS, 3))[regions]
    pixels = np.clip(colors + rng.normal(0, 12, colors.shape), 0, 255).astype(np.uint8)
    labels = rng.permutation(min(num_labels, 255))[np.arange(REGIONS) % num_labels][regions].astype(np.uint8)
    labels[:8] = 255
    return Image.fromarray(pixels), Image.fromarray(labels)
