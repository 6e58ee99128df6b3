"""Images larger than memory: rasters whose labels are written strip by strip, and read again for each output format."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from san_hf.colors import Color
from san_hf.files import json_text, new_files, write_file
from san_hf.inference.exchange import coco_of_parts, geojson_of, trace_labels
from san_hf.inference.geotiff import TILE, new_label_tiff, open_tiff, tiff_profile, write_rows
from san_hf.inference.segmentation import Segmentation, colors_of, legend_of
from san_hf.inference.writers import NO_CONFIDENCE, write_categories, write_legend, write_overlay, writers_of
from san_hf.rasters import CACHE_BYTES, Georeference
from san_hf.visualization import UNLABELLED_COLOR, count_labels


# Rasters of more pixels are never whole in memory; drawings of them are reduced to this side at most.
WHOLE_PIXELS, DRAWN_SIDE = 4096**2, 4096


class Strip(NamedTuple):
    """
    Some rows of a segmented image.

    Attributes:
        labels: (rows, W) uint8 or uint16; the type's highest value where there is no data.
        colors: (rows, W, 3) uint8 RGB, of the image.
        confidence: (rows, W) float32, 0..1, if it was asked for.
    """

    labels: np.ndarray
    colors: np.ndarray
    confidence: np.ndarray | None


@dataclass(eq=False)
class SegmentedFile:
    """
    What is known of an image whose segmentation is in files.

    Attributes:
        width, height: in pixels.
        class_names, expanded, given_colors, georeference: see [`Segmentation`].
        pixels: number of pixels of each label, (C,) int64; those without data belong to none.
        scores: mean confidence of each label that is present, if it was asked for.
        files: that were written.
    """

    width: int
    height: int
    class_names: Sequence[str]
    expanded: bool
    given_colors: Mapping[str, Color]
    georeference: Georeference | None = None
    pixels: np.ndarray = field(init=False)
    scores: dict[int, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(self.class_names), dtype=np.int64)

    @cached_property
    def colors(self) -> np.ndarray:
        """See [`Segmentation.colors`]."""
        return colors_of(self.class_names, self.expanded, self.given_colors)

    def legend(self) -> list[dict[str, Any]]:
        """See [`Segmentation.legend`]."""
        return legend_of(self.class_names, self.pixels, self.colors)

    def classes(self) -> list[dict[str, Any]]:
        """The legend without "other"."""
        return self.legend()[: len(self.class_names) - self.expanded]


class Scratch:
    """
    What the files of a segmented image are made of.

    Attributes:
        segmented: what is known of it.
        labels, confidence: files of one band; the second need not exist.
        drawn: the whole image reduced by a whole factor, for drawings.
    """

    def __init__(self, segmented: SegmentedFile, folder: Path):
        self.segmented, self.labels, self.confidence = segmented, folder / ".labels.tif", folder / ".confidence.tif"
        self.drawn: Segmentation | None = None

    def fill(
        self, strips: Iterable[Strip], keep_confidence: bool, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """
        Args:
            strips: from the top, each of `TILE` rows but for the last one.
            keep_confidence: whether a file is made of it.
            progress: is called with the number of rows that are done, and that of all.
        """
        segmented = self.segmented
        count, size = len(segmented.class_names), (segmented.width, segmented.height)
        step, top, sums = 1, 0, np.zeros(count)
        while max(size) > step * DRAWN_SIDE:
            step *= 2
        image = Image.new("RGB", (-(-size[0] // step), -(-size[1] // step)))
        small = []
        with ExitStack() as files:
            labels_file = files.enter_context(open_tiff(self.labels, "w", **tiff_profile(*size, label_type(count))))
            if keep_confidence:
                confidence_file = files.enter_context(
                    open_tiff(self.confidence, "w", **tiff_profile(*size, np.dtype(np.uint16)))
                )
            for labels, colors, confidence in strips:
                write_rows(labels_file, top, labels)
                segmented.pixels += count_labels(labels, int(labels.max()) + count)[:count]
                if keep_confidence and confidence is not None:
                    write_rows(confidence_file, top, np.rint(confidence * np.float32(65535)).astype(np.uint16))
                if confidence is not None:
                    sums += _sums(confidence, labels, count)
                image.paste(Image.fromarray(colors).reduce(step), (0, top // step))
                small.append(labels[::step, ::step].copy())
                top += len(labels)
                if progress is not None:
                    progress(top, segmented.height)
        if confidence is not None:
            present = np.flatnonzero(segmented.pixels).tolist()
            segmented.scores = {label: float(sums[label] / segmented.pixels[label]) for label in present}
        names = segmented.class_names, segmented.expanded, segmented.given_colors
        self.drawn = Segmentation(image, np.concatenate(small), *names)

    def columns(self) -> Iterator[np.ndarray]:
        """The labels from the left, (H, columns)."""
        from rasterio.windows import Window

        with open_tiff(self.labels) as dataset:
            for left in range(0, dataset.width, TILE):
                yield dataset.read(1, window=Window(left, 0, min(TILE, dataset.width - left), dataset.height))

    def bands(self) -> Iterator[tuple[int, np.ndarray]]:
        """The labels from the top: numbers of the first rows, and (rows, W) labels."""
        from rasterio.windows import Window

        with open_tiff(self.labels) as dataset:
            for top in range(0, dataset.height, TILE):
                yield top, dataset.read(1, window=Window(0, top, dataset.width, min(TILE, dataset.height - top)))


def label_type(count: int) -> np.dtype:
    """Of the labels of so many classes, with one value more for "no data"."""
    return np.dtype(np.uint8 if count < 2**8 else np.uint16)


def in_strips(parts: Iterable[Strip], rows: int) -> Iterator[Strip]:
    """The same rows in strips of `rows` each, but for the last one. At most a strip and a part are held."""
    held: list[Strip] = []
    missing = rows
    for part in parts:
        top = 0
        while len(part.labels) - top >= missing:
            held.append(_cut(part, slice(top, top + missing)))
            top, missing = top + missing, rows
            yield _joined(held)
            held.clear()
        if top < len(part.labels):
            held.append(_cut(part, slice(top, None)))
            missing -= len(part.labels) - top
    if held:
        yield _joined(held)


def _joined(strips: Sequence[Strip]) -> Strip:
    labels, colors, confidences = zip(*strips)
    return Strip(
        np.concatenate(labels), np.concatenate(colors), None if confidences[0] is None else np.concatenate(confidences)
    )


def _cut(strip: Strip, rows: slice) -> Strip:
    labels, colors, confidence = strip
    return Strip(labels[rows], colors[rows], None if confidence is None else confidence[rows])


def _sums(values: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The sum of the values of each label's pixels, (count,) float64; both (rows, W)."""
    # One by one, as the sums are of copies in eight bytes.
    rows = (np.bincount(of_row, value, minlength=count)[:count] for of_row, value in zip(labels, values))
    return sum(rows, np.zeros(count))


def write_strips(
    strips: Iterable[Strip],
    segmented: SegmentedFile,
    stem: str | os.PathLike,
    formats: Sequence[str],
    facts: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """
    Writes the files of an image's formats, which appear when all are complete.

    Args:
        strips: of any number of rows, from the top.
        segmented: what is known before; afterwards it is complete.
        stem, formats, facts: see [`Segmentation.save`].
        progress: see [`Scratch.fill`].

    Raises:
        OSError: a file can't be written.
    """
    import rasterio

    stem = Path(stem)
    # Lines are read of tiles, and must find them decoded: colours, three bytes a pixel.
    cache = max(CACHE_BYTES, 3 * TILE * segmented.width * 2)
    with new_files(stem.parent) as folder, rasterio.Env(GDAL_CACHEMAX=cache):
        scratch = Scratch(segmented, folder)
        scratch.fill(in_strips(strips, TILE), "confidence" in formats, progress)
        for ending in writers_of(formats):
            path = folder / f"{stem.name}{ending}"
            WRITERS_OF_STRIPS[ending](scratch, path, facts)
            segmented.files.append(stem.parent / path.name)


def check_formats(formats: Sequence[str], confidence: bool) -> None:
    """
    Before anything is computed.

    Args:
        confidence: whether there will be any.

    Raises:
        ValueError: an unknown format, or "confidence" without any.
    """
    if "confidence" in formats and not confidence:
        raise ValueError(NO_CONFIDENCE)
    writers_of(formats)


def _write_overlay(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    if scratch.drawn is not None:
        with open(path, "wb") as file:
            write_overlay(scratch.drawn, file, facts)


def _write_mask(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    segmented, mask = scratch.segmented, path.with_name(".mask.tif")
    colors = np.concatenate([segmented.colors, [UNLABELLED_COLOR]]).astype(np.uint8)
    profile = tiff_profile(segmented.width, segmented.height, np.dtype(np.uint8), count=3, interleave="pixel")
    with open_tiff(mask, "w", **profile) as dataset:
        for top, labels in scratch.bands():
            write_rows(dataset, top, np.take(colors, np.minimum(labels, len(colors) - 1), axis=0))
    _as_png(mask, path)
    mask.unlink()


def _write_labels(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    _as_png(scratch.labels, path)


def _write_confidence(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    _as_png(scratch.confidence, path)


def _as_png(tiff: Path, path: Path) -> None:
    """A TIFF as a PNG file, line by line."""
    import rasterio
    import rasterio.shutil

    # Without a file of its own for what PNG has no place for.
    with rasterio.Env(GDAL_PAM_ENABLED=False):
        rasterio.shutil.copy(str(tiff), str(path), driver="PNG")


def _write_array(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    segmented = scratch.segmented
    with open(path, "wb") as file:
        for top, labels in scratch.bands():
            if not top:
                shape = segmented.height, segmented.width
                header = {"descr": np.lib.format.dtype_to_descr(labels.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(labels.tobytes())


def _write_geotiff(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    with new_label_tiff(path, scratch.segmented, label_type(len(scratch.segmented.class_names))) as dataset:
        for top, labels in scratch.bands():
            write_rows(dataset, top, labels)
    # Smaller copies, so that the whole is shown at once.
    with open_tiff(path, "r+") as dataset:
        longest = max(dataset.width, dataset.height)
        dataset.build_overviews([2**level for level in range(1, 12) if longest > TILE * 2 ** (level - 1)])


def _write_coco(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    segmented, name = scratch.segmented, os.path.basename(str(facts.get("image", "")))
    content = coco_of_parts(scratch.columns(), segmented, segmented.classes(), name)
    write_file(path, json_text(content) + "\n")


def _write_geojson(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
    import rasterio

    segmented, scores = scratch.segmented, scratch.segmented.scores
    properties = {
        entry["label"]: entry | ({"score": scores[entry["label"]]} if scores else {})
        for entry in segmented.classes()
        if entry["pixels"]
    }
    with open_tiff(scratch.labels) as dataset:
        shapes = trace_labels(rasterio.band(dataset, 1), list(properties))
    content = geojson_of(shapes, properties, segmented.georeference)
    write_file(path, json_text(content) + "\n")


def _plain(write: Callable[..., None]) -> Callable[[Scratch, Path, Mapping[str, Any]], None]:
    """A writer that needs no pixels."""

    def write_plain(scratch: Scratch, path: Path, facts: Mapping[str, Any]) -> None:
        with open(path, "wb") as file:
            write(scratch.segmented, file, facts)

    return write_plain


# The same files as those of `WRITERS`.
WRITERS_OF_STRIPS: dict[str, Callable[[Scratch, Path, Mapping[str, Any]], None]] = {
    ".overlay.png": _write_overlay,
    ".mask.png": _write_mask,
    ".json": _plain(write_legend),
    ".labels.png": _write_labels,
    ".confidence.png": _write_confidence,
    ".coco.json": _write_coco,
    ".geojson": _write_geojson,
    ".labels.npy": _write_array,
    ".labels.tif": _write_geotiff,
    ".labels.tif.aux.xml": _plain(write_categories),
}
