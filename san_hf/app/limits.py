"""What the app takes from a browser, and how much of it."""

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from san_hf.modeling.text_san import clean_text
from san_hf.vocabularies import EXPANSIONS, VOCABULARIES, load_vocabulary


@dataclass(frozen=True)
class Limits:
    """
    Bounds of what one visitor, and all of them together, can make the app hold.

    Attributes:
        pixels: of a picture. One of 20 million takes 220 MB with its result.
        upload: bytes of a file.
        names: class names, those of a preset and of the expansion included.
        name_length: letters of a name.
        sessions: visitors whose picture is kept; the one who was away the longest is forgotten first.
        waiting: questions in the queue.
        file_age: seconds until uploads and downloads are deleted; all of them are when the app ends.
    """

    pixels: int = 20_000_000
    upload: int = 30 * 2**20
    names: int = 1_200
    name_length: int = 200
    sessions: int = 16
    waiting: int = 32
    file_age: int = 3600


def read_names(tags: Iterable[str] | None, preset: str | None, limits: Limits) -> list[str]:
    """
    Class names, each once, in their order: those of the tags, each of which may be several, separated by commas, and
    then those of the preset. Nothing of it is taken for a file.

    Args:
        tags: names as they were typed; one with a comma stands in double quotes.
        preset: one of `san_hf.VOCABULARIES`; none, if it is empty.
        limits: for their number and length.

    Raises:
        ValueError: too many or too long ones, a quote that isn't closed, or an unknown preset.
    """
    if preset and preset not in VOCABULARIES:
        raise ValueError(f"There is no preset {preset!r:.80}, expected one of {', '.join(VOCABULARIES)}.")
    return _checked([*_split(tags or []), *(load_vocabulary(preset) if preset else [])], limits)


def read_expansion_names(text: str | None, limits: Limits) -> list[str]:
    """
    Class names that a vocabulary is expanded by: those of one of `san_hf.vocabularies.EXPANSIONS`, or the text's own,
    separated by commas. Nothing of it is taken for a file.

    Raises:
        ValueError: as [`read_names`].
    """
    if text and text in EXPANSIONS:
        return load_vocabulary(EXPANSIONS[text])
    return _checked(_split([text] if text else []), limits)


def uploaded_file(value: object, folder: str | os.PathLike) -> Path | None:
    """
    The file of a picture that was uploaded, from what the browser says of it.

    Args:
        value: {"path": ..., ...}; `None` for no picture.
        folder: of the uploads.

    Raises:
        ValueError: it is anything else, or another file than an upload.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(path, str) and "\0" not in path:
        file = Path(path).resolve()
        if file.is_relative_to(Path(folder).resolve()) and file.is_file():
            return file
    raise ValueError("This picture isn't here, or not any more: upload it again.")


def _split(tags: Iterable[str]) -> list[str]:
    names: list[str] = []
    for tag in tags:
        try:
            # strict, so that a quote that isn't closed is an error.
            for row in csv.reader([" ".join(str(tag).split())], skipinitialspace=True, strict=True):
                names += row
        except csv.Error as error:
            raise ValueError(
                f"The quotes in {tag!r:.80} don't match. A name with a comma goes in double quotes."
            ) from error
    return [name.strip() for name in names if name.strip()]


def _checked(names: list[str], limits: Limits) -> list[str]:
    for name in names:
        if len(name) > limits.name_length:
            raise ValueError(
                f"The class name {name!r:.60} has {len(name):,} letters, expected a few words, at most "
                f"{limits.name_length}."
            )
    if len(names) > limits.names:
        raise ValueError(f"Got {len(names):,} class names, expected at most {limits.names:,}.")
    first: dict[str, str] = {}
    for name in names:
        if not (key := clean_text(name)):
            raise ValueError(f"The class name {name!r:.60} has no word in it.")
        first.setdefault(key, name)
    return list(first.values())
