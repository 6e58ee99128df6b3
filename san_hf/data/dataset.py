"""Images with label maps, decoded and checked as they are used."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Image as ImageFeature
from PIL import Image

from san_hf.images import pixel_limit, to_rgb
from san_hf.messages import join_some

from .errors import DataError


@dataclass(frozen=True)
class SegmentationDataset:
    """
    A data set for semantic segmentation: `len`, indices and iteration give decoded and checked examples.

    Attributes:
        dataset: with the columns "image" and "label", not decoded, and perhaps "file_name".
        class_names: label i is the i-th.
        ignore_index: value of pixels without a label in the label maps.
        name: of the data set, for messages.
        split: of the data set.
        label_shift: what is added to the labels as they are stored; what falls below 0 is ignored.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    class_names: list[str]
    ignore_index: int
    name: str
    split: str
    label_shift: int = 0

    def __len__(self) -> int:
        """
        Raises:
            TypeError: the data set is streamed.
        """
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        """The example at `index`, as of [`example`]. Streamed data sets have none."""
        return self.example(self.dataset[index], index)

    def __iter__(self) -> Iterator[tuple[Image.Image, np.ndarray, str]]:
        for index, row in enumerate(self.dataset):
            yield self.example(row, index)

    def example(self, row: dict[str, Any], index: int) -> tuple[Image.Image, np.ndarray, str]:
        """
        Decodes and checks a row of `dataset`.

        Args:
            row: with "image", "label" and perhaps "file_name".
            index: of the row, for the name and for errors.

        Returns:
            The image, upright 8-bit RGB; its label map, (H, W) int32 with values 0..C - 1 or `ignore_index`; and its
            name: that of the file, else "<split>[<index>]".

        Raises:
            DataError: one of the two is missing or can't be decoded, their sizes differ, or a label is none of the
                classes.
        """
        position = f"{self.split}[{index}]"
        name = _file_name(row) or position
        where = f"{self.name}: {name}" + (f" ({position})" if name != position else "")
        try:
            image = to_rgb(_decode(row["image"]))
        # A broken file makes Pillow's readers fail in many ways: OSError, SyntaxError, struct.error, IndexError, ...
        except Exception as error:
            raise DataError(f"{where}: the image can't be read: {str(error) or type(error).__name__}") from error
        try:
            label_map = to_label_map(_decode(row["label"]))
        except Exception as error:
            raise DataError(f"{where}: the label map can't be read: {str(error) or type(error).__name__}") from error
        if label_map.shape != (image.height, image.width):
            raise DataError(
                f"{where}: the label map is {label_map.shape[1]} x {label_map.shape[0]} pixels, its image, upright, "
                f"{image.width} x {image.height}: expected the same size."
            )
        return image, self._check_labels(label_map, where), name

    def _check_labels(self, label_map: np.ndarray, where: str) -> np.ndarray:
        if self.label_shift:
            ignored = label_map == self.ignore_index
            label_map = label_map + np.int32(self.label_shift)
            label_map[ignored | (label_map < 0)] = self.ignore_index
        wrong = ((label_map < 0) | (label_map >= len(self.class_names))) & (label_map != self.ignore_index)
        if wrong.any():
            values = np.unique(label_map[wrong])
            raise DataError(
                f"{where}: has the labels {join_some(values.tolist())}, expected those of the "
                f"{len(self.class_names)} classes, 0..{len(self.class_names) - 1}, or {self.ignore_index} for pixels "
                "without one. Check the class list, "
                "the ignore index, and whether the labels start at 1 (then shift them by -1)."
            )
        return label_map


def to_label_map(labels: Any) -> np.ndarray:
    """
    A label image (one channel of 1, 8, 16 or 32 bits, or a palette, whose indices count) or nested list of integers,
    as (H, W) int32.

    Raises:
        ValueError: several channels, or values that are no integers.
    """
    channels = len(labels.getbands()) if isinstance(labels, Image.Image) else 1
    array = np.asarray(labels)
    if channels > 1 or array.ndim != 2:
        got = f"a {labels.mode} image" if isinstance(labels, Image.Image) else f"the shape {array.shape}"
        raise ValueError(
            f"got {got}, expected one label per pixel. If colours stand for the classes, they have to become labels "
            "first"
        )
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"got values of the type {array.dtype}, expected integers")
    return array.astype(np.int32)


def _decode(value: Any) -> Any:
    """The upright image of an undecoded one; everything else stays."""
    if value is None:
        raise ValueError("there is none")
    if isinstance(value, dict):
        if value.get("bytes") == b"":
            raise ValueError("the file is empty")
        with pixel_limit():
            return ImageFeature().decode_example(value)
    return value


def _file_name(row: dict[str, Any]) -> str | None:
    if row.get("file_name") is not None:
        return str(row["file_name"])
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else getattr(image, "filename", None)
    return os.path.basename(path) if path else None
