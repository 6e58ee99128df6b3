from .augmentation import ColorJitter, TrainingTransform
from .collator import SegmentationCollator
from .optimization import parameter_groups, polynomial_schedule

__all__ = [
    "ColorJitter",
    "SegmentationCollator",
    "TrainingTransform",
    "parameter_groups",
    "polynomial_schedule",
]
