"""TIFF and JPEG 2000 files that rasterio reads: maps with their georeference, many bands, 16 bits, whole or in rows."""

import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from san_hf.extras import MissingPackageError, import_extra
from san_hf.images import ImageError
from san_hf.messages import notify, printable
from san_hf.modeling.image_input_san import lay_on_white


if TYPE_CHECKING:
    import rasterio

# GDAL's driver by a file's first bytes: TIFF and BigTIFF in both byte orders; JPEG 2000 as a file and as a bare stream.
# No others of its many: some follow addresses that are written in a file.
_DRIVERS = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "GTiff"),
    **dict.fromkeys((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
}
# Against files made to keep a machine busy for ever: 200,000 x 200,000.
MAX_PIXELS = 40_000_000_000
# Bytes that are decoded at once: of one block of the file at most, and of several together.
_BLOCK_BYTES, _BYTES_AT_ONCE = 2**28, 2**25
# GDAL's own cache, which would take a twentieth of the memory: each block is read once or twice anyway.
CACHE_BYTES = 2**26
# Rows whose colours are computed at once.
_ROWS_AT_ONCE = 64
_ORIENTATION, _GEO_KEYS = 274, 34735
# Below this share of their range, 16-bit values make a picture that is nearly black.
_DARK = 0.1


@dataclass(frozen=True)
class Georeference:
    """
    Where an image lies on a map.

    Attributes:
        transform: (a, b, c, d, e, f): x = a column + b row + c and y = d column + e row + f, pixels' edges at integers,
            as rasterio's `dataset.transform[:6]`.
        crs: the coordinates' system as WKT; `None` where the file doesn't say.
    """

    transform: tuple[float, float, float, float, float, float]
    crs: str | None = None


@dataclass(frozen=True)
class RasterOptions:
    """
    How a raster becomes an 8-bit RGB image.

    Args:
        bands: numbers, from 1, of the red, the green and the blue band, or of one band as grey. By default those that
            the file calls so, or all of a file that has one or three.
        value_range: what becomes 0 and what becomes 255; values between them in proportion, others cut off. By default
            0 and the highest that the type holds, of 8-bit and 16-bit integers without sign.

    Raises:
        ValueError: no such bands, or no range.
    """

    bands: Sequence[int] | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bands is not None and (len(self.bands) not in (1, 3) or min(self.bands) < 1):
            raise ValueError(
                f"Got the bands {list(self.bands)}, expected three numbers from 1 (red, green, blue), or one."
            )
        if self.value_range is not None and not (
            len(self.value_range) == 2
            and self.value_range[0] < self.value_range[1]
            and np.isfinite(self.value_range).all()
        ):
            raise ValueError(f"Got the range {tuple(self.value_range)}, expected two numbers, the lower one first.")

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.bands is not None or self.value_range is not None


def open_raster(
    path: str | os.PathLike, options: RasterOptions | None = None, windows_above: int | None = None
) -> "Raster | None":
    """
    A file for rasterio to read; `None` where Pillow is to read it as any image.

    That is rasterio's which is a map (it has a georeference, or a value that means "no data"), has kinds of pixels that
    Pillow can't read, or comes with `options`; and what is to be read in rows.

    Args:
        path: a file; of no other kind than TIFF and JPEG 2000 is it opened.
        options: see [`RasterOptions`].
        windows_above: read plain images, too, if they have more pixels.

    Raises:
        ImageError: a raster that has too many pixels or blocks too large, or doesn't say how it is to become RGB.
        MissingPackageError: options, and no rasterio.
    """
    options = options or RasterOptions()
    if (driver := _driver_of(path)) is None:
        return None
    try:
        rasterio = import_extra("rasterio", "polygons", "A choice of bands or range")
    except MissingPackageError:
        if options.given:
            raise
        if _tiff_tag(path, _GEO_KEYS) is not None:
            notify(f"{printable(path)} has a georeference, not kept without rasterio: pip install 'san_hf[polygons]'")
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
                dataset = rasterio.open(os.path.abspath(path), driver=driver)
        except rasterio.errors.RasterioError:  # Pillow says what is wrong, or reads it after all
            return None
    try:
        raster = _as_raster(dataset, path, options, windows_above)
    except BaseException:
        dataset.close()
        raise
    if raster is None:
        dataset.close()
    return raster


def _as_raster(
    dataset: "rasterio.DatasetReader", path: str | os.PathLike, options: RasterOptions, windows_above: int | None
) -> "Raster | None":
    is_map = dataset.crs is not None or not dataset.transform.is_identity
    is_map |= any(value is not None for value in dataset.nodatavals) or bool(dataset.gcps[0])
    beyond_pillow = dataset.count not in (1, 3, 4) or (dataset.count > 1 and dataset.dtypes[0] != "uint8")
    large = windows_above is not None and dataset.width * dataset.height > windows_above
    if not (is_map or beyond_pillow or large or options.given):
        return None
    try:
        raster = Raster(dataset, options, is_map)
    except ImageError:
        if not (is_map or beyond_pillow or options.given):  # CMYK, for example, which Pillow can read
            return None
        raise
    if not is_map and (orientation := _tiff_tag(path, _ORIENTATION) or 1) != 1:
        if beyond_pillow or options.given:
            raise ImageError(
                f"its orientation tag is {orientation}, which isn't followed here: turn its pixels upright"
            )
        return None
    if dataset.gcps[0] and raster.georeference is None:
        notify(f"{printable(path)} is located by ground control points, which aren't carried over: warp it first.")
    if len(dataset.subdatasets) > 1:
        notify(f"{printable(path)} has {len(dataset.subdatasets)} pages or frames: the first is used.")
    return raster


class Raster:
    """
    A raster that is read as 8-bit RGB, some rows at a time: as PIL images, it has `width`, `height` and `crop`. What
    was read last is held, for crops of the same rows.

    Not for several threads at once.

    Attributes:
        width, height: in pixels.
        georeference: a [`Georeference`], or `None`.
    """

    def __init__(self, dataset: "rasterio.DatasetReader", options: RasterOptions, is_map: bool):
        self._dataset = dataset
        self.width, self.height = int(dataset.width), int(dataset.height)
        if self.width * self.height > MAX_PIXELS:
            raise ImageError(f"it has {self.width:,} x {self.height:,} pixels, expected at most {MAX_PIXELS:,} in all")
        self.georeference = None
        if not dataset.transform.is_identity:
            crs = None if dataset.crs is None else dataset.crs.to_wkt()
            self.georeference = Georeference(tuple(dataset.transform[:6]), crs)
        self._bands = _color_bands(dataset, options.bands)
        self._alpha = _alpha_band(dataset)
        self._type = np.dtype(dataset.dtypes[self._bands[0] - 1])
        self._range = _value_range(dataset, self._bands, self._type, options.value_range)
        self._table = _color_table(dataset, self._bands, self._type, self._range, options)
        self._is_map = is_map
        self._nodata = [dataset.nodatavals[band - 1] for band in self._bands]
        self._has_mask = any("per_dataset" in flags and "alpha" not in flags for flags in _mask_flags(dataset))
        self._held: tuple[slice, np.ndarray, np.ndarray | None] | None = None
        block_height, block_width = dataset.block_shapes[0]
        interleaved = dataset.count if str(dataset.interleaving).lower().endswith("pixel") else 1
        self._pixel_bytes = self._type.itemsize * interleaved
        if block_height * block_width * self._pixel_bytes > _BLOCK_BYTES:
            raise ImageError(
                f"its pixels are packed in blocks of {block_width} x {block_height}, too large to be read one by one: "
                "make a tiled TIFF of it, as gdal_translate -co TILED=YES does"
            )

    @property
    def pixels(self) -> int:
        """Their number."""
        return self.width * self.height

    def rows(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Some rows of the image.

        Returns:
            (rows, W, 3) uint8 RGB, white where there is no data; and (rows, W) bool, which pixels have data, or `None`
            where all have.

        Raises:
            ImageError: the file is broken.
        """
        if self._held is None or not (self._held[0].start <= rows.start and rows.stop <= self._held[0].stop):
            self._held = None  # not two at once
            self._held = (rows, *self._read(rows))
        held, colors, valid = self._held
        inside = slice(rows.start - held.start, rows.stop - held.start)
        return colors[inside], None if valid is None else valid[inside]

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """(left, top, right, bottom) of the image, 8-bit RGB."""
        left, top, right, bottom = box
        return Image.fromarray(np.ascontiguousarray(self.rows(slice(top, bottom))[0][:, left:right]))

    def has_data(self, box: tuple[int, int, int, int]) -> bool:
        """Whether a pixel of a rectangle has data: (left, top, right, bottom), as for `crop`."""
        left, top, right, bottom = box
        valid = self.rows(slice(top, bottom))[1]
        return valid is None or bool(valid[:, left:right].any())

    def whole(self) -> tuple[Image.Image, np.ndarray | None]:
        """
        All of the image, 8-bit RGB; and which of its pixels have data: see [`Raster.rows`].

        Raises:
            ImageError: it has more than `PIL.Image.MAX_IMAGE_PIXELS`, or the file is broken.
        """
        if Image.MAX_IMAGE_PIXELS is not None and self.pixels > Image.MAX_IMAGE_PIXELS:
            raise ImageError(
                f"it has {self.width:,} x {self.height:,} pixels, too many to be whole in memory: segment it in "
                "windows into files, by --tile (in Python, Segmenter(..., tile=...).segment_file)"
            )
        colors, valid = self.rows(slice(0, self.height))
        return Image.fromarray(colors), valid

    def close(self) -> None:
        """Closes the file."""
        self._held = None
        self._dataset.close()

    def _read(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        import rasterio

        count = rows.stop - rows.start
        colors = np.empty((count, self.width, 3), dtype=np.uint8)
        valid = np.empty((count, self.width), dtype=bool)
        read = [*self._bands, *([self._alpha] if self._alpha else [])]
        try:
            with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
                for part, columns in self._parts(rows):
                    window = rasterio.windows.Window.from_slices(part, columns)
                    values = self._dataset.read(read, window=window)
                    mask = self._dataset.read_masks(1, window=window) if self._has_mask else None
                    for top in range(0, part.stop - part.start, _ROWS_AT_ONCE):
                        few = slice(top, min(top + _ROWS_AT_ONCE, part.stop - part.start))
                        first = part.start - rows.start
                        place = slice(first + few.start, first + few.stop), columns
                        colors[place], valid[place] = self._convert(values[:, few], None if mask is None else mask[few])
        except rasterio.errors.RasterioError as error:
            raise ImageError(f"can't be read: {error.__cause__ or error}") from error
        return colors, None if not self._is_map or valid.all() else valid

    def _parts(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Rows cut where the file's blocks end, so that none is decoded twice, and not too large at once."""
        block_height, block_width = self._dataset.block_shapes[0]
        columns_at_once = _BYTES_AT_ONCE // (block_height * self._pixel_bytes) // block_width * block_width
        columns_at_once = max(columns_at_once, block_width)
        rows_at_once = max(1, _BYTES_AT_ONCE // (block_height * min(columns_at_once, self.width) * self._pixel_bytes))
        rows_at_once *= block_height
        top = rows.start
        while top < rows.stop:
            bottom = min((top // rows_at_once + 1) * rows_at_once, rows.stop)
            for left in range(0, self.width, columns_at_once):
                yield slice(top, bottom), slice(left, min(left + columns_at_once, self.width))
            top = bottom

    def _convert(self, values: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Colours and validity of pixels, (rows, columns, 3) and (rows, columns), from (bands, rows, columns)."""
        bands, alpha = values[: len(self._bands)], values[len(self._bands) :]
        valid = np.ones(bands.shape[1:], dtype=bool) if mask is None else mask > 0
        missing = np.logical_and.reduce(
            [np.zeros_like(valid) if value is None else band == value for band, value in zip(bands, self._nodata)]
        )
        valid &= ~missing
        if np.issubdtype(bands.dtype, np.floating):
            valid &= np.isfinite(bands).all(axis=0)
        if self._table is not None:
            colors = np.take(self._table, bands, axis=0)
            colors = np.moveaxis(colors, 0, -1) if self._table.ndim == 1 else colors[0]
        else:
            low, high = self._range
            scaled = (np.where(valid, bands, low).astype(np.float64) - low) * (255 / (high - low))
            colors = np.moveaxis(np.rint(scaled.clip(0, 255)).astype(np.uint8), 0, -1)
        colors = np.broadcast_to(colors, (*colors.shape[:2], 3))
        if len(alpha):
            opacity = np.rint(alpha[0] * (255 / np.iinfo(alpha.dtype).max)).astype(np.uint8)
            if (opacity < 255).any():
                colors = np.moveaxis(lay_on_white(np.concatenate([np.moveaxis(colors, -1, 0), opacity[None]])), 0, -1)
            valid &= opacity > 0
        return (colors if valid.all() or not self._is_map else np.where(valid[..., None], colors, 255)), valid


def _driver_of(path: str | os.PathLike) -> str | None:
    """What GDAL reads a file by; `None` for files that aren't rasters."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            beginning = file.read(12)
    except OSError:
        return None
    return next((driver for start, driver in _DRIVERS.items() if beginning.startswith(start)), None)


def _tiff_tag(path: str | os.PathLike, number: int) -> Any:
    """A tag of a TIFF's first page, without any limit on its pixels; `None` where there is none."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            header += file.read(8) if header[2:4] in (b"+\0", b"\0+") else b""
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            return tags.get(number)
    except (OSError, SyntaxError, ValueError, struct.error):
        return None


def _color_bands(dataset: "rasterio.DatasetReader", given: Sequence[int] | None) -> list[int]:
    """Numbers of the bands for red, green and blue, or of one."""
    if given is not None:
        if max(given) > dataset.count:
            raise ImageError(f"it has {dataset.count} bands, and --bands names number {max(given)}")
        return list(given)
    meanings = [meaning.name for meaning in dataset.colorinterp]
    if {"red", "green", "blue"} <= set(meanings):
        return [meanings.index(name) + 1 for name in ("red", "green", "blue")]
    bands = [number for number, meaning in enumerate(meanings, 1) if meaning != "alpha"]
    plain = not set(meanings) & {"cyan", "Y", "hue"}
    if len(bands) in (1, 3) and plain:
        return bands
    named = [text or meaning for text, meaning in zip(dataset.descriptions, meanings)]
    raise ImageError(
        f"it has {dataset.count} bands ({', '.join(printable(name) for name in named[:16])}) and doesn't say which are "
        "red, green and blue: say so by their numbers, such as --bands 4,3,2 (RasterOptions(bands=...))"
    )


def _alpha_band(dataset: "rasterio.DatasetReader") -> int | None:
    meanings = [meaning.name for meaning in dataset.colorinterp]
    return meanings.index("alpha") + 1 if "alpha" in meanings else None


def _mask_flags(dataset: "rasterio.DatasetReader") -> list[set[str]]:
    return [{flag.name for flag in flags} for flags in dataset.mask_flag_enums]


def _value_range(
    dataset: "rasterio.DatasetReader", bands: list[int], dtype: np.dtype, given: tuple[float, float] | None
) -> tuple[float, float]:
    """What becomes 0, and what 255."""
    if given is not None:
        return given
    advice = "say what is black and what is white by --range LOW,HIGH (RasterOptions(value_range=...))"
    if dtype not in (np.uint8, np.uint16):
        low, high = _usual_values(dataset, bands)
        raise ImageError(
            f"its values are of the type {dtype}, most of them from {low:g} to {high:g}, expected 8-bit or 16-bit "
            f"integers without sign: {advice}"
        )
    bits = dataset.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS")
    highest = 2 ** int(bits) - 1 if bits else int(np.iinfo(dtype).max)
    if dtype == np.uint16 and (high := _usual_values(dataset, bands)[1]) < _DARK * highest:
        notify(f"{printable(dataset.name)} is nearly black: most values are below {high:g} of {highest:,}; {advice}.")
    return 0, highest


def _usual_values(dataset: "rasterio.DatasetReader", bands: list[int], side: int = 128) -> tuple[float, float]:
    """Between which values 96 % of some pixels lie, of a few places of the raster."""
    import rasterio

    samples = []
    for row in np.linspace(0, max(dataset.height - side, 0), 4).astype(int).tolist():
        for column in np.linspace(0, max(dataset.width - side, 0), 4).astype(int).tolist():
            size = min(side, dataset.width), min(side, dataset.height)
            values = dataset.read(bands, window=rasterio.windows.Window(column, row, *size), masked=True)
            samples.append(values.compressed())
    found = np.concatenate(samples).astype(float)
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, [2, 98]) if len(found) else (0.0, 0.0)
    return float(low), float(high)


def _color_table(
    dataset: "rasterio.DatasetReader",
    bands: list[int],
    dtype: np.dtype,
    value_range: tuple[float, float],
    options: RasterOptions,
) -> np.ndarray | None:
    """Each value's colour: (values,) or, of a palette, (values, 3) uint8; `None` where there are too many values."""
    if dtype not in (np.uint8, np.uint16):
        return None
    values = np.arange(np.iinfo(dtype).max + 1)
    if dataset.colorinterp[bands[0] - 1].name == "palette" and len(bands) == 1 and options.value_range is None:
        palette = np.zeros((len(values), 3), dtype=np.uint8)
        for value, color in dataset.colormap(bands[0]).items():
            palette[value] = color[:3]
        return palette
    low, high = value_range
    table = np.rint(((values - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)
    if dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
        table = 255 - table
    return table
