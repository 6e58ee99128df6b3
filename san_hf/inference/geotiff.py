"""Label maps as GeoTIFF files."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from xml.sax.saxutils import escape

import numpy as np

from san_hf.rasters import Georeference


if TYPE_CHECKING:
    import rasterio

# Side of the tiles that the files consist of, in pixels.
TILE = 256


class LabelledRaster(Protocol):
    """What is written of a segmentation besides its labels: see [`san_hf.inference.Segmentation`]."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def colors(self) -> np.ndarray: ...
    @property
    def georeference(self) -> Georeference | None: ...


def tiff_profile(
    width: int, height: int, dtype: np.dtype, georeference: Georeference | None = None, **options: Any
) -> dict[str, Any]:
    """What `rasterio.open` needs to write a compressed TIFF of tiles, of one band if `options` don't say otherwise."""
    import rasterio

    if georeference is not None:
        options["transform"] = rasterio.Affine(*georeference.transform)
        options["crs"] = georeference.crs
    tiles = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "bigtiff": "if_safer"}
    size = {"width": width, "height": height, "count": 1, "dtype": dtype}
    return {"driver": "GTiff", **size, **tiles, **options}


def write_rows(dataset: "rasterio.io.DatasetWriter", top: int, values: np.ndarray) -> None:
    """
    Some rows of a raster. If rows come in order and `top` is a multiple of `TILE`, each tile is compressed once.

    Args:
        dataset: open for writing.
        top: the first row.
        values: (rows, W), or (rows, W, bands).
    """
    from rasterio.windows import Window

    bands = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    dataset.write(bands, window=Window(0, top, bands.shape[2], bands.shape[1]))


@contextmanager
def open_tiff(path: str | os.PathLike, mode: str = "r", **profile: Any) -> "Iterator[rasterio.io.DatasetReader]":
    """A TIFF to read, or to write by [`tiff_profile`], with or without a place on a map."""
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        dataset = rasterio.open(path, mode, **profile)
    with dataset:
        yield dataset


@contextmanager
def new_label_tiff(
    path: str | os.PathLike, segmentation: LabelledRaster, dtype: np.dtype
) -> "Iterator[rasterio.io.DatasetWriter]":
    """
    A TIFF for the labels of a segmentation, which has its place on the map, a colour for each label, and the names as
    tags "class_0", "class_1", ... of its band. The type's highest value, 255 or 65535, means "no data" if it is no
    label.

    Args:
        path: of the file, which is replaced.
        segmentation: whose map it is.
        dtype: uint8 or uint16.
    """
    names, highest = segmentation.class_names, int(np.iinfo(dtype).max)
    options = {"photometric": "palette", **({"nodata": highest} if highest >= len(names) else {})}
    profile = tiff_profile(segmentation.width, segmentation.height, dtype, segmentation.georeference, **options)
    with open_tiff(path, "w", **profile) as dataset:
        dataset.write_colormap(1, {label: (*color, 255) for label, color in enumerate(segmentation.colors.tolist())})
        dataset.update_tags(1, **{f"class_{label}": name for label, name in enumerate(names)})
        yield dataset


def categories_text(class_names: Sequence[str]) -> str:
    """The names of a file's labels in the XML that GDAL reads from beside it."""
    names = "".join(f"<Category>{escape(name)}</Category>" for name in class_names)
    band = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand>'
    return f"<PAMDataset>{band}</PAMDataset>\n"
