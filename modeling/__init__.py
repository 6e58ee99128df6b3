"""SAN on Transformers: what travels with a checkpoint. Import it as `san_hf.modeling`."""

from .configuration_san import SANConfig
from .modeling_san import (
    SANForSemanticSegmentation,
    SANForSemanticSegmentationOutput,
    SANModel,
    SANModelOutput,
    SANPreTrainedModel,
)


__all__ = [
    "SANConfig",
    "SANForSemanticSegmentation",
    "SANForSemanticSegmentationOutput",
    "SANModel",
    "SANModelOutput",
    "SANPreTrainedModel",
]
