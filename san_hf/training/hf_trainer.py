"""Data sets and metrics for transformers' `Trainer`, as `scripts/train_with_trainer.py` uses them."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction

from san_hf.data import DataError, SegmentationDataset
from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.modeling import SANForSemanticSegmentationOutput, SANProcessor
from san_hf.training.augmentation import TrainingTransform
from san_hf.training.stream import AugmentedSamples, SampleStream


# What `Trainer` fills labels up with where their heights differ between processes.
TRAINER_PADDING = -100


class TrainingExamples(Dataset):
    """
    All augmented examples of a training, in the order in which they are drawn: those that `san-hf train` sees with the
    same seed. For `Trainer`, the whole training is thus one epoch.

    The n-th example depends on the data, the transform, the seed and n only: neither on workers and processes nor on
    where a training was resumed.

    Args:
        data: the images; not streamed.
        transform: the augmentation.
        length: how many examples are drawn in the whole training: optimiser steps times images in each.
        seed: of the order and the augmentation.
    """

    def __init__(self, data: SegmentationDataset, transform: TrainingTransform, length: int, seed: int = 0):
        self.samples = AugmentedSamples(data, transform, seed)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        """
        `image`, (H, W, 3) uint8, and `label_map`, (H, W) int32, of the transform's size; and `name`.

        Raises:
            DataError: the example can't be used.
        """
        samples = self.samples
        [sample] = next(iter(SampleStream(samples.data, samples.seed, batch_size=1, first=position)))
        example = samples[sample]
        if isinstance(example, DataError):
            raise example
        return example


class EvaluationExamples(Dataset):
    """
    The examples as the model sees them in use: resized by the processor's rule, whole, not augmented.

    Args:
        data: the images; not streamed.
        processor: the model's.
    """

    def __init__(self, data: SegmentationDataset, processor: SANProcessor):
        self.data = data
        self.image_processor = processor.image_processor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`image`, (H, W, 3) uint8, and `label_map`, (H, W) int64."""
        image, label_map, _ = self.data[index]
        # Only the resizing: the rest is the collator's.
        resized = self.image_processor(
            image,
            segmentation_maps=label_map,
            ignore_index=self.data.ignore_index,
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
            return_tensors=None,
        )
        return {"image": np.moveaxis(np.asarray(resized["pixel_values"][0]), 0, -1), "label_map": resized["labels"][0]}


class TrainerMetrics:
    """
    `compute_metrics` for `Trainer`, with `batch_eval_metrics=True`, and [`label_maps`] as its
    `preprocess_logits_for_metrics`. Between batches it keeps a confusion matrix, never predictions.

    Labels are compared at the size at which the model sees the image; `san-hf evaluate` compares them at the
    original's, as is done for published results, which differ a little. On several processes, images of different
    sizes need `eval_use_gather_object=True`.

    Args:
        processor: the model's.
        num_labels: number of classes.
        ignore_index: label of unlabelled pixels.
    """

    def __init__(self, processor: SANProcessor, num_labels: int, ignore_index: int = 255):
        self.processor = processor
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self._counts: ConfusionMatrixMetrics | None = None

    def label_maps(self, logits: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """
        Label maps of a batch, which `Trainer` keeps instead of the logits.

        Args:
            logits: `class_queries_logits` (B, Q, C + 1) and `masks_queries_logits` (B, Q, h, w).
            labels: (B, H, W), for their size; perhaps with rows of -100 below, `Trainer`'s padding to the height that
                another process has.

        Returns:
            The predicted label maps, (B, H without those rows, W) int64.
        """
        height = int((labels[0, :, 0] != TRAINER_PADDING).sum())
        outputs = SANForSemanticSegmentationOutput(
            class_queries_logits=logits[0],
            masks_queries_logits=logits[1],
            image_sizes=torch.tensor([(height, labels.shape[2])] * len(labels)),
        )
        return torch.stack(self.processor.post_process_semantic_segmentation(outputs))

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """
        Counts a batch.

        Args:
            prediction: label maps as `predictions` and `label_ids`: (B, H, W), or a list of (H, W).
            compute_result: whether it was the last.

        Returns:
            After the last batch, the averages of [`ConfusionMatrixMetrics`], in percent; nothing before.
        """
        counts = self._counts
        if counts is None:
            device = prediction.predictions[0].device
            counts = ConfusionMatrixMetrics(self.num_labels, self.ignore_index, device=device)
        for label_map, labels in zip(prediction.predictions, prediction.label_ids):
            counts.update(label_map, labels[: len(label_map)])
        self._counts = None if compute_result else counts
        return counts.compute().metrics if compute_result else {}
