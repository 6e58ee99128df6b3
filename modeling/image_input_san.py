"""Images and label maps in any form as arrays: the first step of the image processor."""

import numbers
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import ChannelDimension, load_image


def flatten_inputs(items: Any) -> Iterator:
    """The images in `items`: one image, a batch in one 4-dimensional array, or (nested) lists of these."""
    if isinstance(items, list | tuple):
        if 1 < depth_of_numbers(items) <= 3:
            yield nested_to_array(items)
        else:
            for item in items:
                yield from flatten_inputs(item)
    elif isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 4:
        yield from items
    else:
        yield items


def flatten_label_maps(items: Any, sizes: list[tuple[int, int]]) -> list:
    """
    The label maps in `items`: one, a batch in one array, or (nested) lists of these; (H, W), or (H, W, 1) where a map
    of its image's size comes out.

    Args:
        items: what the caller gave.
        sizes: (height, width) of the images that the maps are of.
    """
    if isinstance(items, list | tuple):
        if 1 < depth_of_numbers(items) <= 4:
            return flatten_label_maps(nested_to_array(items), sizes)
        maps: list = []
        for item in items:
            maps += flatten_label_maps(item, sizes[len(maps) :])
        return maps
    if isinstance(items, np.ndarray | torch.Tensor) and items.ndim in (3, 4):
        batch = items.ndim == 4 or items.shape[-1] != 1 or tuple(items.shape[:2]) not in sizes[:1]
        if not batch:
            return [items[..., 0]]
        return [label_map for i, part in enumerate(items) for label_map in flatten_label_maps(part, sizes[i:])]
    return [items]


def depth_of_numbers(items: Any) -> int:
    """How many lists are nested around the first number; 0 where there is none."""
    depth = 0
    while isinstance(items, list | tuple) and items:
        items, depth = items[0], depth + 1
    return depth if isinstance(items, numbers.Number) else 0


def nested_to_array(items: Any) -> np.ndarray:
    """Nested lists of numbers as an array."""
    try:
        return np.array(items)
    except ValueError as error:
        raise ValueError("Got nested lists of pixels whose rows differ in length, expected equal ones.") from error


def native_order(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order: neither PyTorch nor a comparison of types takes another."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def attempt(what: str, function, *args):
    """Calls `function`, and says of which input its error speaks."""
    try:
        return function(*args)
    # What Pillow raises for files that are broken, truncated, or too large once decoded
    except (ValueError, TypeError, OSError, EOFError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot use {what}: {error}") from error


def open_image(source: str, timeout: float | None = None) -> PIL.Image.Image:
    """
    The image of a path (in its own mode, upright), a URL or a base64 string (converted to RGB).

    Args:
        source: one of these.
        timeout: seconds to wait for a URL.

    Raises:
        OSError, ValueError: it can't be read or fetched, or is none of these.
    """
    if os.path.isfile(source):
        return PIL.ImageOps.exif_transpose(PIL.Image.open(source))
    try:
        return load_image(source, timeout)
    except (OSError, ValueError, TypeError):
        raise
    except Exception as error:  # what fetches has errors of its own
        raise OSError(f"it can't be fetched: {error} ({type(error).__name__})") from error


def infer_format(shape: tuple[int, int, int]) -> ChannelDimension:
    """Axis of an array's channels. Three or four channels rather than one: an image of one row is likelier."""
    channels = {ChannelDimension.FIRST: shape[0], ChannelDimension.LAST: shape[2]}
    likely = [key for key in channels if channels[key] in (3, 4)] or [key for key in channels if channels[key] == 1]
    if len(likely) != 1:
        raise ValueError(
            f"got the shape {shape}, expected 1, 3 or 4 channels either first or last: say which with "
            "input_data_format='channels_first' or 'channels_last'"
        )
    return likely[0]


def pil_to_array(image: PIL.Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """(H, W) or (H, W, C) pixels; 8-bit RGB(A) if converted, except for 16-bit, 32-bit and float images."""
    image.load()  # NumPy would not say that the file is truncated
    if image.mode == "F":
        return native_order(np.asarray(image))
    if image.mode.startswith("I"):
        pixels = native_order(np.asarray(image))
        # PIL has 16-bit pixels as 32-bit integers in some file formats
        return pixels.astype(np.uint16) if pixels.size and 0 <= pixels.min() and 255 < pixels.max() < 2**16 else pixels
    if do_convert_rgb:
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    return np.asarray(image)


def to_8_bits(image: np.ndarray, keep_floats: bool) -> np.ndarray:
    """Checks the range of an image's values, and brings them to uint8, or to float32 if `keep_floats`."""
    if image.dtype == np.uint8:
        return image
    if np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError("got NaN or infinite pixels, expected finite ones")
        if keep_floats:
            return image.astype(np.float32)
    elif not np.issubdtype(image.dtype, np.integer):
        raise ValueError(f"got pixels of the type {image.dtype}, expected integers or floats")
    if image.dtype == np.uint16:
        return np.rint(image / 257).astype(np.uint8)

    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        raise ValueError(f"got pixels in {low}..{high}, expected 0..255")
    if 0 < high <= 1 and np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"got floats in {low}..{high}, expected 0..255; for pixels in 0..1 pass do_rescale=False")
    return np.rint(image).astype(np.uint8)


def lay_on_white(image: np.ndarray) -> np.ndarray:
    """(4, H, W) RGBA laid on white: (3, H, W), of the same type."""
    white = 255 if image.dtype == np.uint8 else 1
    alpha = image[3:] / np.float32(white)
    color = alpha * image[:3] + (1 - alpha) * white
    return np.rint(color).astype(np.uint8) if image.dtype == np.uint8 else color.astype(image.dtype)


def labels_to_array(label_map, ignore_index: int) -> np.ndarray:
    """A label map in any form, as (H, W) int64."""
    if isinstance(label_map, str | os.PathLike):
        label_map = PIL.Image.open(label_map)
    if isinstance(label_map, torch.Tensor):
        label_map = label_map.detach().cpu().numpy()
    if isinstance(label_map, PIL.Image.Image):
        label_map.load()  # NumPy would not say that the file is truncated
    elif not isinstance(label_map, np.ndarray):
        raise ValueError(f"got {describe(label_map)}, expected a PIL image, an array, a tensor or a path")
    labels = np.asarray(label_map)
    if labels.ndim != 2:
        raise ValueError(f"got the shape {labels.shape}, expected one label per pixel, (H, W)")
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
        raise ValueError(f"got values of the type {labels.dtype}, expected integers")
    if not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"got ignore_index={ignore_index}, expected a number of 32 bits, such as 255 or -100")
    labels = labels.astype(np.int64)
    if ((labels < 0) & (labels != ignore_index)).any() or (labels >= 2**31).any():
        raise ValueError(
            f"got labels in {labels.min()}..{labels.max()}, expected 0 or more (or ignore_index={ignore_index})"
        )
    return labels


def check_ignore_index(ignore_index: int, num_labels: int, setting: str) -> None:
    """
    Raises:
        ValueError: the ignore index is one of the classes, whose pixels would be left out without a word; the message
            names the `setting` to change.
    """
    if 0 <= ignore_index < num_labels:
        raise ValueError(
            f"The ignore index {ignore_index} is also one of the {num_labels} classes 0..{num_labels - 1}, and its "
            f"pixels would count as unlabelled. Set {setting} to another value, such as 65535 or -100, and mark "
            "unlabelled pixels by it; if that class is meant to be ignored, set ignore_index_is_class=True beside it."
        )


def describe(value) -> str:
    return f"{type(value).__name__} {value!r:.40}"
