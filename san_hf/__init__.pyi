from .conversion import convert_checkpoint, export_checkpoint
from .hub import from_pretrained
from .inference import Predictor, Segmentation, Segmenter, Vocabulary
from .modeling import (
    SANConfig,
    SANForSemanticSegmentation,
    SANImageProcessor,
    SANImageProcessorPil,
    SANModel,
    SANProcessor,
)
from .version import __version__
from .vocabularies import VOCABULARIES, load_vocabulary

__all__ = [
    "VOCABULARIES",
    "Predictor",
    "SANConfig",
    "SANForSemanticSegmentation",
    "SANImageProcessor",
    "SANImageProcessorPil",
    "SANModel",
    "SANProcessor",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "__version__",
    "convert_checkpoint",
    "export_checkpoint",
    "from_pretrained",
    "load_vocabulary",
]
