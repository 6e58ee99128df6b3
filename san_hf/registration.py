"""SAN in Transformers' Auto classes, without importing Transformers before anybody else does.

Registration needs the model's classes, and these need torch and Transformers: seconds, which `san-hf --help` should not
take. So it waits until Transformers is imported. Then its auto classes are about to be used, and SAN is imported and
registered before they can be.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from san_hf.hub.names import EMBEDDED_MODEL


MODELS = "san_hf.modeling"
# What a pipeline is without a model, as the rest of the package has it.
EMBEDDED_FOLDER = Path(__file__).with_name("checkpoints") / EMBEDDED_MODEL


def register_auto_classes() -> None:
    """Makes Transformers' Auto classes and pipelines take this code for every SAN checkpoint."""
    from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor

    # Transformers up to 5.17 offers it at the top level only where torchvision imports
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from san_hf.inference.pipeline import OpenVocabularySegmentationPipeline
    from san_hf.modeling import (
        SANConfig,
        SANForSemanticSegmentation,
        SANImageProcessor,
        SANImageProcessorPil,
        SANModel,
        SANProcessor,
    )
    from san_hf.modeling.pipeline_san import TASK, SANImageSegmentationPipeline

    AutoConfig.register(SANConfig.model_type, SANConfig)
    AutoModel.register(SANConfig, SANModel)
    AutoModelForSemanticSegmentation.register(SANConfig, SANForSemanticSegmentation)
    AutoImageProcessor.register(
        SANConfig, image_processor_classes={"torchvision": SANImageProcessor, "pil": SANImageProcessorPil}
    )
    AutoProcessor.register(SANConfig, SANProcessor)
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        OpenVocabularySegmentationPipeline,
        pt_model=AutoModelForSemanticSegmentation,
        default={"model": (str(EMBEDDED_FOLDER), "main")},
        type="image",
    )
    # Not by register_pipeline: what it registers is saved with every model.
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = SANImageSegmentationPipeline


def register_when_imported() -> None:
    """Registers at once if Transformers has been imported, otherwise as soon as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if "transformers" in sys.modules:
        importlib.import_module(MODELS)


def _import_models() -> None:
    # Unless the models are what Transformers is being imported for.
    if MODELS not in sys.modules:
        importlib.import_module(MODELS)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has something done right after one of two modules was imported."""

    after_import = {"transformers": _import_models, MODELS: register_auto_classes}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.after_import:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.after_import[name])
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A module's own loader, and then a function."""

    def __init__(self, loader: importlib.abc.Loader, function):
        self.loader, self.function = loader, function

    def __getattr__(self, name: str):
        return getattr(self.loader, name)  # what else there is, such as get_source and get_data

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        # Transformers keeps its own spec, and looks for its files by it.
        if spec is not None:
            spec.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.function()
