"""Training: augmentation, batches, optimiser, and the loop."""

from san_hf.training.augmentation import ColorJitter, TrainingTransform
from san_hf.training.collator import SegmentationCollator
from san_hf.training.optimization import parameter_groups, polynomial_schedule


__all__ = [
    "ColorJitter",
    "SegmentationCollator",
    "TrainingTransform",
    "parameter_groups",
    "polynomial_schedule",
]
