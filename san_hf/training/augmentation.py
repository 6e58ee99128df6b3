"""Augmentation of images and their label maps in training: scale, crop, colour jitter, flip, padding."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict

from san_hf.modeling.image_sizes_san import MAX_INPUT_PIXELS, check_area, resized_size, whole_number


# Grey, which is close to zero once normalised.
PADDING_VALUE = 128


@dataclass(frozen=True)
class ColorJitter:
    """
    A change of colours, as SSD (Liu et al., 2016, arXiv 1512.02325) trains with. The defaults change nothing.

    Attributes:
        brightness: added to every value; -32..32 of 255 when drawn.
        contrast: factor of every value; 0.5..1.5 when drawn.
        saturation: factor of HSV's saturation; 0.5..1.5 when drawn.
        hue: added to HSV's hue, in turns of the colour circle; -0.1..0.1 (18 of OpenCV's 180 steps) when drawn.
        contrast_first: whether contrast comes before saturation and hue rather than after.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_first: bool = True

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "ColorJitter":
        """Each of the four changes with probability 1/2, uniform in its range; contrast first with probability 1/2."""
        applied = rng.random(4) < 0.5
        ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}
        changes = {name: rng.uniform(*limits) for name, limits in ranges.items()}
        chosen = {name: value for (name, value), wanted in zip(changes.items(), applied) if wanted}
        return cls(**chosen, contrast_first=bool(rng.random() < 0.5))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Changes an 8-bit RGB image: values are rounded and cut to 0..255 after each step."""
        values = np.arange(256)
        image = _map_values(image, values + self.brightness)
        if self.contrast_first:
            image = _map_values(image, values * self.contrast)
        if self.saturation != 1 or self.hue != 0:
            # Pillow's hue has 255 steps: 255 is red again.
            image = image.convert("HSV")
            image = _map_values(image, (values + 255 * self.hue) % 255, values * self.saturation, values)
            image = image.convert("RGB")
        if not self.contrast_first:
            image = _map_values(image, values * self.contrast)
        return image


class TrainingTransform:
    """
    The augmentation that SAN is trained with: a random scale, a random square crop, SSD's colour jitter, mirroring.

    The image is resized so that its shortest edge is `crop_size` times a scale (bilinear; labels by nearest
    neighbour, both as the image processor does); a window of at most `crop_size` x `crop_size` is cut out; colours
    are jittered; half of the windows are mirrored; and what is missing to the full square is filled at the right and
    the bottom, with 128 in the image and with `ignore_index` in the label map.

    Args:
        crop_size: side of the square, in pixels.
        scales: shortest edges to draw from, as multiples of `crop_size`; equally likely.
        longest_edge: images whose longest edge would exceed this are scaled down to it.
        color_jitter: whether colours are jittered, see [`ColorJitter`].
        flip: whether to mirror, left to right, with probability 1/2.
        ignore_index: label of padded pixels.

    Raises:
        ValueError: sizes or scales that are not positive.
    """

    def __init__(
        self,
        crop_size: int = 640,
        scales: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
        longest_edge: int = 2560,
        color_jitter: bool = True,
        flip: bool = True,
        ignore_index: int = 255,
    ):
        crop_size, longest_edge = whole_number(crop_size, "crop_size"), whole_number(longest_edge, "longest_edge")
        check_area((crop_size, crop_size), "crop_size, which makes an image of", MAX_INPUT_PIXELS)
        if not len(scales) or min(scales) <= 0:
            raise ValueError(f"Got scales={scales}, expected one or more factors above 0, such as 1.0.")
        self.crop_size = crop_size
        self.sizes = [
            SizeDict(shortest_edge=max(1, round(crop_size * scale)), longest_edge=longest_edge) for scale in scales
        ]
        self.color_jitter = color_jitter
        self.flip = flip
        self.ignore_index = ignore_index

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            image: (H, W), 8-bit RGB.
            label_map: (H, W) int32.
            rng: where all randomness comes from: equal generators give equal results.

        Returns:
            The image, (`crop_size`, `crop_size`, 3) uint8, and its label map, (`crop_size`, `crop_size`) int32.

        Raises:
            ValueError: the image is not RGB, or the label map is not of its size.
        """
        if not isinstance(image, Image.Image) or not isinstance(label_map, np.ndarray):
            raise ValueError(
                f"Got {type(image).__name__} and {type(label_map).__name__}, expected a PIL image and an array, the "
                "image first."
            )
        if image.mode != "RGB" or label_map.shape != image.size[::-1]:
            raise ValueError(
                f"Got an image of mode {image.mode} and (height, width) {image.size[::-1]} with a label map of shape "
                f"{label_map.shape}: expected mode RGB and equal sizes."
            )
        image, label_map = self._crop(image, label_map, rng)
        # On the window only: colours and mirroring do not depend on what lies around it.
        if self.color_jitter:
            image = ColorJitter.draw(rng)(image)
        pixels = np.asarray(image)
        if self.flip and rng.random() < 0.5:
            pixels, label_map = pixels[:, ::-1], label_map[:, ::-1]

        height, width = label_map.shape
        padding = ((0, self.crop_size - height), (0, self.crop_size - width))
        pixels = np.pad(pixels, (*padding, (0, 0)), constant_values=PADDING_VALUE)
        return pixels, np.pad(label_map, padding, constant_values=self.ignore_index)

    def _crop(
        self, image: Image.Image, label_map: np.ndarray, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """A random window of the image at a random scale, and its labels. Only the window is ever resized."""
        height, width = resized_size(image.size[::-1], self.sizes[rng.integers(len(self.sizes))])
        window = min(width, self.crop_size), min(height, self.crop_size)
        left, top = rng.integers(width - window[0] + 1), rng.integers(height - window[1] + 1)
        # The window in pixels of the original image. Not beyond its edges, which rounding could bring about.
        across, down = image.width / width, image.height / height
        box = (
            left * across,
            top * down,
            min((left + window[0]) * across, image.width),
            min((top + window[1]) * down, image.height),
        )
        labels = Image.fromarray(label_map.astype(np.int32, copy=False))
        return (
            image.resize(window, Image.Resampling.BILINEAR, box=box),
            np.asarray(labels.resize(window, Image.Resampling.NEAREST, box=box)),
        )


def _map_values(image: Image.Image, *channels: np.ndarray) -> Image.Image:
    """Replaces each value v of an 8-bit image by entry v of `channels`: one list for all channels, or one for each."""
    tables = [np.rint(table).clip(0, 255).astype(np.uint8) for table in channels]
    if all((table == np.arange(256)).all() for table in tables):
        return image
    return image.point(np.concatenate(tables * (3 // len(tables))).tolist())
