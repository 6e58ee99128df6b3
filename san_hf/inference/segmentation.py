"""A segmented image."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from san_hf.colors import OTHER_COLOR, Color, name_colors
from san_hf.inference.writers import FORMATS, write_formats
from san_hf.visualization import colorize, draw_overlay


@dataclass(frozen=True, eq=False)
class Segmentation:
    """
    A segmented image. Two are equal if their images, label maps, class names, colours and confidences are.

    Attributes:
        image: the image, upright, 8-bit RGB.
        label_map: (H, W) uint8, or uint16 beyond 256 labels, of the image's size; indices of `class_names`.
        class_names: the caller's, in the caller's order; "other" is the last if there is one.
        expanded: whether the last label is "other": all classes that the vocabulary was expanded by, and pixels below
            its threshold.
        given_colors: colours by name, for classes that are to have their own: see [`san_hf.colors.name_colors`].
        confidence: (H, W) float32, 0..1, of each pixel, if it was asked for: see [`Predictor.classify_pixels`].
    """

    image: Image.Image
    label_map: np.ndarray
    class_names: Sequence[str]
    expanded: bool = False
    given_colors: Mapping[str, Color] = field(default_factory=dict)
    confidence: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segmentation):
            return NotImplemented
        return (
            list(self.class_names) == list(other.class_names)
            and self.expanded == other.expanded
            and np.array_equal(self.label_map, other.label_map)
            and np.array_equal(self.colors, other.colors)
            and _equal(self.confidence, other.confidence)
            and self.image.mode == other.image.mode
            and np.array_equal(np.asarray(self.image), np.asarray(other.image))
        )

    def __hash__(self) -> int:
        # What equal ones have in common: a label map may be of another integer type.
        return hash((tuple(self.class_names), self.expanded, self.label_map.shape, self.pixels.tobytes()))

    @cached_property
    def colors(self) -> np.ndarray:
        """Colour of each label, (C, 3) uint8 RGB: by its name, see [`san_hf.colors.name_colors`]; grey for "other"."""
        other = {self.class_names[-1]: OTHER_COLOR} if self.expanded else {}
        return name_colors(self.class_names, {**other, **self.given_colors})

    @cached_property
    def pixels(self) -> np.ndarray:
        """Number of pixels of each label, (C,) int64."""
        return np.bincount(self.label_map.ravel(), minlength=len(self.class_names))

    def legend(self) -> list[dict[str, Any]]:
        """Every class in label order: its label, name, number and share (0..1) of pixels, and colour ("#rrggbb")."""
        return [
            {
                "label": label,
                "name": name,
                "pixels": int(count),
                "share": float(count / self.label_map.size),
                "color": "#{:02x}{:02x}{:02x}".format(*color),
            }
            for label, (name, count, color) in enumerate(zip(self.class_names, self.pixels, self.colors))
        ]

    def overlay(self) -> Image.Image:
        """The image under its label map, with names and a legend: see [`draw_overlay`]."""
        return draw_overlay(self.image, self.label_map, self.class_names, self.colors)

    def mask(self) -> Image.Image:
        """The label map in colours, of the image's size."""
        return colorize(self.label_map, self.colors)

    def save(self, stem: str | os.PathLike, formats: Sequence[str] | None = None, **facts: Any) -> list[Path]:
        """
        Writes files whose names start with `stem`: `.overlay.png`, `.mask.png`, `.json` (the legend and the size), and
        for "png-labels" `.labels.png` (one label per pixel, 8-bit or 16-bit grey) with its legend in `.json`, for
        "confidence" `.confidence.png` (16-bit grey, the confidence of each pixel times 65,535).

        Args:
            stem: path without extension. Files that are there already are replaced, each at once when it is complete.
            formats: out of `FORMATS`; by default all, "confidence" only if there is one.
            **facts: further entries of the JSON file.

        Returns:
            The files.

        Raises:
            ValueError: an unknown format, or "confidence" without one.
            OSError: a file can't be written.
        """
        if formats is None:
            formats = [name for name in FORMATS if name != "confidence" or self.confidence is not None]
        return write_formats(self, stem, formats, facts)


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)
