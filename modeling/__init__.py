"""SAN on Transformers: what travels with a checkpoint. Import it as `san_hf.modeling`."""

from .configuration_san import SANConfig
from .image_processing_san import SANImageProcessor, SANImageProcessorPil
from .modeling_san import (
    SANForSemanticSegmentation,
    SANForSemanticSegmentationOutput,
    SANModel,
    SANModelOutput,
    SANPreTrainedModel,
)
from .processing_san import SANProcessor


__all__ = [
    "SANConfig",
    "SANForSemanticSegmentation",
    "SANForSemanticSegmentationOutput",
    "SANImageProcessor",
    "SANImageProcessorPil",
    "SANModel",
    "SANModelOutput",
    "SANPreTrainedModel",
    "SANProcessor",
]
