"""The CLIP that a side adapter was trained on: its digest, and finding it again.

A side adapter's folder holds what was trained and names its base, as PEFT's adapters do. With another CLIP than its own
an adapter gives masks and classes that look possible and are wrong, so a digest of the base goes with the name.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPModel
from transformers.utils import cached_file

from .configuration_san import SANConfig


# CLIP's own parts, by the names that they have in CLIPModel. SAN has some of them in its inner model.
CLIP_PARTS = ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale")
# Trained with the adapter even where CLIP is frozen, as in the original: it is the adapter's.
POSITION_EMBEDDING = "vision_model.embeddings.position_embedding.weight"
HALF_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def clip_name(name: str) -> str | None:
    """The name in CLIPModel of a frozen tensor of a SAN model, of one that LoRA adapts, too; None for all others."""
    name = name.removeprefix("model.").replace(".base_layer.", ".")
    is_clip = name.split(".")[0] in CLIP_PARTS and name != POSITION_EMBEDDING
    return name if is_clip and ".lora_" not in name and not name.endswith(".position_ids") else None


def select_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The frozen tensors among those of a SAN or CLIP model, by their names in CLIPModel."""
    tensors = {clip: tensor for name, tensor in state_dict.items() if (clip := clip_name(name)) is not None}
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())  # engines that spread it give it a dimension
    return tensors


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
    """The CLIP that `name_or_path` names, in the dtype that it is saved in."""
    if os.path.isdir(name_or_path):
        hub_options.pop("revision", None)
    return CLIPModel.from_pretrained(name_or_path, dtype="auto", **hub_options)


def find_commit(name_or_path: str, **hub_options: Any) -> str | None:
    """The commit of a repository whose files are in the cache; None for a folder."""
    if os.path.isdir(name_or_path):
        return None
    path = cached_file(name_or_path, "config.json", **hub_options)
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
    return found[1] if found else None


def record_base(config: SANConfig, name_or_path: str, clip: CLIPModel, **hub_options: Any) -> None:
    """Writes name, revision and digests of `clip` into the configuration of an adapter trained on it."""
    tensors = select_clip(clip.state_dict())
    is_folder = os.path.isdir(name_or_path)
    config.base_model_name_or_path = os.path.abspath(name_or_path) if is_folder else name_or_path
    config.base_model_revision = find_commit(name_or_path, **hub_options)
    config.base_model_sha256 = digest_clip(tensors)
    config.base_model_sha256_half = {
        name: digest_clip(tensors, precision) for name, precision in HALF_PRECISIONS.items()
    }


def check_base(config: SANConfig, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """
    Compares CLIP's tensors with the digest of the base that a configuration names.

    Args:
        config: of the adapter.
        tensors: as [`select_clip`] gives them. Those in half precision may also be the base's, rounded.
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
    dtype = str(tensors["visual_projection.weight"].dtype).removeprefix("torch.")
    got, rounded = digest_clip(tensors), (config.base_model_sha256_half or {}).get(dtype)
    if got not in (expected, rounded):
        raise ValueError(
            f"{what} isn't the CLIP that this side adapter was trained on, '{config.base_model_name_or_path}': its "
            f"frozen tensors have the SHA-256 {got}, expected {rounded or expected}."
        )


def describe_differences(tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> str | None:
    """
    Which tensors of a model are not its base's, and by how much: "3 of 197 tensors differ, ...".

    Args:
        tensors, base: as [`select_clip`] gives them. The base's are rounded to the other's dtype.

    Returns:
        None if all are equal.
    """
    largest, changed = 0.0, []
    for name in sorted({*tensors, *base}):
        if name not in tensors or name not in base or tensors[name].shape != base[name].shape:
            changed.append(name)
        elif difference := _largest_difference(tensors[name].detach().cpu(), base[name]):
            changed.append(name)
            largest = max(largest, difference)
    shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    return f"{len(changed)} of {len(base)} tensors differ, by at most {largest:.3g}: {shown}" if changed else None


def _largest_difference(value: torch.Tensor, base: torch.Tensor) -> float:
    return (value.float() - base.to(value.dtype).float()).abs().max().item()
