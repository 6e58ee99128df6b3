"""Loading a model that has all of its weights, or saying why not."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from san_hf.json_files import JSONError, parse_json, read_json
from san_hf.messages import join_some
from san_hf.modeling import SANConfig, SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.adapter_folder_san import SIDE_ADAPTER_FILE


# What Transformers would fill in by default where a saved file lacks it, and what then changes the result. (What
# changes a shape is noticed by the weights; None may be left out.)
CONFIG_FIELDS = (
    "clip_config",
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "fusion_layers",
    "recognition_layer",
    "deep_supervision_layers",
    "clip_image_scale",
    "recognition_token",
    "bias_pooling",
)
TOWER_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
# A tokenizer.json of CLIP's has 4 MB; an index of weights, or a vocabulary of 100,000 names, less than 30.
LARGEST_FILE = 100_000_000
WEIGHTS = ("*.safetensors", "*.bin")
# Beyond what the weights can hold: what is missing from smaller ones is named one by one.
SPARE_PARAMETERS = 100_000_000
# Files beside the weights; without any of these another tokenizer or processor would be made up.
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


class ModelError(ValueError):
    """A model that can't be loaded; the message says why, and what to do."""


def load_complete(
    location: str | os.PathLike, *, hub_options: dict[str, Any] | None = None, **kwargs: Any
) -> SANForSemanticSegmentation:
    """
    A SAN from a folder or a repository; complete, where Transformers would fill what is missing at random.

    Args:
        location: what `from_pretrained` of Transformers takes.
        hub_options: `cache_dir`, `revision`, `token`, `local_files_only`.
        **kwargs: for the model's `from_pretrained` (`dtype`, `device_map`, ...), or fields of its configuration.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: it is another kind of model, or its weights are incomplete.
        OSError: there is no such model, or it can't be reached.
    """
    location = os.fspath(location)
    hub_options = hub_options or {}
    saved = SANConfig.get_config_dict(location, **hub_options)[0]
    if (model_type := saved.get("model_type")) != SANConfig.model_type:
        models = (os.path.join(location, name) for name in ("best", "final"))
        inside = next((model for model in models if os.path.isfile(os.path.join(model, "config.json"))), None)
        hint = f" It is a training's output, and holds one: '{inside}'." if inside else ""
        raise ModelError(
            f"'{location}' is no SAN: expected a config.json of model_type {SANConfig.model_type!r}, got "
            f"{model_type!r}.{hint}"
        )
    clip_config = saved.get("clip_config") or {}
    lacking = [name for name in CONFIG_FIELDS if name not in saved and name not in kwargs]
    for tower in ("text_config", "vision_config"):
        fields = (*TOWER_FIELDS, "eos_token_id") if tower == "text_config" else TOWER_FIELDS
        part = clip_config.get(tower) or {}
        lacking += [f"clip_config.{tower}.{name}" for name in fields if name not in part]
    if lacking and "config" not in kwargs:
        raise ModelError(
            f"'{location}' has no complete config.json: it lacks {join_some(lacking)}, which would be guessed. Get the "
            "folder again, or add them."
        )
    if os.path.isdir(location) and "config" not in kwargs:
        _check_size(SANConfig.from_pretrained(location, **_config_fields(kwargs)), Path(location))
    model, info = SANForSemanticSegmentation.from_pretrained(
        location, output_loading_info=True, ignore_mismatched_sizes=True, **hub_options, **kwargs
    )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    wrong = sorted({*info["missing_keys"], *mismatched})
    if changed := [name for name in kwargs if name in saved and saved[name] != kwargs[name] and name != "dtype"]:
        if wrong:
            raise ModelError(
                f"{changed[0]} can't be changed: '{location}' has weights for {changed[0]}={saved[changed[0]]!r:.80}, "
                f"got {kwargs[changed[0]]!r:.80}. What gives weights other shapes ({join_some(wrong, 3)}) is decided "
                "before training: SANForSemanticSegmentation.from_clip starts a new one."
            )
    if wrong:
        raise ModelError(
            f"'{location}' doesn't hold a complete SAN: its weights lack these, or have them in another shape: "
            f"{join_some(wrong)}. Get the folder again, or load it with SANForSemanticSegmentation.from_pretrained to "
            "train what is missing."
        )
    return model


def _config_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in arguments if name in SANConfig.__dataclass_fields__ and name != "dtype"}


def _check_size(config: SANConfig, folder: Path) -> None:
    """
    Refuses a configuration of far more parameters than the folder's weights can hold: the model is made before its
    weights are looked at, and would take all of the memory.

    Raises:
        ModelError: it is one.
    """
    vision, text = config.clip_vision_config, config.clip_text_config
    # The CLIP under a side adapter is elsewhere, and compared with the configuration there.
    parts = (config,) if (folder / SIDE_ADAPTER_FILE).is_file() else (config, vision, text)
    # Attention has four square matrices in each layer, the MLP two.
    parameters = sum(
        part.num_hidden_layers * part.hidden_size * (4 * part.hidden_size + 2 * part.intermediate_size)
        for part in parts
    )
    parameters += text.vocab_size * text.hidden_size if text in parts else 0
    stored = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))
    # Four bits for each at least.
    if parameters > 2 * stored + SPARE_PARAMETERS:
        raise ModelError(
            f"'{folder / 'config.json'}' describes a model of at least {parameters:,} parameters, and the weights "
            f"beside it have {stored:,} bytes: they aren't of one model. Get the folder again."
        )


def check_processor(processor: SANProcessor, config: SANConfig, location: str | os.PathLike) -> None:
    """
    Refuses a processor that isn't the model's: its class names would be other tokens, without a word.

    Args:
        processor: what was loaded.
        config: the model's configuration.
        location: where both are from; of a folder, its files are looked at, too.

    Raises:
        ModelError: a file or setting is missing, or doesn't fit the model.
    """
    folder = Path(location)
    problems = []
    if folder.is_dir():
        missing = [name for name in PROCESSOR_FILES if not (folder / name).is_file()]
        slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        problems += [f"it has no {name}" for name in missing if not (name == "tokenizer.json" and slow)]
        if not missing:
            saved = read_json(folder / "processor_config.json")
            images = isinstance(saved, dict) and saved.get("image_processor") or {}
            for name in ("size", "image_mean", "image_std"):
                if name not in images:
                    problems.append(f"processor_config.json has no {name} in image_processor")
    check_tokenizer(processor.tokenizer, config, location, problems)


def check_tokenizer(
    tokenizer: Any, config: SANConfig, location: str | os.PathLike, problems: Sequence[str] = ()
) -> None:
    """
    Refuses a tokenizer that isn't the model's.

    Args:
        tokenizer: what was loaded.
        config: the model's configuration.
        location: where it is from.
        problems: what else is wrong there.

    Raises:
        ModelError: a setting doesn't fit the model, or something was wrong already.
    """
    text, problems = config.clip_text_config, list(problems)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        model = parse_json(backend.to_str(), "its tokenizer")["model"]
        problems += _lost_tokens(set(model["vocab"]) - set(tokenizer.all_special_tokens), model.get("merges") or ())
    if len(tokenizer) != text.vocab_size:
        problems.append(f"its tokenizer has {len(tokenizer)} tokens, expected {text.vocab_size} (vocab_size)")
    # 2 stands for the highest id, in configurations of old.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    ids = tokenizer("a").input_ids
    if tokenizer.eos_token_id != end or not ids or ids[-1] != end:
        problems.append(f"its tokenizer ends texts with token {ids[-1:]}, expected {end} (eos_token_id)")
    if ids[:1] != [tokenizer.bos_token_id] or text.bos_token_id not in (None, 0, tokenizer.bos_token_id):
        problems.append(f"its tokenizer begins texts with token {ids[:1]}, expected {text.bos_token_id} (bos_token_id)")
    for side in ("padding_side", "truncation_side"):
        if getattr(tokenizer, side) != "right":
            problems.append(f"its tokenizer's {side} is {getattr(tokenizer, side)!r}, expected 'right'")
    if not 3 <= tokenizer.model_max_length <= text.max_position_embeddings:
        problems.append(
            f"its tokenizer's model_max_length is {tokenizer.model_max_length}, expected at most "
            f"{text.max_position_embeddings} (max_position_embeddings)"
        )
    if problems:
        raise ModelError(
            f"The processor of '{location}' isn't this model's: {'; '.join(problems)}. Get the whole folder again, or "
            "save the right processor into it: processor.save_pretrained(folder)."
        )


def _lost_tokens(vocabulary: set[str], merges: Sequence[Any]) -> Iterator[str]:
    """
    What a byte-pair encoding lacks. Each merge makes a token of two, and each token of several letters is made by a
    merge: a list that was cut short would give other tokens without a word.
    """
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made = {"".join(pair) for pair in pairs}
    unmade = sorted(token for token in vocabulary - made if len(token.removesuffix("</w>")) > 1)
    if unmade and not merges:
        yield "its tokenizer has no merges"
    elif unmade:
        yield f"its tokenizer has no merges for {len(unmade):,} of its tokens ({join_some(unmade, 3)})"
    if unknown := sorted(made.union(*pairs) - vocabulary):
        yield f"its tokenizer lacks {len(unknown):,} tokens of its merges ({join_some(unknown, 3)})"


def damage(folder: str | os.PathLike) -> str | None:
    """What stands in a model folder in place of a file's content, with what to do; `None` if nothing is seen."""
    for path in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else ():
        if path.suffix in (".json", ".safetensors") and path.is_file() and (problem := foreign_content(path)):
            return f"{path} {problem}"
    return None


def foreign_content(path: str | os.PathLike) -> str | None:
    """
    What a file holds instead of what its name says, with what to do: "is a Git LFS pointer, ...".

    Args:
        path: of JSON (.json), of weights (.safetensors), or of anything.

    Returns:
        `None` if it looks as its name says.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in the repository."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (perhaps an error, or a page to log in): download the file itself again."
    if not head:
        return "is empty: download it again."
    if path.suffix == ".json":
        try:
            if not isinstance(read_json(path, LARGEST_FILE), dict):
                return "is no JSON of this kind: expected an object in braces. Get it again."
        except JSONError as error:
            return str(error).removeprefix(f"'{path}' ")
    if path.suffix == ".safetensors":
        size, length = path.stat().st_size, int.from_bytes(head[:8], "little")
        if size < 8 or length > size - 8 or head[8:9] != b"{":
            return "holds no safetensors weights, or is cut short: download it again."
    return None
