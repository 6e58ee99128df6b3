from .augmentation import ColorJitter, TrainingTransform
from .collator import SegmentationCollator
from .config import TrainingConfig
from .config_file import load_config
from .hf_trainer import EvaluationExamples, TrainerMetrics, TrainingExamples
from .loop import train
from .optimization import parameter_groups, polynomial_schedule

__all__ = [
    "ColorJitter",
    "EvaluationExamples",
    "SegmentationCollator",
    "TrainerMetrics",
    "TrainingConfig",
    "TrainingExamples",
    "TrainingTransform",
    "load_config",
    "parameter_groups",
    "polynomial_schedule",
    "train",
]
