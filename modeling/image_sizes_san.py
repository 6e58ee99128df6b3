"""Sizes that images are resized and padded to: the image processor's rules, and their bounds.

Sizes are always (height, width), in pixels.
"""

import math
import numbers
from typing import Any

import numpy as np
from transformers.image_utils import SizeDict


# More than any model here can use: as 32-bit RGB, an image of so many pixels takes 0.8 GB.
MAX_INPUT_PIXELS = 2**26
# Of a label map, 8 bytes each. Pillow refuses larger images, too.
MAX_TARGET_PIXELS = 2**28


def size_of(image: Any) -> tuple[int, int]:
    """Of a (..., H, W) array or tensor."""
    return image.shape[-2], image.shape[-1]


def whole_number(value: Any, name: str) -> int:
    """
    The number of pixels that `value` is.

    Raises:
        ValueError: it isn't a whole number from 1; the message calls it `name`.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    pixels: Any = value
    if not is_number or not 1 <= pixels < math.inf or pixels % 1:
        raise ValueError(f"Got {name}={value!r:.80}, expected a whole number of pixels, 1 or more.")
    return int(pixels)


def as_size_dict(size: Any, name: str) -> SizeDict:
    """
    A `size` or `pad_size` in any form that Transformers takes.

    Args:
        size: `{"shortest_edge": s}`, perhaps with `"longest_edge"`, or `{"height": h, "width": w}`, as a dictionary or
            a `SizeDict`; (h, w); or one number, the shortest edge (for `pad_size` both sides).
        name: "size" or "pad_size".

    Raises:
        ValueError: anything else, or a side that is no whole number from 1.
    """
    if isinstance(size, numbers.Real):
        size = {"shortest_edge": size} if name == "size" else {"height": size, "width": size}
    elif isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, numbers.Real) for side in size):
        size = dict(zip(("height", "width"), size))
    allowed = [{"height", "width"}]
    if name == "size":
        allowed += [{"shortest_edge"}, {"shortest_edge", "longest_edge"}]
    given = {key: side for key, side in dict(size).items() if side is not None} if is_mapping(size) else {}
    if set(given) not in allowed:
        edges = "'shortest_edge' and, optionally, 'longest_edge', or " if name == "size" else ""
        raise ValueError(f"Got {name}={size!r:.200}, expected {edges}'height' and 'width', in pixels.")
    return SizeDict(**{key: whole_number(side, f"{name}[{key!r}]") for key, side in given.items()})


def checked_setting(name: str, value: Any) -> Any:
    """
    A setting of the image processor in the form in which it is kept: sizes as `SizeDict`, the divisor as an integer.

    Raises:
        ValueError: a size that can't be; other settings are taken as they are.
    """
    if value is None or name not in ("size", "pad_size", "size_divisor"):
        return value
    return whole_number(value, name) if name == "size_divisor" else as_size_dict(value, name)


def is_mapping(size: Any) -> bool:
    return isinstance(size, dict | SizeDict)


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """
    The (height, width) an image is resized to, by the rule of `size`.

    Raises:
        ValueError: it would be of more than `MAX_INPUT_PIXELS`.
    """
    if size.height and size.width:
        sides: list[float] = [size.height, size.width]
    else:
        shortest, edge = min(image_size), int(size.shortest_edge or 0)
        sides = [edge if side == shortest else side * (edge / shortest) for side in image_size]
        if size.longest_edge and max(sides) > size.longest_edge:
            scale = size.longest_edge / max(sides)
            sides = [side * scale for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    check_area((height, width), f"size={dict(size)}, which makes an image of {image_size}", MAX_INPUT_PIXELS)
    return height, width


def padded_size_of(
    image_sizes: list[tuple[int, int]], size_divisor: int | None, pad_size: SizeDict | None
) -> tuple[int, int]:
    """
    The (height, width) a batch is padded to: `pad_size`, or the largest sides, rounded up to the divisor.

    Raises:
        ValueError: it would be of more than `MAX_INPUT_PIXELS`, or an image would not fit into it.
    """
    largest_height, largest_width = (max(sides) for sides in zip(*image_sizes))
    if pad_size is not None:
        height, width = int(pad_size.height or 0), int(pad_size.width or 0)
        if height < largest_height or width < largest_width:
            raise ValueError(
                f"Got pad_size={(height, width)} for images of up to {(largest_height, largest_width)}, expected at "
                "least as much (height, width)."
            )
    else:
        divisor = 1 if size_divisor is None else whole_number(size_divisor, "size_divisor")
        height, width = (-(-side // divisor) * divisor for side in (largest_height, largest_width))
    source = f"pad_size={(height, width)}" if pad_size is not None else f"size_divisor={size_divisor}, which makes"
    check_area((height, width), source, MAX_INPUT_PIXELS)
    return height, width


def check_area(size: tuple[int, int], source: str, limit: int) -> None:
    """
    Raises:
        ValueError: more pixels than `limit`; the message says by what.
    """
    if size[0] * size[1] > limit:
        raise ValueError(f"Got {source} {size}: {size[0] * size[1]:,} pixels, expected at most {limit:,}.")


def check_arithmetic(
    do_rescale: bool, rescale_factor: Any, do_normalize: bool, image_mean: Any, image_std: Any
) -> None:
    """
    Raises:
        ValueError: numbers that no image can be rescaled or normalised by.
    """
    if do_rescale and not (isinstance(rescale_factor, numbers.Real) and 0 < float(rescale_factor) < math.inf):
        raise ValueError(
            f"Got rescale_factor={rescale_factor!r:.80}, expected a finite number above 0, such as 1 / 255."
        )
    if not do_normalize:
        return
    for name, value, lowest in (("image_mean", image_mean, -math.inf), ("image_std", image_std, 0.0)):
        numeric = np.asarray(value).dtype.kind in "iuf"
        if not numeric or not (np.isfinite(value).all() and (np.asarray(value) > lowest).all()):
            above = " above 0" if lowest == 0 else ""
            raise ValueError(f"Got {name}={value!r:.80}, expected finite numbers{above}, one for each channel.")


def check_channels(image: Any, image_mean: Any, image_std: Any, do_normalize: bool) -> None:
    """
    Raises:
        ValueError: an image of another number of channels than its mean or deviation.
    """
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if do_normalize and np.size(value) not in (1, image.shape[0]):
            raise ValueError(
                f"Got an image of {image.shape[0]} channels and {name} of {np.size(value)}: expected as many; "
                "do_convert_rgb=True makes any image RGB."
            )
