"""SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242), as a Transformers model.

Importing this registers SAN with the Auto classes, so that they take this code for every SAN checkpoint.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor

# Transformers up to 5.17 offers it at the top level only where torchvision imports
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, MODEL_MAPPING_NAMES

from san_hf.conversion import convert_checkpoint, export_checkpoint
from san_hf.hub import from_pretrained
from san_hf.inference import Segmentation, Segmenter
from san_hf.modeling import (
    SANConfig,
    SANForSemanticSegmentation,
    SANImageProcessor,
    SANImageProcessorPil,
    SANModel,
    SANProcessor,
)
from san_hf.version import __version__
from san_hf.vocabularies import VOCABULARIES, load_vocabulary


AutoConfig.register(SANConfig.model_type, SANConfig)
AutoModel.register(SANConfig, SANModel)
AutoModelForSemanticSegmentation.register(SANConfig, SANForSemanticSegmentation)
AutoImageProcessor.register(
    SANConfig, image_processor_classes={"torchvision": SANImageProcessor, "pil": SANImageProcessorPil}
)
AutoProcessor.register(SANConfig, SANProcessor)
# Transformers' pipelines go by these lists of names, which `register` doesn't reach.
MODEL_MAPPING_NAMES[SANConfig.model_type] = SANModel.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[SANConfig.model_type] = SANForSemanticSegmentation.__name__

__all__ = [
    "VOCABULARIES",
    "SANConfig",
    "SANForSemanticSegmentation",
    "SANImageProcessor",
    "SANImageProcessorPil",
    "SANModel",
    "SANProcessor",
    "Segmentation",
    "Segmenter",
    "__version__",
    "convert_checkpoint",
    "export_checkpoint",
    "from_pretrained",
    "load_vocabulary",
]
