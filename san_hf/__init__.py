"""SAN, the Side Adapter Network (Xu et al., CVPR 2023, arXiv 2302.12242), as a Transformers model.

Importing this registers SAN with the Auto classes, so that they take this code for every SAN checkpoint.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
)

from san_hf.modeling import (
    SANConfig,
    SANForSemanticSegmentation,
    SANImageProcessor,
    SANImageProcessorPil,
    SANModel,
    SANProcessor,
)


__version__ = "0.1.0"

AutoConfig.register(SANConfig.model_type, SANConfig)
AutoModel.register(SANConfig, SANModel)
AutoModelForSemanticSegmentation.register(SANConfig, SANForSemanticSegmentation)
AutoImageProcessor.register(
    SANConfig, image_processor_classes={"torchvision": SANImageProcessor, "pil": SANImageProcessorPil}
)
AutoProcessor.register(SANConfig, SANProcessor)
