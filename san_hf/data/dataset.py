"""Images with label maps, decoded and checked as they are used."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image, ImageOps

from san_hf.images import count_pages, pixel_limit, to_rgb
from san_hf.messages import join_some, notify

from .errors import DataError
from .label_files import read_label_map
from .palettes import Palette


# Data sets of which it was said that they have files of several pages.
_said_pages: set[str] = set()


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
        palette: what the colours of the label maps stand for, if they aren't numbers.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    class_names: list[str]
    ignore_index: int
    name: str
    split: str
    label_shift: int = 0
    palette: Palette | None = None

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
        try:
            with pixel_limit():
                opened = _open(row["image"])
                image = to_rgb(_upright(opened))
            self._say_pages(opened, row, index)
        # A broken file makes Pillow's readers fail in many ways: OSError, SyntaxError, struct.error, IndexError, ...
        except Exception as error:
            where = self._where(row, index)
            raise DataError(f"{where}: the image can't be read: {str(error) or type(error).__name__}") from error
        label_map = self.label_map(row, index)
        if label_map.shape != (image.height, image.width):
            raise DataError(
                f"{self._where(row, index)}: the label map is {label_map.shape[1]} x {label_map.shape[0]} pixels, its "
                f"image, upright, {image.width} x {image.height}: expected the same size."
            )
        return image, label_map, self._name(row, index)

    def label_map(self, row: dict[str, Any], index: int) -> np.ndarray:
        """
        The label map alone, as of [`example`], whatever the size of its image.

        Raises:
            DataError: as `example`.
        """
        where = self._where(row, index)
        try:
            with pixel_limit():
                opened = _open(row["label"])
                label_map = read_label_map(opened, self.palette, len(self.class_names))
            self._say_pages(opened, row, index)
        except Exception as error:
            raise DataError(f"{where}: the label map can't be read: {str(error) or type(error).__name__}") from error
        return self._check_labels(label_map, where)

    def _name(self, row: dict[str, Any], index: int) -> str:
        return _file_name(row) or f"{self.split}[{index}]"

    def _where(self, row: dict[str, Any], index: int) -> str:
        """An example for messages: data set, file and position."""
        name, position = self._name(row, index), f"{self.split}[{index}]"
        return f"{self.name}: {name}" + (f" ({position})" if name != position else "")

    def _say_pages(self, opened: Any, row: dict[str, Any], index: int) -> None:
        if isinstance(opened, Image.Image) and self.name not in _said_pages and (pages := count_pages(opened)) > 1:
            _said_pages.add(self.name)
            notify(
                f"{self._where(row, index)}: a file has {pages} pages or frames. Of all such files the first page is "
                "used."
            )

    def _check_labels(self, label_map: np.ndarray, where: str) -> np.ndarray:
        if self.label_shift:
            ignored = label_map == self.ignore_index
            label_map = label_map + np.int32(self.label_shift)
            label_map[ignored | (label_map < 0)] = self.ignore_index
        wrong = ((label_map < 0) | (label_map >= len(self.class_names))) & (label_map != self.ignore_index)
        if wrong.any():
            values = np.unique(label_map[wrong])
            hint = " If they are black and white for two classes, give label_palette=binary." if 255 in values else ""
            raise DataError(
                f"{where}: has the labels {join_some(values.tolist())}, expected those of the "
                f"{len(self.class_names)} classes, 0..{len(self.class_names) - 1}, or {self.ignore_index} for pixels "
                f"without one. Check the class list, the ignore index, and whether the labels start at 1 (then shift "
                f"them by -1).{hint}"
            )
        return label_map


def _open(value: Any) -> Any:
    """The open image file of an undecoded image; everything else stays."""
    if value is None:
        raise ValueError("there is none")
    if not isinstance(value, dict):
        return value
    path, content = value.get("path"), value.get("bytes")
    if content is None:
        if not path:
            raise ValueError("there is none")
        if not is_local_path(path):
            with xopen(path, "rb") as file:
                content = file.read()
        elif os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")
        else:
            # Read at once: an open file for each example would soon be too many.
            content = Path(path).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(content))


def _upright(image: Any) -> Any:
    return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image


def _file_name(row: dict[str, Any]) -> str | None:
    if row.get("file_name") is not None:
        return str(row["file_name"])
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else getattr(image, "filename", None)
    return os.path.basename(path) if path else None
