"""Makes batches of augmented images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from san_hf.modeling import SANImageProcessor, SANProcessor


class SegmentationCollator:
    """
    Normalises and stacks images as the model's image processor does, without resizing them: it pads with zeros after
    normalisation (labels with `ignore_index`) where sizes differ or are no multiple of the processor's `size_divisor`.

    Args:
        processor: the model's processor, or its image processor alone.
        ignore_index: label of unlabelled pixels, 255 or 65535.
    """

    def __init__(self, processor: SANProcessor | SANImageProcessor, ignore_index: int = 255):
        self.image_processor: Any = getattr(processor, "image_processor", processor)
        self.ignore_index = ignore_index

    def __call__(self, examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: B dictionaries with `image`, (H, W, 3) uint8 RGB, and `label_map`, (H, W) int32.

        Returns:
            `pixel_values`, (B, 3, Hp, Wp) float32, and `labels`, (B, Hp, Wp) int64.

        Raises:
            ValueError: an image or label map is not of that form; the message says which of the batch.
        """
        batch = self.image_processor(
            [example["image"] for example in examples],
            segmentation_maps=[example["label_map"] for example in examples],
            do_resize=False,
            ignore_index=self.ignore_index,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}
