"""Images of any kind as upright 8-bit RGB images."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from san_hf.messages import notify, printable
from san_hf.modeling import SANImageProcessorPil


class ImageError(ValueError):
    """An image that can't be read; the message says why, and what to do."""


def load_image(source: "str | os.PathLike | Image.Image | np.ndarray | torch.Tensor") -> Image.Image:
    """
    An image of any kind, as the model takes it.

    Args:
        source: a file that Pillow reads, turned upright by its EXIF orientation; the address of one (http:// or
            https://); or a PIL image, an array or a tensor, taken as it is: (H, W), (H, W, C) or (C, H, W) with 1, 3
            or 4 channels, integers 0..255 or, in 16-bit images, 0..65535, floats 0..255.

    Returns:
        8-bit RGB, transparent pixels laid on white. Of a file with several pages or frames, the first, with a warning.

    Raises:
        ImageError: it can't be read.
    """
    file = None
    if isinstance(source, str | os.PathLike) and not str(source).startswith(("http://", "https://")):
        file = source
    if file is not None and not os.path.isfile(file):
        raise ImageError("it is no regular file" if os.path.exists(file) else "there is no such file")
    try:
        with pixel_limit():
            if file is None:
                return to_rgb(source)
            with Image.open(file) as opened:
                image = to_rgb(ImageOps.exif_transpose(opened))
                pages = count_pages(opened)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        empty = file is not None and not os.path.getsize(file)
        reason = "the file is empty" if empty else "not an image, or of a format Pillow can't read"
        raise ImageError(reason) from error
    # A broken file makes Pillow's readers fail in many ways: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ImageError(f"can't be read: {error or type(error).__name__}") from error
    if pages > 1:
        notify(f"{printable(file)} has {pages} pages or frames: the first is used.")
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
