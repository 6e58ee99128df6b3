"""What side adapters a folder or repository holds."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from san_hf.loading import ModelError
from san_hf.messages import one_line
from san_hf.modeling.adapter_folder_san import SIDE_ADAPTER_FILE
from san_hf.paths import expand_path


@dataclass
class SideAdapterInfo:
    """
    A side adapter, as its folder describes it.

    Args:
        name: what loads it: the folder, or the repository (with ":folder" for one below it).
        base: the CLIP that it was trained on, a repository or folder; `revision`: its commit.
        sha256: digest of that CLIP's frozen tensors.
        size: bytes of weights, LoRA's included.
        classes: names of the vocabulary that it carries, by index.
        lora: whether LoRA weights of CLIP belong to it.
        results: of its card: "data set: metric value".
    """

    name: str
    base: str | None
    revision: str | None
    sha256: str | None
    size: int
    classes: list[str] = field(default_factory=list)
    lora: bool = False
    results: list[str] = field(default_factory=list)


def list_side_adapters(
    name_or_path: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> list[SideAdapterInfo]:
    """
    The side adapters in a folder and below it, or in a repository; no weights are loaded.

    Args:
        name_or_path: the folder (with `~` or environment variables, if need be) or repository.
        revision: branch, tag or commit of the repository.
        token: see `huggingface_hub.hf_hub_download`.

    Raises:
        ModelError: there is none, or a file beside one can't be read.
        OSError: the repository can't be reached.
    """
    name = expand_path(name_or_path)
    if os.path.isdir(name):
        found = [_describe(path, Path(path).joinpath, _size_below(Path(path))) for path in _folders(name)]
    else:
        found = list(_in_repository(name, revision, token))
    if not found:
        raise ModelError(
            f"'{name}' holds no side adapter: there is no {SIDE_ADAPTER_FILE} in it or below it. "
            "model.save_pretrained(folder, adapter_only=True) writes one."
        )
    return found


def _folders(root: str) -> Iterator[str]:
    # Links are not followed: they may lead back.
    for folder, below, files in os.walk(root):
        below.sort()
        if SIDE_ADAPTER_FILE in files:
            yield folder


def _size_below(folder: Path) -> int:
    lora = folder.joinpath("lora")
    weights = [folder / SIDE_ADAPTER_FILE, *(sorted(lora.glob("*.safetensors")) if lora.is_dir() else ())]
    return sum(path.stat().st_size for path in weights)


def _in_repository(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[SideAdapterInfo]:
    entries = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    for path in sorted(sizes):
        if PurePosixPath(path).name != SIDE_ADAPTER_FILE:
            continue
        folder = PurePosixPath(path).parent
        size = sum(
            count
            for file, count in sizes.items()
            if file == path or (PurePosixPath(file).parent == folder / "lora" and file.endswith(".safetensors"))
        )

        def fetch(file: str, folder: PurePosixPath = folder) -> Path:
            inside = (folder / file).as_posix()
            if inside not in sizes:
                return Path(os.devnull) / file
            return Path(hf_hub_download(repo_id, inside, revision=revision, token=token))

        below = "" if folder == PurePosixPath(".") else f":{folder}"
        yield _describe(repo_id + below, fetch, size)


def _describe(name: str, fetch: Callable[[str], Path], size: int) -> SideAdapterInfo:
    try:
        config: dict[str, Any] = json.loads(fetch("config.json").read_text(encoding="utf-8"))
        names = {int(index): str(label) for index, label in (config.get("id2label") or {}).items()}
        carried = bool(config.get("vocabulary_size"))
        return SideAdapterInfo(
            name=name,
            base=config.get("base_model_name_or_path"),
            revision=config.get("base_model_revision"),
            sha256=config.get("base_model_sha256"),
            size=size,
            classes=[names[index] for index in sorted(names)] if carried else [],
            lora=config.get("lora_folder") is not None,
            results=_results(fetch("README.md")),
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The config.json beside {SIDE_ADAPTER_FILE} of '{name}' can't be read: {one_line(error)}."
        ) from (error)


def _results(card: Path) -> list[str]:
    """What a card says was measured; nothing where there is no card, or its metadata can't be read."""
    try:
        results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [
        f"{result.dataset_name}: {result.metric_name or result.metric_type} {result.metric_value}" for result in results
    ]
