"""Makes batches of augmented images."""

from collections.abc import Sequence
from typing import Any

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
        self.processor = processor if isinstance(processor, SANProcessor) else None
        self.image_processor: Any = getattr(processor, "image_processor", processor)
        self.ignore_index = ignore_index

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: B dictionaries with `image`, (H, W, 3) uint8 RGB, and `label_map`, (H, W) int32, as
                [`TrainingExamples`] has them; or pairs of these, as [`TrainingTransform`] gives them.

        Returns:
            `pixel_values`, (B, 3, Hp, Wp) float32, and `labels`, (B, Hp, Wp) int64.

        Raises:
            ValueError: an image or label map is not of that form; the message says which of the batch.
        """
        pairs = [self._image_and_label_map(example, index) for index, example in enumerate(examples)]
        batch = self.image_processor(
            [image for image, _ in pairs],
            segmentation_maps=[label_map for _, label_map in pairs],
            do_resize=False,
            ignore_index=self.ignore_index,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}

    @staticmethod
    def _image_and_label_map(example: Any, index: int) -> tuple[Any, Any]:
        if isinstance(example, tuple | list) and len(example) == 2:
            return example[0], example[1]
        if not isinstance(example, dict):
            raise ValueError(
                f"Got {type(example).__name__} as example {index}, expected image and label_map, as a dictionary or a "
                "pair."
            )
        if lacking := [name for name in ("image", "label_map") if name not in example]:
            raise ValueError(
                f"Example {index} has no {' and no '.join(lacking)}, only {sorted(example)}. Trainer takes away what "
                "the model doesn't know: use SANTrainer, or set remove_unused_columns=False in TrainingArguments."
            )
        return example["image"], example["label_map"]
