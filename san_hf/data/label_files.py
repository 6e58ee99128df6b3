"""Label maps as files have them: numbers as they were stored, and colours by a palette."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from san_hf.messages import join_some

from .palettes import Palette


# Formats whose pixels come out as they went in. In others (JPEG, WebP, AVIF, ...) compression makes labels up.
LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "SGI", "PCX", "QOI")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
# What Pillow's raw modes of few bits hold at most: it scales them to 0..255.
_STORED_MAXIMUM = {"L;2": 3, "L;4": 15}


def read_label_map(labels: Any, palette: Palette | None = None, num_classes: int = 0) -> np.ndarray:
    """
    The labels of an image or of nested lists.

    Args:
        labels: an open image file, or an image; or numbers, (H, W) or (H, W, 1). Numbers of 1, 2, 4, 8, 16 or 32 bits
            count as they are stored, and of images with a palette the indices.
        palette: what the colours stand for. Images only.
        num_classes: how many classes there are, to tell whether a file's greys or its indices are meant; 0 for indices.

    Returns:
        (H, W) int32, upright.

    Raises:
        ValueError: a lossy file, several channels without a palette, colours that the palette hasn't, or values that
            are no integers or take more than 32 bits.
    """
    if not isinstance(labels, Image.Image):
        if palette is not None:
            raise ValueError("got numbers, expected an image whose colours the palette knows")
        return _integers(np.asarray(labels))
    _check_format(labels)
    maximum = _stored_maximum(labels)
    upright = ImageOps.exif_transpose(labels)
    if palette is not None:
        return _labels_of_colors(upright, palette)
    if labels.format == "GIF" and labels.mode == "P":
        raise ValueError(
            "got a GIF file with a palette: whoever writes one numbers the colours anew, expected PNG. Or say by "
            "label_palette what the colours stand for"
        )
    if upright.mode not in ("1", "L", "P", "I") and not upright.mode.startswith("I;16"):
        raise ValueError(_describe_mode(upright))
    if upright.mode == "P":
        _check_palette(upright, num_classes)
    return _integers(np.asarray(upright), maximum)


def _check_format(image: Image.Image) -> None:
    name, compression = image.format, image.info.get("compression")
    if name == "TIFF" and compression in _LOSSY_TIFF:
        name = f"TIFF file with {compression.removeprefix('tiff_')} compression"
    elif name is None or name in LOSSLESS_FORMATS:
        return
    raise ValueError(
        f"got a {name}{'' if ' ' in name else ' file'}, whose compression makes up labels that were never drawn: "
        f"expected one of {', '.join(LOSSLESS_FORMATS)}. Make it from the original annotation; PNG is usual"
    )


def _stored_maximum(image: Image.Image) -> int | None:
    """What was stored for the value that comes out as the largest; None where values come out as they were stored."""
    tiles = getattr(image, "tile", None) or []
    for tile in tiles:
        arguments = tile[3]
        if tile[0] in ("ppm", "ppm_plain") and isinstance(arguments, tuple):  # (mode, the file's own maximum)
            return arguments[-1]
        raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
        if raw_mode in _STORED_MAXIMUM:
            return _STORED_MAXIMUM[raw_mode]
        if image.mode == "L" and raw_mode != "L":
            raise ValueError(
                f"its values are stored as {raw_mode}, with 0 as white: expected numbers that count from black. Save "
                "it as PNG"
            )
    return None


def _integers(array: np.ndarray, maximum: int | None = None) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"got the shape {array.shape}, expected one label per pixel, (height, width)")
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"got values of the type {array.dtype}, expected integers")
    if maximum is not None:
        largest = 255 if array.dtype == np.uint8 else 65535
        return np.rint(array * (maximum / largest)).astype(np.int32)
    limits = np.iinfo(np.int32)
    if array.size and array.dtype.itemsize >= 4 and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError(f"got values from {array.min()} to {array.max()}, expected labels of at most 32 bits")
    return array.astype(np.int32)


def _labels_of_colors(image: Image.Image, palette: Palette) -> np.ndarray:
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if has_alpha:
        image = image.convert("RGBA")
        if transparent := int((np.asarray(image)[..., 3] != 255).sum()):
            raise ValueError(f"{transparent} of its pixels are transparent, so that they have no certain colour")
    elif image.mode not in ("1", "L", "P", "RGB"):
        raise ValueError(f"got a {image.mode} image, expected colours of 8 bits for the palette {palette.name}")
    colors = np.asarray(image.convert("RGB")).astype(np.int32)
    codes = colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]
    positions = np.searchsorted(palette.codes, codes).clip(max=len(palette.codes) - 1)
    unknown = palette.codes[positions] != codes
    if unknown.any():
        listed = join_some(f"#{code:06x}" for code in np.unique(codes[unknown]))
        raise ValueError(
            f"has the colours {listed}, {int(unknown.sum())} pixels, which the palette {palette.name} hasn't. Colours "
            "that lie between others come from resizing or smoothing: labels have to be exact"
        )
    return palette.labels[positions]


def _describe_mode(image: Image.Image) -> str:
    message = f"got a {image.mode} image, expected one label per pixel"
    if image.mode == "F":
        return f"got values of the type float32, expected integers. {message}"
    if image.mode in ("RGB", "RGBA"):
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
        if (red == green).all() and (green == blue).all():
            return f"{message}. Its three channels are equal: save one of them, in Pillow image.getchannel(0)"
    return (
        f"{message}. If colours stand for the classes, say which by label_palette: a file of colours and classes, "
        "voc, cityscapes, or binary for black and white"
    )


def _check_palette(image: Image.Image, num_classes: int) -> None:
    """
    Programs that make files smaller replace grey values by a palette of greys. Where its greys differ from its indices
    but are labels as well, nobody can tell which of them is meant.
    """
    indices = np.unique(np.asarray(image))
    colors = np.zeros((256, 3), np.uint8)
    listed = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colors[: len(listed)] = listed
    used = colors[indices]
    greys = used[:, 0]
    others, labels = np.flatnonzero(greys != indices), np.unique(greys[greys < 255])
    if (used == greys[:, None]).all() and len(others) and len(labels) > 1 and labels[-1] < num_classes:
        raise ValueError(
            f"its palette has the grey {greys[others[0]]} for the index {indices[others[0]]}: which of them is the "
            "label? Save it as greys without a palette, or say by label_palette what each grey stands for"
        )
