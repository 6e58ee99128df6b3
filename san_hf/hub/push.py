"""Model, processor and card together, in a folder or on the Hub."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, constants
from huggingface_hub.errors import HFValidationError

from san_hf.cards import render_card, result_files
from san_hf.files import honour_umask, new_folder
from san_hf.hub.load import from_pretrained
from san_hf.hub.reach import ADVICE, describe_failure
from san_hf.images import load_image
from san_hf.loading import damage
from san_hf.messages import escape_markdown, one_line, without_passwords
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling.adapter_folder_san import SIDE_ADAPTER_FILE
from san_hf.modeling.card_san import CARD_FILE, PICTURE_FILE, RESULTS_FOLDER, describe_contents, is_hub_id
from san_hf.modeling.upload_san import upload_model_folder
from san_hf.paths import expand_path


# Of a run's output folder, the first that is there.
RUN_MODELS = ("best", "final")
# A drawing of what the best model makes of validation images, in a run's output folder.
RUN_PICTURE = Path("pictures") / "best.png"
RUN_CAPTION = "Validation images, their labels, and what this model makes of them."


class PushError(OSError):
    """A push that didn't succeed; the message says whether anything arrived, and what to do."""


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
    base_model: str | None = None,
) -> None:
    """
    Writes what belongs together: weights, configuration, code, processor, tokenizer, card and results.

    `model.save_pretrained` alone writes neither processor nor card.

    Args:
        model, processor: what to save.
        folder: a new one appears when it is complete; in one that exists, files of the same names are replaced.
        facts: see [`san_hf.cards.render_card`]. Without them, the card is that of where the model was loaded from, and
            says so if the weights are others now; or one that claims nothing about training, results and licence.
        model_id: the name the card's example loads; by default the folder, as it is given if that is a relative path,
            else its own name.
        adapter_only: whether to leave out CLIP, see `model.save_side_adapter`.
        base_model: with `adapter_only`, the CLIP under it, if not the one that the model names.

    Raises:
        OSError: the folder can't be written.
        ValueError: with `adapter_only`, the model's CLIP was trained, or isn't known.
    """
    folder = Path(folder)
    model_id = model_id or name_for_others(folder)
    options: dict[str, Any] = {"base_model": base_model} if adapter_only else {}
    with nullcontext(folder) if folder.exists() else new_folder(folder) as target:
        if facts is not None:
            if adapter_only:
                model.set_base_model(base_model)
            contents = {"contents": describe_contents(model.config, adapter_only)}
            card = str(render_card({"title": model_id.split("/")[-1]} | contents | facts, model_id))
            options["card"] = card
        model.save_complete(target, processor, name=model_id, adapter_only=adapter_only, **options)
        if facts is not None:
            shutil.rmtree(target / RESULTS_FOLDER, ignore_errors=True)
            for name, text in result_files(facts).items():
                (target / RESULTS_FOLDER).mkdir(exist_ok=True)
                (target / RESULTS_FOLDER / name).write_text(text, encoding="utf-8")
        honour_umask(target)


def push_to_hub(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    repo_id: str,
    *,
    facts: dict[str, Any] | None = None,
    adapter_only: bool = False,
    base_model: str | None = None,
    **options: Any,
) -> CommitInfo:
    """Uploads model, processor and card together, in one commit, to a repository that is made if it isn't there.

    Args:
        model, processor: what to upload.
        repo_id: "name" or "owner/name" on the Hub.
        facts, adapter_only, base_model: see [`save_pretrained`].
        **options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `picture`: see [`push_folder`].

    Raises:
        PushError, ValueError: see [`push_folder`].
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        save_pretrained(
            model, processor, folder, facts=facts, model_id=repo_id, adapter_only=adapter_only, base_model=base_model
        )
        return push_folder(folder, repo_id, **options)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    adapter_only: bool | None = None,
    base_model: str | None = None,
    picture: str | os.PathLike | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Uploads a model's folder, or the best model of a run, to the Hub: all of it in one commit, or nothing. Pushing again
    after an interruption sends only what isn't there yet.

    What is uploaded: weights, configuration, code, processor, tokenizer, results, the folder's own README.md, whose
    example then loads the repository, and the pictures that it shows. Of another model's weights, results and picture
    nothing is left in the repository.

    Args:
        folder: of a model; or a training's output, whose `best/` or else `final/` is taken.
        repo_id: "name" or "owner/name"; it is made if it isn't there.
        private: whether a repository that is made is private; by default as the account has it.
        adapter_only: True leaves out CLIP, False puts it in; by default the folder is uploaded as it is.
        base_model: for a side adapter, the CLIP under it on the Hub, if the folder names another place; its tensors
            are compared with the digest.
        picture: an image file for the card, such as a run's `pictures/best.png`. None by default: images that a model
            was evaluated on may be private, and only their owner knows.
        token: see `huggingface_hub.HfApi`.
        revision: branch; it is made if it isn't there.
        create_pr: whether to open a pull request.
        commit_message: of the commit.

    Raises:
        PushError: the Hub refuses, or can't be reached.
        ValueError: there is no complete model, its base can't be loaded by others, or a file has a path of this machine
            or an access token. Nothing was sent.
    """
    folder = find_model(folder)
    with ExitStack() as stack:
        is_adapter = (folder / SIDE_ADAPTER_FILE).is_file()
        if base_model is not None and not is_hub_id(base_model):
            raise ValueError(
                f"Got the base {base_model!r} (--base), expected a CLIP on the Hub, owner/name: others can't load "
                "what is in a folder of this machine."
            )
        if base_model is not None and not (adapter_only or (adapter_only is None and is_adapter)):
            raise ValueError("base_model says where the CLIP of a side adapter is, and the whole model has its own.")
        if base_model is not None or (adapter_only is not None and adapter_only != is_adapter):
            folder = stack.enter_context(_other_form(folder, is_adapter, bool(adapter_only), base_model))
        replacements = {} if picture is None else _with_picture(folder, Path(expand_path(picture)))
        with explained_errors(repo_id, folder, token):
            return upload_model_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                replacements=replacements,
            )


def find_model(folder: str | os.PathLike) -> Path:
    """
    The model folder that is meant: the folder itself, or the best or else the final model of a run.

    Raises:
        ValueError: there is none.
    """
    path = Path(expand_path(folder))
    for candidate in (path, *(path / name for name in RUN_MODELS)):
        if (candidate / "config.json").is_file():
            if problem := damage(candidate):
                raise ValueError(f"{problem} Nothing was sent.")
            return candidate
    kind = "no folder" if not path.is_dir() else "no model"
    raise ValueError(
        f"'{path}' is {kind}: expected a model's folder (with config.json), or a training's output folder, with "
        f"{' or '.join(f'{name}/' for name in RUN_MODELS)} in it."
    )


@contextmanager
def explained_errors(repo_id: str, folder: Path, token: str | bool | None) -> Iterator[None]:
    """Makes errors of the Hub and the network one line that says what to do, without the token."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, expected owner/name ({one_line(error)}).") from error
    except (ValueError, PushError):
        raise
    except Exception as error:  # networks fail in many ways, and large files in a RuntimeError of their own
        reason, status = describe_failure(error, token)
        advice = ADVICE.get(status or 0, "Run the same again: what has arrived is not sent twice.")
        place = f"{without_passwords(constants.ENDPOINT)}/{repo_id}"
        known = "No part of it" if status is not None else "Either nothing or all of it"  # where an answer got lost
        raise PushError(
            f"'{folder.name}' could not be pushed to {place}: {reason}. {known} was published. {advice}"
        ) from None


@contextmanager
def _other_form(folder: Path, is_adapter: bool, adapter_only: bool, base_model: str | None) -> Iterator[Path]:
    """The model in a temporary folder with its CLIP or without, or with its CLIP under another name."""
    adapter_only = adapter_only or base_model is not None
    with TemporaryDirectory() as temporary:
        target = Path(temporary) / folder.name
        where: dict[str, Any] = {"base_model": base_model} if is_adapter and base_model is not None else {}
        model, processor = from_pretrained(folder, dtype="auto", **where)
        save_pretrained(model, processor, target, adapter_only=adapter_only, base_model=base_model)
        yield target


def _with_picture(folder: Path, picture: Path) -> dict[str, bytes]:
    """The picture as the folder's, without what its file says beside the pixels, and the card that shows it."""
    image = load_image(picture)
    file = io.BytesIO()
    image.save(file, format="png")
    is_of_run = picture.resolve() == (folder.parent / RUN_PICTURE).resolve() and folder.name == RUN_MODELS[0]
    caption = RUN_CAPTION if is_of_run else "What the model makes of an image."
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    if f"]({PICTURE_FILE})" not in card:
        section = re.search(r"^## ", card, re.M)
        position = section.start() if section else len(card)
        card = f"{card[:position]}![{escape_markdown(caption)}]({PICTURE_FILE})\n\n{card[position:]}"
    return {PICTURE_FILE: file.getvalue(), CARD_FILE: card.encode("utf-8")}
