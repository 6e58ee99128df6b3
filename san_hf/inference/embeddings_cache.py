"""Embeddings of class names in memory and on disk: a text tower encodes each name once per set of templates.

A file keeps the embeddings of one text tower, known by all bits of its weights, in one precision. It begins with a
checksum: a damaged one counts as none. Processes that write to it take turns, and each adds to what is there.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from huggingface_hub import constants
from safetensors.torch import load, save
from torch import nn
from transformers.processing_utils import TextKwargs

from san_hf.files import json_text, write_file
from san_hf.locks import locked
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.base_clip_san import digest_clip
from san_hf.modeling.fast_linear_san import fast_linear, is_exact
from san_hf.modeling.prompts_san import split_templates
from san_hf.modeling.text_san import check_class_names, clean_text, may_be_misread
from san_hf.paths import expand_path


# The folder for the files, or "off" for no cache at all; `$HF_HOME/san_hf/embeddings` by default.
VARIABLE = "SAN_HF_EMBEDDINGS_CACHE"
FILE_ENDING = ".embeddings"
# In a file, the latest: 20 MB for a ViT-B/16 in float32. Longer vocabularies are not kept.
MOST_NAMES = 10_000
# Of all files, the latest used; and how many of them are in memory.
MOST_BYTES = 256 * 2**20
MOST_IN_MEMORY = 4

# A part of the key; changes with how class embeddings are computed.
_FORMAT = 1
# Modules that compute from their parameters and nothing else; adapters and quantisers bring their own.
_PLAIN_CODE = ("torch.nn.modules.", "transformers.models.clip.", "transformers.activations")
_DIGEST_SIZE = 16
_in_memory: dict[Path, "_Embeddings"] = {}
_text_digests: dict[str, str] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class _Embeddings:
    """
    Class embeddings of N names by one text tower.

    Attributes:
        names: (N, 16) uint8, digests of each name's prompts.
        tokens: (N, 16) uint8, digests of the prompts' token ids.
        embeds: (N, D), on the CPU.
        text_digest: of the text tower, see [`text_tower_digest`].
        stamp: of the file that they are from.
    """

    names: np.ndarray
    tokens: np.ndarray
    embeds: torch.Tensor
    text_digest: str
    stamp: tuple[int, int] | None = None
    row_of: dict[bytes, int] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "row_of", {name.tobytes(): row for row, name in enumerate(self.names)})

    def select(self, rows: list[int]) -> "_Embeddings":
        return replace(self, names=self.names[rows], tokens=self.tokens[rows], embeds=self.embeds[rows])

    def extended(self, other: "_Embeddings") -> "_Embeddings":
        """With those of another one that are new here, at the end."""
        new = other.select([row for name, row in other.row_of.items() if name not in self.row_of])
        return replace(
            self,
            names=np.concatenate([self.names, new.names]),
            tokens=np.concatenate([self.tokens, new.tokens]),
            embeds=torch.cat([self.embeds, new.embeds]),
        )


def cache_folder() -> Path | None:
    """Where embeddings are kept, or None if they aren't to be."""
    setting = os.environ.get(VARIABLE)
    if setting == "off":
        return None
    return Path(expand_path(setting)) if setting else Path(constants.HF_HOME) / "san_hf" / "embeddings"


def encode_class_names(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    class_names: Sequence[str],
    templates: str | Sequence[str] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[torch.Tensor, str]:
    """
    Embeddings of class names: those that are kept, and the others encoded, and kept from then on.

    Nothing is kept of a text tower that is trained, adapted (LoRA) or quantised.

    Args:
        model: on its device.
        processor: the model's.
        class_names: in the order of the rows.
        templates: see [`SANProcessor`].
        autocast: gives a context manager to run the text tower in.

    Returns:
        (N, D) on the model's device, and the text tower's digest, see [`text_tower_digest`].

    Raises:
        ValueError: names or templates that the processor refuses.
    """
    folder = cache_folder()

    def encode(input_ids: torch.Tensor) -> torch.Tensor:
        with fast_linear(model.device):
            return model.get_class_embeds(input_ids.to(model.device))

    with torch.inference_mode(), autocast():
        key = None if folder is None or len(class_names) > MOST_NAMES else _key(model, processor)
        if folder is None or key is None:
            inputs = processor(text=class_names, prompt_templates=templates)
            return encode(inputs["input_ids"]), text_tower_digest(model)

        names = check_class_names(class_names, "text")
        pairs = split_templates(processor.prompt_templates if templates is None else templates)
        prompts = [[clean_text(before + name + after) for before, after in pairs] for name in names]
        digests = [_digest(json_text(group).encode()) for group in prompts]
        file = folder / f"{key}{FILE_ENDING}"
        kept = _open(file)
        new = [index for index, digest in enumerate(digests) if kept is None or digest not in kept.row_of]
        if kept is None or new:
            inputs = processor(text=[names[index] for index in new], prompt_templates=templates)
            ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(-1)
            encoded = _Embeddings(
                names=_as_rows(digests[index] for index in new),
                tokens=_as_rows(map(_digest_tokens, ids.numpy(), lengths.numpy())),
                embeds=encode(ids).cpu(),
                text_digest=text_tower_digest(model) if kept is None else kept.text_digest,
            )
            # What the processor warns of, it is to warn of each time.
            limit = _text_options(processor.tokenizer).get("max_length") or processor.tokenizer.model_max_length
            is_cut = lengths.amax(-1) >= limit
            clear = [row for row, i in enumerate(new) if not (is_cut[row] or any(map(may_be_misread, prompts[i])))]
            _keep(file, encoded.select(clear))
            kept = encoded if kept is None else kept.extended(encoded)
        rows = [kept.row_of[digest] for digest in digests]
        if len(np.unique(kept.tokens[rows], axis=0)) < len(names):
            processor(text=names, prompt_templates=templates)  # refuses names of equal tokens
        return kept.embeds[rows].to(model.device), kept.text_digest


def text_tower_digest(model: SANForSemanticSegmentation) -> str:
    """
    SHA-256, in hexadecimal digits, of the parameters that class embeddings depend on, rounded to bfloat16: it is the
    same in whatever precision the same weights were loaded.
    """
    parameters = _text_parameters(model)
    exact = _digest_parameters(parameters)
    if exact not in _text_digests:
        if len(_text_digests) == MOST_IN_MEMORY:
            _text_digests.clear()
        _text_digests[exact] = digest_clip(parameters, torch.bfloat16)
    return _text_digests[exact]


def _text_parameters(model: SANForSemanticSegmentation) -> dict[str, torch.Tensor]:
    parts = {"text_model": model.text_model, "text_projection": model.text_projection}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.named_parameters()}


def _digest_parameters(parameters: Mapping[str, torch.Tensor]) -> str:
    """Of all bits; not cryptographic, but it takes 10 milliseconds for the 250 MB of a ViT-B/16's text tower."""
    digest = xxhash.xxh3_128()
    for name, parameter in parameters.items():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(model: SANForSemanticSegmentation, processor: SANProcessor) -> str | None:
    """The name of the file for what a model computes of a prompt; None if its parameters don't tell it all."""
    text_model, tokenizer = model.text_model, processor.tokenizer
    config, device = text_model.config, model.device.type
    modules = [*text_model.modules(), *model.text_projection.modules()]
    if not all(map(_is_plain, modules)) or (text_model.training and config.attention_dropout):
        return None
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    rules = tokenizer.backend_tokenizer.to_str()
    facts = {
        "format": _FORMAT,
        "parameters": _digest_parameters(_text_parameters(model)),
        "config": [config.num_attention_heads, config.hidden_act, config.layer_norm_eps, text_model.eos_token_id],
        # What comes before, padding and truncation, changes with each call.
        "tokenizer": _digest((rules.partition('"added_tokens"')[2] or rules).encode()).hex(),
        "options": {"model_max_length": tokenizer.model_max_length, **_text_options(tokenizer)},
        "computed": [device, config._attn_implementation, _precision(device)],
        "autocast": torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device)),
    }
    return _digest(json_text(facts).encode()).hex()


def _precision(device: str) -> str:
    """What float32 products are computed in, as far as PyTorch's settings say."""
    backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
    setting = backend.matmul.fp32_precision
    # Another thread may be within `fast_linear`.
    is_float32 = setting in ("none", "ieee") or (device == "cpu" and is_exact())
    return "ieee" if is_float32 else setting


def _is_plain(module: nn.Module) -> bool:
    is_stock = type(module).__module__.startswith(_PLAIN_CODE) and "forward" not in vars(module)
    return (
        is_stock
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and all(
            type(parameter) is nn.Parameter and not parameter.requires_grad and not parameter.is_meta
            for parameter in module.parameters(recurse=False)
        )
    )


def _text_options(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer brings along of the options of a call."""
    return {name: value for name, value in tokenizer.init_kwargs.items() if name in TextKwargs.__annotations__}


def _digest(content: bytes) -> bytes:
    return xxhash.xxh3_128_digest(content)


def _digest_tokens(ids: np.ndarray, lengths: np.ndarray) -> bytes:
    """Of a name's (templates, tokens), whatever they are padded to."""
    return _digest(json_text([row[:length].tolist() for row, length in zip(ids, lengths)]).encode())


def _as_rows(digests) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST_SIZE)


def _open(file: Path) -> _Embeddings | None:
    """What is kept in a file, from memory if it hasn't changed; None if there is nothing."""
    with _lock:
        kept, stamp = _in_memory.get(file), _stamp(file)
        if stamp is not None and (kept is None or kept.stamp != stamp):
            with suppress(OSError):
                os.utime(file)
            kept = _read(file) or kept
        if kept is not None:
            _remember(file, kept)
    return kept


def _remember(file: Path, kept: _Embeddings) -> None:
    _in_memory.pop(file, None)
    _in_memory[file] = kept  # the latest used is the last
    if len(_in_memory) > MOST_IN_MEMORY:
        del _in_memory[next(iter(_in_memory))]


def _keep(file: Path, encoded: _Embeddings) -> None:
    """Adds embeddings to a file, or to what is in memory where files can't be written."""
    with _lock:
        kept = _latest(_in_memory.get(file), encoded)
        with suppress(OSError):  # a folder that is read-only, or a full disk
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file.with_suffix(".lock"), "Keeping embeddings", wait=True):
                together = _latest(_read(file), encoded)
                _write(file, together)
                kept = replace(together, stamp=_stamp(file))
            _limit_size(file.parent)
        _remember(file, kept)


def _latest(kept: _Embeddings | None, encoded: _Embeddings) -> _Embeddings:
    kept = encoded if kept is None else kept.extended(encoded)
    return kept.select([*range(len(kept.names))][-MOST_NAMES:])


def _read(file: Path) -> _Embeddings | None:
    """None of a file that isn't there or is damaged."""
    try:
        stamp, content = _stamp(file), file.read_bytes()
    except OSError:
        return None
    if _digest(content[_DIGEST_SIZE:]) != content[:_DIGEST_SIZE]:
        return None
    tensors = load(content[_DIGEST_SIZE:])
    names, tokens, text_digest = (tensors[name].numpy() for name in ("names", "tokens", "text_digest"))
    return _Embeddings(names, tokens, tensors["embeds"], text_digest.tobytes().decode(), stamp)


def _write(file: Path, kept: _Embeddings) -> None:
    arrays = (kept.names, kept.tokens, np.frombuffer(kept.text_digest.encode(), np.uint8))
    tensors = {name: torch.tensor(array) for name, array in zip(("names", "tokens", "text_digest"), arrays)}
    content = save({**tensors, "embeds": kept.embeds.contiguous()})
    write_file(file, _digest(content) + content)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _limit_size(folder: Path) -> None:
    """Removes the files that weren't used for the longest time."""
    files = sorted(((path.stat(), path) for path in folder.glob(f"*{FILE_ENDING}")), key=lambda file: file[0].st_mtime)
    total = sum(status.st_size for status, _ in files)
    for status, path in files[:-1]:
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= status.st_size
