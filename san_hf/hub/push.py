"""Model, processor and card together, in a folder or on the Hub."""

import os
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from san_hf.cards import render_card
from san_hf.files import honour_umask, new_folder
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor


def name_for_others(path: str | os.PathLike) -> str:
    """A folder without what means nothing on another machine: a relative path below the present one, else its name."""
    path = Path(path)
    known = not path.is_absolute() and ".." not in path.parts and path.parts and not str(path).startswith("~")
    return path.as_posix() if known else path.expanduser().resolve().name


def save_pretrained(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    folder: str | os.PathLike,
    *,
    facts: dict[str, Any] | None = None,
    model_id: str | None = None,
    adapter_only: bool = False,
) -> None:
    """
    Writes what belongs together: weights, configuration, code, processor, tokenizer and card.

    `model.save_pretrained` alone writes neither processor nor card.

    Args:
        model, processor: what to save.
        folder: a new one appears when it is complete; in one that exists, files of the same names are replaced.
        facts: see [`san_hf.cards.render_card`]; without them, the card claims nothing about training, results and
            licence.
        model_id: the name the card's example loads; by default the folder, as it is given if that is a relative path,
            else its own name.
        adapter_only: whether to leave out CLIP, see `model.save_side_adapter`.

    Raises:
        OSError: the folder can't be written.
        ValueError: with `adapter_only`, the model's CLIP was trained, or isn't known.
    """
    folder = Path(folder)
    model_id = model_id or name_for_others(folder)
    with nullcontext(folder) if folder.exists() else new_folder(folder) as target:
        model.save_pretrained(target, adapter_only=adapter_only, **({"processor": processor} if adapter_only else {}))
        processor.save_pretrained(target)
        render_card({"title": model_id.split("/")[-1]} | (facts or {}), model_id).save(target / "README.md")
        honour_umask(target)


def push_to_hub(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    repo_id: str,
    *,
    facts: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload SAN",
) -> CommitInfo:
    """Uploads model, processor and card together, to a repository that is made if it isn't there.

    Args:
        model, processor: what to upload.
        repo_id: "name" or "owner/name" on the Hub.
        facts: see [`san_hf.cards.render_card`].
        private, token, revision, create_pr, commit_message: see `huggingface_hub.HfApi.create_repo` and
            `upload_folder`.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, e.g. without a token that may write.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_pretrained(model, processor, folder, facts=facts, model_id=repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
