"""What side adapters a folder or repository holds."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from san_hf.conversion import RELEASES
from san_hf.hub.load import check_name
from san_hf.hub.names import EMBEDDED_MODEL
from san_hf.hub.reach import ADVICE, describe_failure, suggestion
from san_hf.json_files import read_json
from san_hf.loading import ModelError
from san_hf.messages import one_line
from san_hf.modeling.adapter_folder_san import LORA_FILE, LORA_FOLDER, SIDE_ADAPTER_FILE
from san_hf.modeling.card_san import CARD_FILE
from san_hf.paths import expand_path


CONFIG_FILE = "config.json"


class NoSideAdapter(ModelError):
    """A folder or repository without any side adapter."""


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
        NoSideAdapter: there is none.
        ModelError: no such folder or repository, or a file beside one can't be read.
        OSError: the repository can't be reached.
    """
    name = expand_path(name_or_path)
    check_name(name)
    if os.path.isdir(name):
        sizes, fetch = _sizes_below(name), partial(os.path.join, name)
    else:
        sizes = {} if name in (EMBEDDED_MODEL, *RELEASES) else _sizes_in(name, revision, token)
        fetch = partial(hf_hub_download, name, revision=revision, token=token)
    adapters = [PurePosixPath(path) for path in sorted(sizes) if PurePosixPath(path).name == SIDE_ADAPTER_FILE]
    found = [_describe(name, path.parent, sizes, fetch) for path in adapters]
    if not found:
        raise NoSideAdapter(
            f"'{name}' holds no side adapter: there is no {SIDE_ADAPTER_FILE} in it or below it. "
            "model.save_pretrained(folder, adapter_only=True) writes one."
        )
    return found


def _sizes_below(root: str) -> dict[str, int]:
    """Bytes of the files that describe side adapters in a folder and below it, by their path in it."""
    sizes = {}
    # Links are not followed: they may lead back.
    for folder, _, files in os.walk(root):
        for name in {SIDE_ADAPTER_FILE, LORA_FILE, CONFIG_FILE, CARD_FILE}.intersection(files):
            path = Path(folder, name)
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return sizes


def _sizes_in(repository: str, revision: str | None, token: str | bool | None) -> dict[str, int]:
    """
    Bytes of a repository's files, by their path in it.

    Raises:
        OSError: it can't be listed.
    """
    try:
        entries = HfApi(token=token).list_repo_tree(repository, recursive=True, revision=revision)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    except Exception as error:  # networks fail in many ways
        reason, status = describe_failure(error, token)
        at = "" if revision is None else f" at revision {revision!r}"
        raise OSError(
            f"'{repository}' is no folder here, and as a repository on the Hub{at} it can't be listed: {reason}. "
            f"{ADVICE.get(status or 0, 'Check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT).')}"
            + suggestion(repository, ())
        ) from error


def _describe(
    name: str, folder: PurePosixPath, sizes: Mapping[str, int], fetch: Callable[[str], str]
) -> SideAdapterInfo:
    """
    Args:
        name: of what holds the adapter, a folder or a repository.
        folder: of the adapter, in there.
        sizes: bytes of the files in there, by path.
        fetch: gives the local path of such a file.
    """
    if folder != PurePosixPath("."):
        name = os.path.join(name, folder) if os.path.isdir(name) else f"{name}:{folder}"
    size = sizes[str(folder / SIDE_ADAPTER_FILE)] + sizes.get(str(folder / LORA_FOLDER / LORA_FILE), 0)
    card = str(folder / CARD_FILE)
    try:
        config: dict[str, Any] = read_json(fetch(str(folder / CONFIG_FILE)))
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
            results=_results(fetch(card)) if card in sizes else [],
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"The config.json beside {SIDE_ADAPTER_FILE} of '{name}' can't be read: {one_line(error)}."
        ) from error


def _results(card: str) -> list[str]:
    """What a card says was measured; nothing where its metadata can't be read."""
    try:
        results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [
        f"{result.dataset_name}: {result.metric_name or result.metric_type} {result.metric_value}" for result in results
    ]
