"""Images of any kind as upright 8-bit RGB images."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from san_hf.fetch import FetchError, fetch, is_address
from san_hf.messages import notify, printable
from san_hf.modeling import SANImageProcessorPil


_VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".wmv"}


class ImageError(ValueError):
    """An image that can't be read; the message says why, and what to do."""


def load_image(source: "str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor") -> Image.Image:
    """
    An image of any kind, as the model takes it.

    Args:
        source: a file that Pillow reads, turned upright by its EXIF orientation; the address of one (http:// or
            https://, see [`san_hf.fetch.fetch`]); what such a file holds, as bytes; or a PIL image, an array or a
            tensor, taken as it is: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, integers 0..255 or, in
            16-bit images, 0..65535, floats 0..255.

    Returns:
        8-bit RGB, transparent pixels laid on white. Of a file with several pages or frames, the first, with a warning.

    Raises:
        ImageError: it can't be read.
    """
    if not isinstance(source, str | os.PathLike | bytes):
        try:
            return to_rgb(source)
        except Exception as error:
            raise ImageError(f"can't be read: {error or type(error).__name__}") from error
    file: str | os.PathLike | io.BytesIO
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif is_address(source):
        try:
            file = io.BytesIO(fetch(str(source)))
        except FetchError as error:
            raise ImageError(str(error)) from error
    else:
        file = source
        if not os.path.isfile(file):
            raise ImageError("it is no regular file" if os.path.exists(file) else "there is no such file")
    try:
        with pixel_limit(), Image.open(file) as opened:
            image = to_rgb(ImageOps.exif_transpose(opened))
            pages = count_pages(opened)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        size = len(file.getvalue()) if isinstance(file, io.BytesIO) else os.path.getsize(file)
        reason = "not an image, or of a format Pillow can't read" if size else "the file is empty"
        if isinstance(file, str | os.PathLike) and os.path.splitext(file)[1].lower() in _VIDEOS:
            reason = "a video, not an image: san-hf video segments those"
        raise ImageError(reason) from error
    # A broken file makes Pillow's readers fail in many ways: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ImageError(f"can't be read: {error or type(error).__name__}") from error
    if pages > 1:
        name = "The image" if isinstance(source, bytes) else printable(source)
        notify(f"{name} has {pages} pages or frames: the first is used.")
    return image


def count_pages(image: Image.Image) -> int:
    """Number of pages or frames in an open image's file; 1 for photographs with previews or depth maps behind them."""
    try:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # a broken page behind the first
        return 1


@contextmanager
def pixel_limit() -> Iterator[None]:
    """
    The same limit for all images that are opened in the block, of images and of labels: `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ImageError: an image has more pixels; it has not been decoded.
    """
    try:
        with warnings.catch_warnings():
            # Beyond its limit Pillow first warns, and refuses at twice of it.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against files made to fill the "
            "memory: scale it down first, or make a tiled TIFF of it, which --tile reads in windows"
        ) from error


def to_rgb(image: "str | os.PathLike | Image.Image | np.ndarray | torch.Tensor") -> Image.Image:
    """
    An image in any form that [`SANImageProcessor`] takes as 8-bit RGB: 16-bit values divided by 257, transparent
    pixels laid on white.

    Raises:
        ValueError: pixels out of their type's range, such as floats beyond 0..255, or no image at all.
    """
    if isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    pixels = _image_processor().process_image(image, do_convert_rgb=True, do_rescale=True)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1)))


@lru_cache(maxsize=1)
def _image_processor() -> SANImageProcessorPil:
    return SANImageProcessorPil()
