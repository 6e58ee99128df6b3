"""The CLIP that a side adapter was trained on: its digest, and finding it again.

A side adapter's folder holds what was trained and names its base, as PEFT's adapters do. With another CLIP than its own
an adapter gives masks and classes that look possible and are wrong, so a digest of the base goes with the name.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPModel

from .configuration_san import SANConfig


# CLIP's own parts, by the names that they have in CLIPModel. SAN has some of them in its inner model.
CLIP_PARTS = ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale")
# Trained with the adapter even where CLIP is frozen, as in the original: it is the adapter's.
POSITION_EMBEDDING = "vision_model.embeddings.position_embedding.weight"
HALF_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def clip_name(name: str) -> str | None:
    """The name in CLIPModel of a frozen tensor of a SAN model; None for all others."""
    name = name.removeprefix("model.").replace(".base_layer.", ".")  # PEFT wraps what it adapts
    is_clip = name.split(".")[0] in CLIP_PARTS and name != POSITION_EMBEDDING
    return name if is_clip and ".lora_" not in name and not name.endswith("position_ids") else None


def select_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen tensors among those of a SAN or CLIP model, by their names in CLIPModel."""
    return {clip: tensor for name, tensor in state_dict.items() if (clip := clip_name(name)) is not None}


def digest_clip(tensors: Mapping[str, torch.Tensor], precision: torch.dtype = torch.float32) -> str:
    """
    SHA-256 of CLIP's frozen tensors: of names, shapes and values, whatever dtype and device these values are in.

    Args:
        tensors: as [`select_clip`] gives them.
        precision: what the values are rounded to before.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", precision).float().contiguous()
        digest.update(f"{name}{[*tensor.shape]}".encode())
        digest.update(tensor.reshape(-1).numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def load_base(name_or_path: str, **hub_options: Any) -> CLIPModel:
    """The CLIP that `name_or_path` names, in float32, so that the values of any saved dtype are kept."""
    if os.path.isdir(name_or_path):
        hub_options.pop("revision", None)
    return CLIPModel.from_pretrained(name_or_path, dtype=torch.float32, **hub_options)


def record_base(config: SANConfig, name_or_path: str, clip: CLIPModel, revision: str | None = None) -> None:
    """Writes name, revision and digests of `clip` into the configuration of an adapter trained on it."""
    tensors = select_clip(clip.state_dict())
    is_folder = os.path.isdir(name_or_path)
    config.base_model_name_or_path = os.path.abspath(name_or_path) if is_folder else name_or_path
    config.base_model_revision = None if is_folder else revision or getattr(clip.config, "_commit_hash", None)
    config.base_model_sha256 = digest_clip(tensors)
    config.base_model_sha256_half = {
        name: digest_clip(tensors, precision) for name, precision in HALF_PRECISIONS.items()
    }


def check_base(config: SANConfig, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """
    Compares CLIP's tensors with the digests of the base that a configuration names.

    Args:
        config: of the adapter.
        tensors: as [`select_clip`] gives them. In half precision they have to be the base's, rounded.
        what: where they are from, for the error.

    Raises:
        ValueError: they are other values, or the configuration has no digest.
    """
    expected = config.base_model_sha256
    if expected is None:
        raise ValueError(
            f"This side adapter names no digest of its base '{config.base_model_name_or_path}' (base_model_sha256): "
            "whether it fits can't be told. Save it again with save_pretrained(folder, adapter_only=True)."
        )
    got = digest_clip(tensors)
    if got not in (expected, *(config.base_model_sha256_half or {}).values()):
        raise ValueError(
            f"{what} isn't the CLIP that this side adapter was trained on, '{config.base_model_name_or_path}': its "
            f"frozen tensors have the SHA-256 {got}, expected {expected} (base_model_sha256)."
        )


def describe_differences(tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> str:
    """Which tensors of a model are not its base's, and by how much: "3 of 197, ...; the largest difference is 0.1"."""
    largest, changed = 0.0, []
    for name in sorted({*tensors, *base}):
        if name not in tensors or name not in base or tensors[name].shape != base[name].shape:
            changed.append(name)
            continue
        value = tensors[name].detach().cpu()
        difference = (value.float() - base[name].to(value.dtype).float()).abs().max().item()
        if difference:
            changed.append(name)
            largest = max(largest, difference)
    shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    return f"{len(changed)} of {len(base)} tensors differ ({shown}), by at most {largest:.3g}"
