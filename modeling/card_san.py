"""Cards of saved models: what is known of weights stays with these weights, and goes with no others.

A folder's README.md is the model's card. A model that is saved or pushed brings the card of where it was loaded from:
as it is if nothing changed, and otherwise with a notice that training and results are of the model it started from.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .adapter_folder_san import (
    INDEX_FILE,
    LORA_FILE,
    LORA_FOLDER,
    SIDE_ADAPTER_FILE,
    WHOLE_FILE,
    find_file,
    lora_tensors,
)
from .base_clip_san import check_base, clip_name, select_clip
from .configuration_san import SANConfig
from .processing_san import SANProcessor


CARD_FILE = "README.md"
PICTURE_FILE = "prediction.png"
RESULTS_FOLDER = ".eval_results"
CONTENTS_HEADING = "What is here"
LINK = re.compile(r"\]\(([^)\s]+)|\bsrc=[\"']([^\"']+)")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
CARD = """---
{metadata}
---

# {title}

{what} Nothing is said here about training data, licence and results.

You name the classes in plain words; the model labels every pixel with one of them.

```python
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoProcessor

model = AutoModelForSemanticSegmentation.from_pretrained({name}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
image = Image.open("photo.jpg")
inputs = processor(images=image, text=["cat", "grass", "sky"], return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```

## {heading}

{contents}
"""
LENT = "not of the weights here"
# What a card claims of weights, by our headings.
CLAIMS = re.compile(r"^#+ (Training|Results|Limits|Licence and citation|Where the weights come from)[ \t]*$", re.M)
EXAMPLE = re.compile(
    r"\b(AutoModelForSemanticSegmentation|AutoProcessor|SANForSemanticSegmentation|SANProcessor|Segmenter|san_hf)"
    r"\.from_pretrained\((\"(?:[^\"\\\n]|\\.)*\"(?:, revision=\"[^\"\n]*\")?)"
)
# What saving notes in a configuration and the function computed doesn't depend on.
NOTES = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "lora_folder"),
    *("base_model_name_or_path", "base_model_revision", "base_model_sha256", "base_model_sha256_half"),
    *("custom_pipelines", "freeze_clip", "freeze_positions", "output_attentions", "output_hidden_states"),
    *("return_dict", "processor_class"),
}


def is_hub_id(name: str | None) -> bool:
    """Whether a name is one of the Hub's ("owner/name", or "name" for the oldest), and no folder here."""
    name = name or ""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not os.path.isdir(name)


def name_example(text: str, name: str, revision: str | None = None) -> str:
    """A card whose example loads the model as `name`, rather than as what it was called before."""
    if (first := EXAMPLE.search(text)) is None:
        return text
    new = json.dumps(name, ensure_ascii=False) + ("" if revision is None else f', revision="{revision}"')
    return EXAMPLE.sub(lambda call: call[0].replace(call[2], new) if call[2] == first[2] else call[0], text)


def lend_card(text: str, origin: str, title: str | None = None) -> str:
    """
    A card for weights that the card's training, results and licence aren't of: it says so, and its metadata, which
    the Hub indexes, leaves them out.

    Args:
        text: the card.
        origin: whose they are, as in "of ...".
        title: of the model that gets the card, if it has another one.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.eval_results = data.license = data.model_name = None
    text = re.sub(rf"^!\[[^\n]*\]\({PICTURE_FILE}\)\n*", "", str(card), flags=re.M)
    if title is not None:
        text = re.sub(r"^# [^\n]*$", lambda _: f"# {title}", text, count=1, flags=re.M)
    text = CLAIMS.sub(lambda heading: f"{heading[0].rstrip()} of {origin}", text)
    if LENT in text:
        return text
    notice = f"> **Training, results and licence below are those of {origin}, {LENT}.**\n"
    end = re.search(r"^# [^\n]*\n", text, re.M)
    head = re.match(r"---\n.*?\n---\n", text, re.S)
    position = end.end() if end else head.end() if head else 0
    return f"{text[:position]}\n{notice}{'' if text[position:].startswith(chr(10)) else chr(10)}{text[position:]}"


def describe_contents(config: SANConfig, adapter_only: bool) -> str:
    """What a model's folder holds, for its card, in Markdown."""
    base = str(config.base_model_name_or_path)
    if not adapter_only:
        text = "The whole model, CLIP included"
    else:
        link = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{os.path.basename(base)}`"
        text = (
            f"What was trained (`{SIDE_ADAPTER_FILE}`), without the CLIP under it: `from_pretrained` fetches {link} "
            f"and compares the SHA-256 of its tensors, `{config.base_model_sha256}`"
        )
    text += "; configuration, code, processor and tokenizer."
    if config.lora_folder is not None:
        text += f" LoRA weights of CLIP, in PEFT's format, are in `{config.lora_folder}/`."
    if config.vocabulary_size:
        text += f" The model carries a vocabulary of {config.vocabulary_size} classes, and needs no text for these."
    return text


def new_card(config: SANConfig, name: str, adapter_only: bool) -> str:
    """A card that claims nothing."""
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="image-segmentation", tags=["san", "clip", "semantic-segmentation"]
    )
    if is_hub_id(config.base_model_name_or_path):
        metadata["base_model"] = config.base_model_name_or_path
        metadata["base_model_relation"] = "adapter" if adapter_only else "finetune"
    method = "[SAN](https://arxiv.org/abs/2302.12242) (Xu et al., 2023), for open-vocabulary semantic segmentation."
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=name.split("/")[-1],
        name=json.dumps(name, ensure_ascii=False),
        what=f"A side adapter of {method}" if adapter_only else method,
        heading=CONTENTS_HEADING,
        contents=describe_contents(config, adapter_only),
    )


def known_card(
    model: Any,
    folder: str,
    state_dict: Mapping[str, torch.Tensor],
    processor: SANProcessor | None = None,
    title: str | None = None,
) -> str | None:
    """
    The card of a model that is about to be saved in `folder`: that of the folder, else that of where the model was
    loaded from; lent, where weights, configuration or processor aren't the same. None if there is no card.

    Args:
        model: a `SANForSemanticSegmentation`.
        folder: where its files may be overwritten soon.
        state_dict: its tensors.
        processor: what is saved with it, if it is known.
        title: what to call it; by default as the folder.
    """
    file = os.path.join(folder, CARD_FILE)
    if os.path.isfile(file):
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
        weights = (WHOLE_FILE, INDEX_FILE, SIDE_ADAPTER_FILE)
        if not any(os.path.isfile(os.path.join(folder, name)) for name in weights):
            return text
        return text if is_saved(model, state_dict, folder, processor) else lend_card(text, "the weights before")
    origin = model.name_or_path
    where = {} if os.path.isdir(origin) else {"revision": getattr(model.config, "_commit_hash", None)}
    if not origin or (path := find_file(origin, CARD_FILE, **where)) is None:
        return None
    with open(path, encoding="utf-8") as opened:
        text = opened.read()
    if is_saved(model, state_dict, origin, processor, **where):
        return text
    text = lend_card(text, "the model it started from", title=title or os.path.basename(os.path.abspath(folder)))
    if is_hub_id(origin):
        card = ModelCard(text, ignore_metadata_errors=True)
        card.data["base_model"], card.data["base_model_relation"] = origin, "finetune"
        text = str(card)
    return text


def write_card(text: str, folder: str, config: SANConfig, adapter_only: bool) -> None:
    """Writes a card, made to say what its folder holds; results that aren't of the folder's weights are removed."""
    with open(os.path.join(folder, CARD_FILE), "w", encoding="utf-8") as file:
        file.write(fit_card(text, config, adapter_only))
    if LENT in text:
        shutil.rmtree(os.path.join(folder, RESULTS_FOLDER), ignore_errors=True)
        if os.path.isfile(picture := os.path.join(folder, PICTURE_FILE)):
            os.remove(picture)


def copy_shown_files(text: str, origin: str, folder: str) -> None:
    """Brings what belongs to a card from where it is from: results, and the pictures that it shows."""
    if LENT in text or not os.path.isdir(origin):
        return
    results = os.path.join(origin, RESULTS_FOLDER)
    if os.path.isdir(results) and os.path.abspath(origin) != os.path.abspath(folder):
        shutil.copytree(results, os.path.join(folder, RESULTS_FOLDER), dirs_exist_ok=True)
    for name in linked_pictures(text, origin):
        if not os.path.exists(target := os.path.join(folder, name)):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(origin, name), target)


def linked_pictures(text: str, folder: str) -> list[str]:
    """The pictures inside a folder that its card shows, by their path in it."""
    inside = os.path.realpath(folder) + os.sep
    return sorted(
        {
            name
            for name in (link or source for link, source in LINK.findall(text))
            if name.lower().endswith(PICTURE_ENDINGS)
            and os.path.isfile(path := os.path.join(folder, name))
            and os.path.realpath(path).startswith(inside)
            and os.path.normpath(name).replace(os.sep, "/") == name
        }
    )


def fit_card(text: str, config: SANConfig, adapter_only: bool) -> str:
    """A card that says what its folder holds, whatever form the model was saved in before."""
    section = rf"(^## {CONTENTS_HEADING}\n\n).*?(?=\n+## |\n*\Z)"
    contents = describe_contents(config, adapter_only)
    text = re.sub(section, lambda found: found[1] + contents, text, count=1, flags=re.M | re.S)
    card = ModelCard(text, ignore_metadata_errors=True)
    base, relation = config.base_model_name_or_path, card.data.get("base_model_relation")
    if adapter_only and is_hub_id(base) and (card.data.get("base_model"), relation) != (base, "adapter"):
        card.data["base_model"], card.data["base_model_relation"] = base, "adapter"
        return str(card)
    if not adapter_only and relation == "adapter":
        card.data["base_model_relation"] = "finetune"
        return str(card)
    return text


def is_saved(
    model: Any,
    state_dict: Mapping[str, torch.Tensor],
    location: str,
    processor: SANProcessor | None = None,
    **where: Any,
) -> bool:
    """
    Whether a folder or repository holds this very model: the same values in all tensors, whatever dtype they are stored
    in, and the same settings.

    Args:
        model: a `SANForSemanticSegmentation`.
        state_dict: its tensors.
        location: the folder, or the repository that it was loaded from.
        processor: its processor, if that is to be compared, too.
        **where: `revision`.
    """
    path = find_file(location, "config.json", **where)
    if path is None:
        return False
    try:
        saved = SANConfig.from_json_file(path)
    except (OSError, ValueError, TypeError):  # damaged
        return False
    if _settings(saved.to_dict()) != _settings(model.config.to_dict()):
        return False
    if processor is not None and find_file(location, "processor_config.json", **where) is not None:
        try:
            mine, its = processor, SANProcessor.from_pretrained(location, **where)
        except (OSError, ValueError):
            return False
        if _settings(json.loads(mine.to_json_string())) != _settings(json.loads(its.to_json_string())):
            return False
    plain = {name.replace(".base_layer.", "."): state_dict[name] for name in state_dict if ".lora_" not in name}
    seen: set[str] = set()
    for weights in _weight_files(location, where):
        if not _equal(weights, plain, seen):
            return False
    rest = [name for name in plain if name not in seen and not name.endswith(".position_ids")]
    if not seen or any(clip_name(name) is None for name in rest):
        return False
    if rest:  # a side adapter's folder
        try:
            check_base(saved, select_clip(plain), "This model's CLIP")
        except ValueError:
            return False
    lora = lora_tensors(model, state_dict)
    if (saved.lora_folder is None) != (not lora):
        return False
    path = find_file(location, f"{LORA_FOLDER}/{LORA_FILE}", **where) if lora else None
    return not lora or (path is not None and _equal(path, lora, set()))


def _weight_files(location: str, where: dict[str, Any]) -> list[str]:
    names = [SIDE_ADAPTER_FILE, WHOLE_FILE]
    if (index := find_file(location, INDEX_FILE, **where)) is not None:
        with open(index, encoding="utf-8") as file:
            names = sorted({*json.load(file)["weight_map"].values()})
    return [path for name in names if (path := find_file(location, name, **where)) is not None]


def _equal(file: str, tensors: Mapping[str, torch.Tensor], seen: set[str]) -> bool:
    """Whether all tensors of a file are among these, with the same values; their names are noted in `seen`."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            saved, mine = opened.get_tensor(name), tensors.get(name)
            if mine is None or mine.numel() != saved.numel():
                return False
            dtype = torch.promote_types(mine.dtype, saved.dtype)
            if not torch.equal(mine.detach().cpu().reshape(saved.shape).to(dtype), saved.to(dtype)):
                return False
            seen.add(name)
    return True


def _settings(values: Any) -> Any:
    """Values as JSON has them, without what makes no difference."""
    if isinstance(values, dict):
        return {str(key): _settings(value) for key, value in values.items() if key not in NOTES and value is not None}
    return [_settings(value) for value in values] if isinstance(values, list | tuple) else values
