"""Image processor of SAN: pixels in, label maps out.

Sizes are always (height, width), in pixels.
"""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
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
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import is_torchvision_available

from .image_input_san import (
    attempt,
    describe,
    flatten_inputs,
    flatten_label_maps,
    infer_format,
    labels_to_array,
    lay_on_white,
    native_order,
    open_image,
    pil_to_array,
    to_8_bits,
)
from .image_sizes_san import (
    check_arithmetic,
    check_channels,
    checked_setting,
    padded_size_of,
    resized_size,
    size_of,
)
from .post_processing_san import SemanticSegmentationPostProcessing


class SANImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`):
        The batch is padded to a height and a width that are multiples of this.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        Value of unlabelled pixels in segmentation maps, and of their padding.
    ignore_index_is_class (`bool`, *optional*, defaults to `self.ignore_index_is_class`):
        Whether `ignore_index` is meant to be the label of a class, too, whose pixels then count as unlabelled.
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether segmentation maps count from 1, 0 being unlabelled: 0 becomes `ignore_index`, the rest go down by one.
    """

    size_divisor: int | None
    ignore_index: int | None
    ignore_index_is_class: bool | None
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
    ignore_index_is_class = False
    do_reduce_labels = False
    return_tensors = "pt"

    def __init__(self, **kwargs: Unpack[SANImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # of the backend

    def __setattr__(self, name: str, value: Any):
        # Whatever form it is given in, at construction or later, in one form from here on.
        super().__setattr__(name, checked_setting(name, value))

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SANImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images:
                An image or a list of images; see the class for what an image can be, and nested lists of numbers. A
                4-dimensional array or tensor is a batch.
            segmentation_maps:
                A label map per image, of the image's size before it is resized: PIL images (8-bit, palette, 16-bit
                or 32-bit), arrays, tensors or nested lists (H, W) or (H, W, 1), of integers >= 0 or `ignore_index`. A
                3-dimensional array or tensor is a batch otherwise. They are resized by nearest neighbour.
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
        settings = {name: checked_setting(name, value) for name, value in kwargs.items()}
        # Transformers takes them as dictionaries only.
        settings |= {name: dict(value) for name, value in settings.items() if isinstance(value, SizeDict)}
        return super().preprocess(images, segmentation_maps, **settings)  # type: ignore[misc]  # of the backend

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
            attempt(f"image {index}", self.process_image, image, *options)
            for index, image in enumerate(flatten_inputs(images))
        ]
        if not arrays:
            raise ValueError("Got no images, expected at least one.")
        original_sizes = [size_of(image) for image in arrays]

        # All sizes and numbers before anything of those sizes is made.
        image_sizes = [resized_size(image_size, size) for image_size in original_sizes] if do_resize else original_sizes
        padded_height, padded_width = padded_size_of(image_sizes, size_divisor, pad_size) if do_pad else (0, 0)
        check_arithmetic(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        if do_resize:
            arrays = [self.resize(image, size, resample) for image in arrays]

        if do_rescale or do_normalize:
            for image in arrays:
                check_channels(image, image_mean, image_std, do_normalize)
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
            label_maps = flatten_label_maps(segmentation_maps, original_sizes)
            if len(label_maps) != len(arrays):
                raise ValueError(f"Got {len(label_maps)} segmentation maps for {len(arrays)} images, expected as many.")
            data["labels"] = []
            for index, label_map in enumerate(label_maps):
                label_map = attempt(f"segmentation map {index}", labels_to_array, label_map, ignore_index)
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
            image = open_image(os.fspath(image))
        if isinstance(image, PIL.Image.Image):
            input_data_format = ChannelDimension.LAST
            image = pil_to_array(image, do_convert_rgb)
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        elif not isinstance(image, np.ndarray):
            raise ValueError(f"got {describe(image)}, expected a PIL image, an array, a tensor, a path or a URL")

        image = native_order(image)
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(f"got the shape {image.shape}, expected (H, W), (H, W, C) or (C, H, W), none of them 0")
        if image.ndim == 2:
            image = image[None]
        elif (input_data_format or infer_format(image.shape)) == ChannelDimension.LAST:
            image = np.moveaxis(image, -1, 0)

        image = to_8_bits(image, keep_floats=not do_rescale)
        if do_convert_rgb:
            if len(image) == 1:
                image = np.repeat(image, 3, axis=0)
            elif len(image) == 4:
                image = lay_on_white(image)
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
        height, width = resized_size(size_of(image), size)
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


SANImageProcessorPil.register_for_auto_class()
SANImageProcessor.register_for_auto_class()
