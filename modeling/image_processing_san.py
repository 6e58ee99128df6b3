"""Image processor of SAN: pixels in, label maps out.

Sizes are always (height, width), in pixels.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torchvision_available

from .post_processing_san import SemanticSegmentationPostProcessing


class SANImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`):
        The batch is padded to a height and a width that are multiples of this.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        Value of unlabelled pixels in segmentation maps, and of their padding.
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether segmentation maps count from 1, 0 being unlabelled: 0 becomes `ignore_index`, the rest go down by one.
    """

    size_divisor: int | None
    ignore_index: int | None
    do_reduce_labels: bool | None


class _SANImageProcessing(SemanticSegmentationPostProcessing):
    """
    Shared part of the two backends: all but the resize and the arithmetic on pixels.

    Images are resized to `size`, brought to `(x - mean) / std` (mean and std of the 0..255 scale), and padded with
    zeros at the right and the bottom to the largest height and width of the batch, rounded up to `size_divisor`.
    `size` is `{"shortest_edge": s, "longest_edge": l}` (the shortest edge becomes `s`, unless the longest would then
    exceed `l`, which it becomes instead; `longest_edge` may be left out), or a fixed `{"height": h, "width": w}`.

    An image is a PIL image, an array or a tensor, (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, or the path
    or URL of an image. Integers are 0..255, or 0..65535 in 16-bit images; floats are 0..255, or anything finite when
    `do_rescale=False`. Transparent pixels are laid on white. The EXIF orientation is honoured where the processor
    opens the file; as everywhere in Transformers, a PIL image is taken as it is (see `PIL.ImageOps.exif_transpose`).
    """

    if TYPE_CHECKING:  # of the backend
        pad_size: SizeDict | None

        rescale_and_normalize: Any
        pad: Any

    valid_kwargs = SANImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    do_convert_rgb = True
    do_resize = True
    size: Any = {"shortest_edge": 640, "longest_edge": 2560}  # a `SizeDict` once it is built
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = True
    size_divisor = 32
    ignore_index = 255
    do_reduce_labels = False
    return_tensors = "pt"

    def __init__(self, **kwargs: Unpack[SANImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # of the backend

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SANImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images:
                An image or a list of images; see the class for what an image can be. A 4-dimensional array or tensor
                is a batch.
            segmentation_maps:
                A label map per image, of the image's size before it is resized: PIL images (8-bit, palette, 16-bit
                or 32-bit), arrays or tensors (H, W), of integers >= 0 or `ignore_index`. A 3-dimensional array or
                tensor is a batch. They are resized by nearest neighbour.
            kwargs:
                Any of the processor's attributes, for this call only.

        Returns:
            `BatchFeature` with, for B images padded to (Hp, Wp),
            - **pixel_values**: (B, 3, Hp, Wp) float32;
            - **image_sizes**: (B, 2) int64, each image's (height, width) inside the padded tensor;
            - **labels**, when segmentation maps are given: (B, Hp, Wp) int64, padded with `ignore_index`.

            Lists of arrays instead of tensors with `return_tensors=None`.

        Raises:
            ValueError: for whatever is not an image, or not of the kind described; the message says which one.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)  # type: ignore[misc]  # of the backend

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        *,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int | None,
        ignore_index: int,
        do_reduce_labels: bool,
        return_tensors: str | None,
        device: "str | torch.device | None" = None,
        **kwargs,
    ) -> BatchFeature:
        if kwargs.get("do_center_crop"):
            raise ValueError("Got do_center_crop=True, but SAN segments whole images: crop them before the processor.")
        options = (do_convert_rgb, input_data_format, do_rescale, device)
        arrays = [
            _attempt(f"image {index}", self.process_image, image, *options)
            for index, image in enumerate(_flatten(images, ndim=3))
        ]
        if not arrays:
            raise ValueError("Got no images, expected at least one.")
        original_sizes = [_size_of(image) for image in arrays]

        if do_resize:
            arrays = [self.resize(image, size, resample) for image in arrays]
        image_sizes = [_size_of(image) for image in arrays]
        padded_height, padded_width = padded_size_of(image_sizes, size_divisor, pad_size)

        if do_rescale or do_normalize:
            for image in arrays:
                _check_channels(image, image_mean, image_std, do_normalize)
            arrays = [
                self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
                for image in arrays
            ]
        if do_pad:
            arrays = self.pad(arrays, pad_size=SizeDict(height=padded_height, width=padded_width))
        elif return_tensors is not None and len(set(image_sizes)) > 1:
            raise ValueError(f"Got images of different sizes {image_sizes} with do_pad=False: expected equal ones.")
        data: dict[str, list] = {"pixel_values": arrays, "image_sizes": image_sizes}

        if segmentation_maps is not None:
            label_maps = list(_flatten(segmentation_maps, ndim=2))
            if len(label_maps) != len(arrays):
                raise ValueError(f"Got {len(label_maps)} segmentation maps for {len(arrays)} images, expected as many.")
            data["labels"] = []
            for index, label_map in enumerate(label_maps):
                label_map = _attempt(f"segmentation map {index}", _to_labels, label_map, ignore_index)
                if label_map.shape != original_sizes[index]:
                    raise ValueError(
                        f"Segmentation map {index} has the size {label_map.shape}, its image {original_sizes[index]}: "
                        "expected the same (height, width)."
                    )
                if do_reduce_labels:
                    label_map = np.where(np.isin(label_map, (0, ignore_index)), ignore_index, label_map - 1)
                height, width = image_sizes[index]
                resized = PIL.Image.fromarray(label_map.astype(np.int32))
                label_map = np.asarray(resized.resize((width, height), PILImageResampling.NEAREST), dtype=np.int64)
                if do_pad:
                    padding = (0, padded_height - height), (0, padded_width - width)
                    label_map = np.pad(label_map, padding, constant_values=ignore_index)
                data["labels"].append(label_map)

        return BatchFeature(data=data, tensor_type=return_tensors)

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        device: "str | torch.device | None" = None,
    ) -> np.ndarray:
        """One image in any form, as a (C, H, W) array: uint8, or float32 if it is of floats and not to be rescaled."""
        if isinstance(image, str | os.PathLike):
            image = _open(os.fspath(image))
        if isinstance(image, PIL.Image.Image):
            input_data_format = ChannelDimension.LAST
            image = _pil_to_array(image, do_convert_rgb)
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        elif not isinstance(image, np.ndarray):
            raise ValueError(f"got {_describe(image)}, expected a PIL image, an array, a tensor, a path or a URL")

        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(f"got the shape {image.shape}, expected (H, W), (H, W, C) or (C, H, W), none of them 0")
        if image.ndim == 2:
            image = image[None]
        elif (input_data_format or _infer_format(image.shape)) == ChannelDimension.LAST:
            image = np.moveaxis(image, -1, 0)

        image = _to_8_bits(image, keep_floats=not do_rescale)
        if do_convert_rgb:
            if len(image) == 1:
                image = np.repeat(image, 3, axis=0)
            elif len(image) == 4:
                image = _lay_on_white(image)
        return np.ascontiguousarray(image)

    def resized_sizes(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The (height, width) that images of these sizes are resized to."""
        return [resized_size(size, self.size) for size in sizes] if self.do_resize else list(sizes)

    def padded_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """The (height, width) that a batch of images of these sizes, once resized, is padded to."""
        return padded_size_of(sizes, *((self.size_divisor, self.pad_size) if self.do_pad else (None, None)))

    def resize(
        self, image: "np.ndarray | torch.Tensor", size: SizeDict, resample: PILImageResampling | None = None, **kwargs
    ) -> "np.ndarray | torch.Tensor":
        """Resizes a (C, H, W) image by the rule of `size`; see the class."""
        height, width = resized_size(_size_of(image), size)
        size = SizeDict(height=height, width=width)
        return super().resize(image, size, resample, **kwargs)  # type: ignore[misc]  # of the backend


# Transformers declares what subclasses change with narrower types than it takes.
class SANImageProcessorPil(_SANImageProcessing, PilBackend):  # type: ignore[misc]
    __doc__ = f"Image processor of SAN, on PIL and NumPy.\n{_SANImageProcessing.__doc__}"

    def rescale_and_normalize(
        self,
        image: np.ndarray,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
    ) -> np.ndarray:
        """`(x - mean) / std`, mean and std brought to the scale of x rather than x to theirs."""
        image = image.astype(np.float32)
        if not do_normalize:
            return image * np.float32(rescale_factor)
        scale = rescale_factor if do_rescale else 1.0
        mean, std = (np.reshape(value, (-1, 1, 1)) / scale for value in (image_mean, image_std))
        return (image - mean.astype(np.float32)) / std.astype(np.float32)


if is_torchvision_available():

    class SANImageProcessor(_SANImageProcessing, TorchvisionBackend):  # type: ignore[misc]
        __doc__ = f"Image processor of SAN, on torchvision, on any device.\n{_SANImageProcessing.__doc__}"

        def process_image(  # type: ignore[override]  # a tensor where the other backend has an array
            self,
            image,
            do_convert_rgb: bool | None = None,
            input_data_format: str | ChannelDimension | None = None,
            do_rescale: bool | None = None,
            device: "str | torch.device | None" = None,
        ) -> torch.Tensor:
            if device is None and isinstance(image, torch.Tensor):
                device = image.device
            image = super().process_image(image, do_convert_rgb, input_data_format, do_rescale)
            return torch.from_numpy(image).to(device)

else:

    class SANImageProcessor(SANImageProcessorPil):  # type: ignore[no-redef]  # one of the two
        __doc__ = SANImageProcessorPil.__doc__  # type: ignore[assignment]

    # One class under both names, so that it does not matter by which of them an Auto class finds it
    SANImageProcessorPil = SANImageProcessor  # type: ignore[misc, assignment]


def _flatten(items, ndim: int) -> Iterator:
    """The images in `items`: one image, a batch in one array of `ndim` + 1 dimensions, or (nested) lists of these."""
    if isinstance(items, list | tuple):
        for item in items:
            yield from _flatten(item, ndim)
    elif isinstance(items, np.ndarray | torch.Tensor) and items.ndim == ndim + 1:
        yield from items
    else:
        yield items


def _attempt(what: str, function, *args):
    """Calls `function`, and says of which input its error speaks."""
    try:
        return function(*args)
    # What Pillow raises for files that are broken, truncated, or too large once decoded
    except (ValueError, TypeError, OSError, EOFError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot use {what}: {error}") from error


def _open(source: str) -> PIL.Image.Image:
    """The image of a path (in its own mode, upright), a URL or a base64 string (converted to RGB)."""
    return PIL.ImageOps.exif_transpose(PIL.Image.open(source)) if os.path.isfile(source) else load_image(source)


def _infer_format(shape: tuple[int, int, int]) -> ChannelDimension:
    """Axis of an array's channels. Three or four channels rather than one: an image of one row is likelier."""
    channels = {ChannelDimension.FIRST: shape[0], ChannelDimension.LAST: shape[2]}
    likely = [key for key in channels if channels[key] in (3, 4)] or [key for key in channels if channels[key] == 1]
    if len(likely) != 1:
        raise ValueError(
            f"got the shape {shape}, expected 1, 3 or 4 channels either first or last: say which with "
            "input_data_format='channels_first' or 'channels_last'"
        )
    return likely[0]


def _pil_to_array(image: PIL.Image.Image, do_convert_rgb: bool | None) -> np.ndarray:
    """(H, W) or (H, W, C) pixels; 8-bit RGB(A) if converted, except for 16-bit, 32-bit and float images."""
    image.load()  # NumPy would not say that the file is truncated
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        # PIL has 16-bit pixels as 32-bit integers in some file formats
        return pixels.astype(np.uint16) if pixels.size and 0 <= pixels.min() and 255 < pixels.max() < 2**16 else pixels
    if do_convert_rgb:
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    return np.asarray(image)


def _to_8_bits(image: np.ndarray, keep_floats: bool) -> np.ndarray:
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


def _lay_on_white(image: np.ndarray) -> np.ndarray:
    """(4, H, W) RGBA laid on white: (3, H, W), of the same type."""
    white = 255 if image.dtype == np.uint8 else 1
    alpha = image[3:] / np.float32(white)
    color = alpha * image[:3] + (1 - alpha) * white
    return np.rint(color).astype(np.uint8) if image.dtype == np.uint8 else color.astype(image.dtype)


def _to_labels(label_map, ignore_index: int) -> np.ndarray:
    """A label map in any form, as (H, W) int64."""
    if isinstance(label_map, str | os.PathLike):
        label_map = PIL.Image.open(label_map)
    if isinstance(label_map, torch.Tensor):
        label_map = label_map.detach().cpu().numpy()
    if isinstance(label_map, PIL.Image.Image):
        label_map.load()  # NumPy would not say that the file is truncated
    elif not isinstance(label_map, np.ndarray):
        raise ValueError(f"got {_describe(label_map)}, expected a PIL image, an array or a tensor")
    labels = np.asarray(label_map)
    if labels.ndim != 2:
        raise ValueError(f"got the shape {labels.shape}, expected one label per pixel, (H, W)")
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
        raise ValueError(f"got values of the type {labels.dtype}, expected integers")
    labels = labels.astype(np.int64)
    if ((labels < 0) & (labels != ignore_index)).any() or (labels >= 2**31).any():
        raise ValueError(
            f"got labels in {labels.min()}..{labels.max()}, expected 0 or more (or ignore_index={ignore_index})"
        )
    return labels


def _describe(value) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def _size_of(image: "np.ndarray | torch.Tensor") -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """The (height, width) an image is resized to."""
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge or size.shortest_edge < 0 or (size.longest_edge or 1) < 0:
        raise ValueError(
            f"Got size={dict(size)}, expected 'shortest_edge' and, optionally, 'longest_edge', or 'height' and "
            "'width', all positive."
        )
    shortest = min(image_size)
    sides = [size.shortest_edge if side == shortest else side * (size.shortest_edge / shortest) for side in image_size]
    if size.longest_edge and max(sides) > size.longest_edge:
        scale = size.longest_edge / max(sides)
        sides = [side * scale for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    return height, width


def padded_size_of(
    image_sizes: list[tuple[int, int]], size_divisor: int | None, pad_size: SizeDict | None
) -> tuple[int, int]:
    """The (height, width) a batch is padded to: `pad_size`, or the largest sides, rounded up to the divisor."""
    if pad_size is not None:
        return cast(tuple[int, int], (pad_size.height, pad_size.width))
    divisor = size_divisor or 1
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*image_sizes))
    return height, width


def _check_channels(image, image_mean, image_std, do_normalize: bool):
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if do_normalize and np.size(value) not in (1, image.shape[0]):
            raise ValueError(
                f"Got an image of {image.shape[0]} channels and {name} of {np.size(value)}: expected as many; "
                "do_convert_rgb=True makes any image RGB."
            )


SANImageProcessorPil.register_for_auto_class()
SANImageProcessor.register_for_auto_class()
