"""What an exported folder says about itself: a JSON file, and the same in the graph's own metadata."""

from pathlib import Path
from typing import Any

import torch
import transformers

from san_hf.hub.names import EXPORT_FILE
from san_hf.inference.vocabulary import Vocabulary
from san_hf.json_files import read_json
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.base_clip_san import digest_clip
from san_hf.version import __version__

from .errors import ExportError
from .forms import ClosedForm, OpenForm, size_rule


DESCRIPTION_KEY = "san_hf"
FORMAT = "san_hf.export.1"
VOCABULARY_FILE = "vocabulary.safetensors"
# What is left of a model without its vision part, in the open form.
TEXT_FILE = "text.safetensors"
TEXT_PARTS = ("text_model.", "text_projection.", "logit_scale", "no_object_embed", "class_embeds")


def describe(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    target: str,
    form: OpenForm | ClosedForm,
    vocabulary: Vocabulary | None,
) -> dict[str, Any]:
    """What a runtime has to know of a graph, and where the graph is from; of values that JSON has."""
    images = processor.image_processor
    multiple, smallest = size_rule(model.config)
    return {
        "format": FORMAT,
        "form": form.name,
        "target": target,
        "precision": "float32",
        "versions": {"san_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "outputs": list(form.outputs),
        "class_names": None if vocabulary is None else list(vocabulary.class_names),
        "size": {edge: side for edge, side in dict(images.size).items() if side},
        "size_divisor": images.size_divisor,
        "size_multiple": multiple,
        "size_min": smallest,
        "patch_size": model.config.patch_size,
        "num_channels": model.config.num_channels,
        "embed_dim": model.config.clip_embed_dim,
        "rescale_factor": images.rescale_factor,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "side_adapter": model.active_side_adapter,
        "digest": model_digest(model),
    }


def model_digest(model: SANForSemanticSegmentation) -> str:
    """SHA-256 that tells models apart: of the side adapter with its decoder of masks, and of CLIP's text tower."""
    parts = {
        "side_adapter": model.model.side_adapter,
        "mask_decoder": model.model.mask_decoder,
        "text_model": model.text_model,
        "text_projection": model.text_projection,
    }
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.named_parameters()}
    return digest_clip(tensors, torch.bfloat16)


def read_description(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ExportError: it is no exported folder, or one of another version.
    """
    try:
        description = read_json(folder / EXPORT_FILE)
        if description["format"] != FORMAT:
            raise ExportError(
                f"'{folder}' has the format {description['format']!r:.80}, expected {FORMAT!r}: export it again."
            )
    except ExportError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"'{folder}' is no exported folder: {EXPORT_FILE} can't be read ({error}). `san-hf export` writes one."
        ) from error
    return description
