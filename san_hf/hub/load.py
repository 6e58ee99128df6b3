"""Loading of models by name: their folders, the cache of converted releases, and the models."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download

from san_hf.conversion import HUB_REPO, RELEASES, Release, convert_checkpoint
from san_hf.files import remove_leftovers
from san_hf.hub.names import EMBEDDED_MODEL, EXPORT_FILE
from san_hf.hub.reach import is_repository, is_unreachable, suggestion
from san_hf.loading import ModelError, check_processor, damage, load_complete
from san_hf.locks import locked
from san_hf.messages import one_line, without_passwords
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.paths import expand_path
from san_hf.version import __version__


def resolve(
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The folder or repository of a model's name, as `from_pretrained` of any Transformers class takes it.

    A folder stays what it is. The name of a released model ("san-vit-b-16", "san-vit-large-14") becomes the folder
    of its conversion: the file is downloaded as `huggingface_hub` does it, converted once for each commit of the
    repository, and kept in `$HF_HOME/san_hf`. The name of a checkpoint that comes with this package becomes its
    folder. Any other name is taken for a repository on the Hub and returned unchanged.

    Args:
        name_or_path: a folder (with `~` or environment variables, if need be), or a name.
        cache_dir: where to keep downloads and conversions instead.
        revision: branch, tag or commit of the release's repository.
        token: see `huggingface_hub.hf_hub_download`.
        local_files_only: use what was downloaded before, and no network (so does the variable HF_HUB_OFFLINE).

    Raises:
        OSError: the file can't be downloaded: no network and nothing cached, no such revision, no access.
        san_hf.conversion.ConversionError: it isn't the checkpoint it should be.
    """
    name = expand_path(name_or_path)
    if Path(name).is_dir():
        return name
    if name in RELEASES:
        return str(_converted(RELEASES[name], cache_dir, revision, token, local_files_only))
    bundled = files("san_hf") / "checkpoints" / name
    return str(bundled) if (bundled / "config.json").is_file() else name


def from_pretrained(
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **kwargs,
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """A model and its processor, by name; complete, where Transformers would fill what is missing at random.

    Args:
        name_or_path: as in [`resolve`]: "san-vit-b-16", "san-vit-large-14", a folder, or a repository on the Hub.
        cache_dir, revision, token, local_files_only: see [`resolve`].
        **kwargs: for the model's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        OSError: there is no such model, or it can't be reached.
        ModelError: no such name, another kind of model, or one whose weights, configuration or processor is incomplete
            or doesn't fit the rest.
    """
    hub_options: dict[str, Any] = {
        "cache_dir": cache_dir,
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
    }
    name = os.fspath(name_or_path)
    known = (EMBEDDED_MODEL, *RELEASES)
    check_name(name)
    is_known = os.path.isdir(name) or name in RELEASES or resolve(name, **hub_options) != name
    if not os.path.isdir(name) and (not is_known or name in RELEASES):
        hub_options["local_files_only"] = local_files_only or is_unreachable()
    try:
        location = resolve(name, **hub_options)
        model = load_complete(location, hub_options=hub_options, **kwargs)
        processor = SANProcessor.from_pretrained(location, **hub_options)
    except Exception as error:
        if is_known or os.path.isdir(name) or not hub_options["local_files_only"]:
            raise
        raise OSError(
            f"There is no folder here of that name, it is none of {', '.join(known)}, and as a repository on the Hub "
            f"{name!r} is not complete in the cache, with no connection to {without_passwords(constants.ENDPOINT)}."
            + suggestion(name, known)
        ) from error
    check_processor(processor, model.config, location)
    return model, processor


def check_name(name_or_path: str | os.PathLike) -> None:
    """
    Refuses a name that no model can have, at once; whether a repository exists shows only when it is loaded.

    Raises:
        ModelError: neither a folder, nor a name that comes with the package, nor one of the Hub's form.
    """
    name, known = expand_path(name_or_path), (EMBEDDED_MODEL, *RELEASES)
    if os.path.isfile(name):
        raise ModelError(
            f"The model '{name}' is a file, expected a folder. A checkpoint of the original SAN becomes one by "
            f"`san-hf convert {name} FOLDER`."
        )
    if os.path.isfile(os.path.join(name, EXPORT_FILE)):
        raise ModelError(
            f"'{name}' is an exported folder, expected a model's. To run it, name its runtime: `san-hf segment "
            "--runtime`, or Segmenter.from_pretrained(folder, runtime=...)."
        )
    if not (os.path.isdir(name) or name in known or is_repository(name)):
        raise ModelError(
            f"There is no model {name!r}: no folder of that name, none of {', '.join(known)}, and a repository on the "
            f"Hub is owner/name.{suggestion(name, known)}"
        )


def load_model(
    name_or_path: str | os.PathLike, dtype: torch.dtype, **kwargs: Any
) -> tuple[SANForSemanticSegmentation, SANProcessor]:
    """
    [`from_pretrained`], which also takes the **kwargs, with one kind of error whatever the reason.

    Raises:
        ModelError: there is no such model, or it isn't a complete SAN.
    """
    name = expand_path(name_or_path)
    check_name(name)
    try:
        return from_pretrained(name, dtype=dtype, **kwargs)
    # Broken files make torch, safetensors and tokenizers fail in ways of their own.
    except Exception as error:
        if problem := damage(name):
            raise ModelError(f"The model '{name}' can't be loaded: {problem}") from error
        hint = "" if os.path.isdir(name) else suggestion(name, (EMBEDDED_MODEL, *RELEASES))
        text = " ".join(without_passwords(str(error)).split()) or type(error).__name__
        text += "" if hint.strip() in text else hint
        raise ModelError(f"The model '{name}' can't be loaded. {text}") from error


def _converted(release: Release, cache_dir, revision, token, local_files_only) -> Path:
    """The folder of a released model's conversion, made if it isn't there."""
    try:
        checkpoint = Path(
            hf_hub_download(
                HUB_REPO,
                release.filename,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # networks fail in many ways, and not all of their errors are OSErrors
        reason = f"{one_line(error)}."
        raise OSError(
            f"'{release.name}' stands for {release.filename} of {without_passwords(constants.ENDPOINT)}/{HUB_REPO}"
            + (f" at revision {revision!r}" if revision else "")
            + f", which could not be downloaded: {reason} Check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT), or "
            "get the file another way, convert it with `san-hf convert FILE FOLDER`, and give that folder."
        ) from error
    # The cache keeps each commit's files in a folder of the commit's name. Another version of this package may convert
    # differently, and brings other code for the folder.
    root = Path(cache_dir or constants.HF_HOME) / "san_hf"
    folder = root / f"{checkpoint.parent.name}-{__version__}" / release.name
    # A conversion appears all at once, so that its presence means that it is complete; then nothing is written.
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), f"Converting '{release.name}'", wait=True):
            remove_leftovers(folder.parent)
            if not folder.is_dir():
                convert_checkpoint(checkpoint, folder, release=release)
    except OSError as error:
        raise OSError(
            f"'{release.name}' has to be converted once, but '{root}' can't be written: {one_line(error)}. Make room, "
            f"give another cache_dir, or run `san-hf convert {checkpoint} FOLDER` and give that folder."
        ) from error
    return folder
