"""What a side adapter's folder holds: reading it, completing it with its base, and writing its parts.

A side adapter is all of SAN that isn't frozen: the side network, the mask decoder, CLIP's position embeddings (trained
even where CLIP is frozen), the no-object embedding, the embeddings of a carried vocabulary, and LoRA weights of CLIP
if there are any.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from .base_clip_san import check_base, clip_name, load_base, select_clip
from .configuration_san import SANConfig
from .image_processing_san import SANImageProcessor
from .processing_san import SANProcessor


SIDE_ADAPTER_FILE = "side_adapter.safetensors"
WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (WHOLE_FILE, INDEX_FILE, "pytorch_model.bin")
PROCESSOR_FILE = "processor_config.json"
LORA_FOLDER, LORA_FILE = "lora", "adapter_model.safetensors"
# What CLIP's tensors don't tell, and sizes that would be allocated before they are compared with the tensors.
TOWER_FIELDS = (
    *("hidden_act", "layer_norm_eps", "num_attention_heads"),
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
)
# What says where a file of a checkpoint is, among the arguments of `from_pretrained`.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def select_side_adapter(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a `SANForSemanticSegmentation` that belong to its side adapter; LoRA's are not among them."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state_dict.items()
        if ".lora_" not in name and clip_name(name) is None
    }


# ---- one folder


def find_file(location: str, name: str, **where: Any) -> str | None:
    """The local path of a file in a folder or repository, downloaded if need be; None if there is none."""
    if os.path.isdir(location):
        path = os.path.join(location, where.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(
            location,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
    except OSError:  # neither a folder nor a repository any more
        return None


def find_side_adapter(name_or_path: str | os.PathLike, config: dict[str, Any], **where: Any) -> str | None:
    """
    The path of `side_adapter.safetensors` in a folder or repository, downloaded if need be; None if there is none.

    Args:
        name_or_path: the folder or repository.
        config: what its `config.json` holds. One that names no base has no side adapter to look for.
        **where: of [`HUB_ARGUMENTS`].

    Raises:
        ValueError: a folder has the weights of a whole model as well.
    """
    name_or_path = os.fspath(name_or_path)
    if os.path.isdir(name_or_path):
        folder = os.path.join(name_or_path, where.get("subfolder") or "")
        path = os.path.join(folder, SIDE_ADAPTER_FILE)
        if not os.path.isfile(path):
            return None
        if whole := [name for name in WEIGHT_FILES if os.path.isfile(os.path.join(folder, name))]:
            raise ValueError(
                f"'{folder}' has both a side adapter ({SIDE_ADAPTER_FILE}) and a whole model ({whole[0]}): remove one."
            )
        return path
    return find_file(name_or_path, SIDE_ADAPTER_FILE, **where) if config.get("base_model_name_or_path") else None


def find_lora(name_or_path: str | os.PathLike, config: SANConfig, **where: Any) -> str | None:
    """The local folder of the LoRA weights that belong to a side adapter, downloaded if need be; None without them."""
    if config.lora_folder is None:
        return None
    where = {**where, "subfolder": "/".join(filter(None, (where.get("subfolder"), config.lora_folder)))}
    for name in ("adapter_config.json", LORA_FILE):
        path = str(cached_file(name_or_path, name, **where))
    return os.path.dirname(path)


def complete_with_base(
    config: SANConfig, adapter_file: str, base_model: str | None = None, **hub_options: Any
) -> dict[str, torch.Tensor]:
    """
    All tensors of a `SANForSemanticSegmentation`: a side adapter's, and those of its base.

    Args:
        config: the adapter's; it names the base and its digest.
        adapter_file: path of its `side_adapter.safetensors`.
        base_model: where the base is, if neither where the configuration says nor, of a folder, beside the adapter's.
        **hub_options: `cache_dir`, `token`, `local_files_only`, ... for the base.

    Raises:
        OSError: the base isn't there, or can't be reached.
        ValueError: what is there isn't the base.
    """
    name = base_model or config.base_model_name_or_path
    if name is None:
        raise ValueError(
            f"'{adapter_file}' is a side adapter whose config.json names no CLIP (base_model_name_or_path): say which "
            "one with base_model=."
        )
    revision = config.base_model_revision if base_model is None else None
    if os.path.isabs(name) and not os.path.isdir(name):
        # Both folders have moved together, perhaps to another machine. The digest tells whether it is the same CLIP.
        beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(adapter_file))), os.path.basename(name))
        if base_model is not None or not os.path.isdir(beside):
            raise OSError(
                f"'{adapter_file}' is a side adapter on the CLIP in the folder '{name}', which isn't here. Put that "
                f"folder where it was or beside the adapter's ('{beside}'), or say where it is with base_model=."
            )
        name = beside
    try:
        clip = load_base(name, revision=revision, **hub_options)
    except OSError as error:
        raise OSError(
            f"'{adapter_file}' is a side adapter on the CLIP '{name}', which can't be loaded: "
            f"{' '.join(str(error).split())} If that CLIP is elsewhere, say where with base_model=."
        ) from error
    base = select_clip(clip.state_dict())
    check_base(config, base, f"'{name}'")
    check_sizes(config.clip_config, clip.config, f"'{adapter_file}'")
    inner = ("vision_model.", "visual_projection.")
    whole = {f"model.{key}" if key.startswith(inner) else key: tensor for key, tensor in base.items()}
    return whole | read_tensors(adapter_file)


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """
    Raises:
        OSError: it can't be read, or isn't a safetensors file.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"'{file}' can't be read: {error}. Get the folder again.") from error


def check_sizes(described: Any, clip: Any, location: str) -> None:
    """
    Refuses a configuration of a CLIP of other sizes, or that computes otherwise, than the one that is there.

    Args:
        described, clip: `CLIPConfig`, of the side adapter and of its base.
        location: of the side adapter, for the error.

    Raises:
        ValueError: they differ.
    """
    for tower in ("vision_config", "text_config"):
        for field in TOWER_FIELDS:
            its, mine = (getattr(getattr(config, tower), field) for config in (described, clip))
            if its != mine:
                raise ValueError(f"{location} has CLIP's {tower}.{field} = {its!r}, and the CLIP there {mine!r}.")


def find_processor(config: SANConfig, name_or_path: str | None, **hub_options: Any) -> SANProcessor:
    """The processor of where a model was loaded from; else a new one, with the tokenizer of its base."""
    base = str(config.base_model_name_or_path)
    # One that is there and can't be read is an error: another would prepare images and names otherwise.
    if name_or_path and name_or_path != base and find_file(name_or_path, PROCESSOR_FILE, **hub_options) is not None:
        return SANProcessor.from_pretrained(name_or_path, **hub_options)
    size = {"shortest_edge": config.image_size, "longest_edge": 4 * config.image_size}
    if config.base_model_name_or_path is None:
        raise ValueError(
            "The model's processor isn't known, as the model was neither loaded from a folder that has one nor made "
            "from a CLIP: give it, processor=..."
        )
    tokenizer = AutoTokenizer.from_pretrained(base, revision=config.base_model_revision, **hub_options)
    return SANProcessor(SANImageProcessor(size=size, ignore_index=config.semantic_loss_ignore_index), tokenizer)


# ---- LoRA of CLIP beside a side adapter


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has wrapped."""
    if not getattr(model, "peft_config", None):
        return []
    try:  # else PEFT would be needed for loading the code of any checkpoint
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def active_lora(model: nn.Module) -> tuple[str, ...]:
    """Names of the PEFT adapters that are in force."""
    layers = lora_layers(model)
    return tuple(layers[0].active_adapters) if layers and not layers[0].disable_adapters else ()


def activate_lora(model: nn.Module, names: tuple[str, ...]) -> None:
    """Has these PEFT adapters in force, and no others."""
    for layer in lora_layers(model):
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(list(names))


def lora_tensors(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the PEFT adapter in force, by the names that PEFT saves them by; none without one."""
    if not (names := active_lora(model)):
        return {}
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"LoRA weights are saved by PEFT: pip install peft ({error})") from error
    if len(names) > 1:
        raise ValueError(f"Several PEFT adapters are in force, {', '.join(names)}, and one can be saved: set_adapter.")
    weights = get_peft_model_state_dict(model, state_dict=dict(state_dict), adapter_name=names[0])
    return {f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in weights.items()}


def save_lora(model: nn.Module, folder: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Writes the PEFT adapter in force as PEFT does: `adapter_config.json` and `adapter_model.safetensors`."""
    tensors = lora_tensors(model, state_dict)
    os.makedirs(folder, exist_ok=True)
    peft_configs: Any = model.peft_config
    peft_config = copy.copy(peft_configs[active_lora(model)[0]])
    peft_config.base_model_name_or_path = None  # the folder that the model came from, which may be on this machine only
    peft_config.save_pretrained(folder)
    save_file(tensors, os.path.join(folder, LORA_FILE), metadata={"format": "pt"})


def load_lora(model: Any, folder: str, name: str = "default") -> None:
    """
    Puts the LoRA weights of a folder on CLIP, trainable and in force.

    Args:
        model: a `SANForSemanticSegmentation`.
        folder: as [`save_lora`] writes it.
        name: what to call them.

    Raises:
        ValueError: see [`restore_lora`].
    """
    # Transformers' own load_adapter (5.23) doesn't know all of PEFT's names, and leaves DoRA's magnitudes as new.
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(f"'{folder}' holds LoRA weights, which PEFT loads: pip install peft ({error})") from error
    peft_config = PeftConfig.from_pretrained(folder)
    peft_config.inference_mode = False
    model.add_adapter(peft_config, name)
    restore_lora(model, folder, name)


def restore_lora(model: nn.Module, folder: str | os.PathLike, name: str) -> None:
    """
    Gives LoRA weights that are on a model the values of a folder.

    Raises:
        ValueError: the installed PEFT doesn't find a place for all of them, or not all that the model needs are there.
    """
    try:
        from peft import set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"'{folder}' holds LoRA weights, which PEFT loads: pip install peft ({error})") from error
    tensors = read_tensors(os.path.join(folder, LORA_FILE))
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    result: Any = set_peft_model_state_dict(model, tensors, name)
    wrong = [key for key in result.missing_keys if ".lora_" in key and f".{name}" in key] + result.unexpected_keys
    if wrong:
        raise ValueError(
            f"'{folder}' doesn't fit the model: {len(wrong)} LoRA tensors are missing or unknown "
            f"({', '.join(wrong[:3])}). Get the folder again, or install the version of PEFT that wrote it."
        )


def check_lora_of_clip(folder: str) -> None:
    """
    Raises:
        ValueError: LoRA weights of a folder are of the side adapter's own layers, too, which change places.
    """
    names = [name.removeprefix("base_model.model.") for name in read_tensors(os.path.join(folder, LORA_FILE))]
    own = sorted({layer for name in names if clip_name(f"{(layer := name.split('.lora_')[0])}.weight") is None})
    if own:
        raise ValueError(
            f"'{folder}' has LoRA weights of {len(own)} of the side adapter's own layers ({', '.join(own[:3])}), which "
            "can't be used beside other side adapters: load it with from_pretrained, or train LoRA on CLIP's layers "
            "alone, such as target_modules=['q_proj', 'v_proj']."
        )


def check_peft(model: nn.Module) -> None:
    """
    Refuses what PEFT has put on a model and can't be saved with it.

    Raises:
        ValueError: other methods than LoRA, or copies of modules in their place.
    """
    peft_configs: Any = getattr(model, "peft_config", None) or {}
    for name, config in peft_configs.items():
        if (method := getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ValueError(
                f"The model has PEFT's {method} on it ({name!r}), and LoRA (DoRA, too) is all that is saved beside a "
                f"side adapter: delete_adapter({name!r}), or keep its weights apart, by PEFT."
            )
        if copied := getattr(config, "modules_to_save", None):
            raise ValueError(
                f"PEFT trains copies of {', '.join(copied)} (modules_to_save of {name!r}), which would be lost: leave "
                "modules_to_save out of LoraConfig. The side adapter itself is trained beside LoRA."
            )


@contextmanager
def keep_trainable(model: nn.Module) -> Iterator[None]:
    """PEFT freezes all but what it adds. What was trainable outside CLIP stays so, or becomes it again."""
    trainable = [
        parameter for name, parameter in model.named_parameters() if parameter.requires_grad and clip_name(name) is None
    ]
    yield
    for parameter in trainable:
        parameter.requires_grad_(True)
