from .augmentation import ColorJitter, TrainingTransform
from .collator import SegmentationCollator
from .config import TrainingConfig
from .config_file import load_config
from .hf_trainer import EvaluationExamples, SANTrainer, TrainerMetrics, TrainingExamples
from .loop import train
from .optimization import parameter_groups, polynomial_schedule

__all__ = [
    "ColorJitter",
    "EvaluationExamples",
    "SANTrainer",
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
