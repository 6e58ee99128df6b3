"""A segmented image."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from san_hf.inference.writers import FORMATS, write_formats
from san_hf.visualization import OTHER_COLOR, class_colors, colorize, draw_overlay


@dataclass(frozen=True)
class Segmentation:
    """
    A segmented image.

    Attributes:
        image: the image, upright, 8-bit RGB.
        label_map: (H, W) uint8, or uint16 beyond 256 labels, of the image's size; indices of `class_names`.
        class_names: the caller's, in the caller's order; "other" is the last if there is one.
        expanded: whether the last label is "other": all classes that the vocabulary was expanded by, and pixels below
            its threshold.
    """

    image: Image.Image
    label_map: np.ndarray
    class_names: Sequence[str]
    expanded: bool = False

    @cached_property
    def colors(self) -> np.ndarray:
        """Colour of each label, (C, 3) uint8 RGB; grey for "other"."""
        colors = class_colors(len(self.class_names))
        if self.expanded:
            colors[-1] = OTHER_COLOR
        return colors

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

    def save(self, stem: str | os.PathLike, formats: Sequence[str] = FORMATS, **facts: Any) -> list[Path]:
        """
        Writes files whose names start with `stem`: `.overlay.png`, `.mask.png`, `.json` (the legend and the size), and
        for "png-labels" `.labels.png` (one label per pixel, 8-bit or 16-bit grey) with its legend in `.json`.

        Args:
            stem: path without extension. Files that are there already are replaced, each at once when it is complete.
            formats: out of `FORMATS`.
            **facts: further entries of the JSON file.

        Returns:
            The files.

        Raises:
            ValueError: an unknown format.
            OSError: a file can't be written.
        """
        return write_formats(self, stem, formats, facts)
