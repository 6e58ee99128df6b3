"""Output formats of a segmentation: one function a format's file, and one table of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from san_hf.extras import import_extra
from san_hf.files import json_text, new_file


if TYPE_CHECKING:
    from san_hf.inference.segmentation import Segmentation

NO_CONFIDENCE = "This segmentation has no confidence to write: ask for it by Segmenter(..., confidence=True)."
# Writes one file; the last argument are further facts for those that have room for them.
Writer = Callable[["Segmentation", BinaryIO, Mapping[str, Any]], None]


def write_overlay(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """PNG: the image under its label map, with names and a legend."""
    # A photograph shrinks by a fifth more at the usual level, in five times the time.
    segmentation.overlay().save(file, format="png", compress_level=1)


def write_mask(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """PNG: the label map in colours."""
    segmentation.mask().save(file, format="png")


def write_labels(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """PNG: one label per pixel, 8-bit grey, or 16-bit beyond 256 labels."""
    from PIL import Image

    Image.fromarray(segmentation.label_map).save(file, format="png")


def write_confidence(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """PNG: the confidence of each pixel, 16-bit grey, 65,535 for 1."""
    from PIL import Image

    if segmentation.confidence is None:
        raise ValueError(NO_CONFIDENCE)
    Image.fromarray((segmentation.confidence * 65535.0).round().astype("uint16")).save(file, format="png")


def write_legend(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """JSON: the facts, the image's size, and every class with its label, share of pixels and colour."""
    size = {"width": segmentation.width, "height": segmentation.height}
    content = {**facts, **size, "classes": segmentation.legend()}
    file.write((json_text(content, indent=2) + "\n").encode("utf-8"))


def write_coco(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """JSON: a data set of this image in COCO's format, with run-length codes."""
    content = segmentation.to_coco(file_name=os.path.basename(str(facts.get("image", ""))))
    file.write((json_text(content) + "\n").encode("utf-8"))


def write_geojson(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """GeoJSON: the outlines of each class, in degrees if the image lies on a map, otherwise in pixels."""
    file.write((json_text(segmentation.to_geojson()) + "\n").encode("utf-8"))


def write_array(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """NumPy's format: the label map as it is."""
    import numpy as np

    np.save(file, segmentation.label_map)


def write_geotiff(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """GeoTIFF: the label map in tiles, with its colours, its names, and its place on the map."""
    from san_hf.inference.geotiff import new_label_tiff, write_rows

    rasterio = import_extra("rasterio", "polygons", "A GeoTIFF")
    with rasterio.MemoryFile() as memory:
        with new_label_tiff(memory.name, segmentation, segmentation.label_map.dtype) as dataset:
            write_rows(dataset, 0, segmentation.label_map)
        file.write(memory.getbuffer())


def write_categories(segmentation: "Segmentation", file: BinaryIO, facts: Mapping[str, Any]) -> None:
    """XML: the names of a GeoTIFF's labels, as GDAL keeps them beside it, for the legends of QGIS and others."""
    from san_hf.inference.geotiff import categories_text

    file.write(categories_text(segmentation.class_names).encode("utf-8"))


# Format -> the files it consists of, by the ending that follows the image's name.
WRITERS: dict[str, dict[str, Writer]] = {
    "overlay": {".overlay.png": write_overlay},
    "mask": {".mask.png": write_mask},
    "json": {".json": write_legend},
    "png-labels": {".labels.png": write_labels, ".json": write_legend},
    "confidence": {".confidence.png": write_confidence},
    "coco": {".coco.json": write_coco},
    "geojson": {".geojson": write_geojson},
    "npy": {".labels.npy": write_array, ".json": write_legend},
    "geotiff": {".labels.tif": write_geotiff, ".labels.tif.aux.xml": write_categories, ".json": write_legend},
}
FORMATS = tuple(WRITERS)
DEFAULT_FORMATS = ("overlay", "mask", "json", "png-labels")


def output_files(stem: str | os.PathLike, formats: Sequence[str]) -> list[Path]:
    """
    The files that [`Segmentation.save`] writes.

    Raises:
        ValueError: an unknown format.
    """
    return [Path(f"{os.fspath(stem)}{ending}") for ending in writers_of(formats)]


def write_formats(
    segmentation: "Segmentation", stem: str | os.PathLike, formats: Sequence[str], facts: Mapping[str, Any]
) -> list[Path]:
    """See [`Segmentation.save`]."""
    written = []
    for ending, write in writers_of(formats).items():
        path = Path(f"{os.fspath(stem)}{ending}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            write(segmentation, file, facts)
        written.append(path)
    return written


def writers_of(formats: Sequence[str]) -> dict[str, Writer]:
    """
    By ending, each once.

    Raises:
        ValueError: an unknown format.
    """
    unknown = [name for name in formats if name not in WRITERS]
    if unknown:
        raise ValueError(f"Unknown formats {unknown}; there are {list(WRITERS)}.")
    return {ending: write for name in formats for ending, write in WRITERS[name].items()}
