"""Lists of class names: a file, the name of a benchmark, or a list."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from san_hf.messages import join_some
from san_hf.vocabularies import VOCABULARIES, load_vocabulary

from .errors import DataError


FILE_ENDINGS = (".txt", ".json")


def is_class_list(value: str) -> bool:
    """Whether a text names a list that [`read_class_names`] reads, rather than classes: a benchmark, or a file."""
    return value in VOCABULARIES or (value.lower().endswith(FILE_ENDINGS) and os.path.isfile(value))


def read_class_names(source: str | os.PathLike | Sequence[str], skip_blank: bool = False) -> list[str]:
    """
    A list of class names.

    Args:
        source: the names in the order of their labels; or the name of one of `san_hf.VOCABULARIES`; or a file: text
            with one name a line, or JSON, a list of names or names by label ({"0": "sky", ...}).
        skip_blank: pass over blank names, where no label depends on a name's position; otherwise they are an error,
            but for blank lines at the end.

    Raises:
        DataError: no such file or vocabulary; or not a list of different, non-empty names.
    """
    where = "class_names"
    names = source
    if isinstance(source, str | os.PathLike):
        source = os.fspath(source)
        where = f"The class list '{source}'"
        if source in VOCABULARIES and not os.path.isfile(source):
            return load_vocabulary(source)
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
            names = json.loads(text) if source.lower().endswith(".json") else text.splitlines()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{where} can't be read: {error}. Expected a text file with one name a line, a JSON file, or one of "
                f"{', '.join(VOCABULARIES)}."
            ) from error
        if isinstance(names, dict):
            labels = {str(label) for label in range(len(names))}
            if set(names) != labels:
                raise DataError(
                    f"{where} has {len(names)} names, expected them for the labels 0..{len(names) - 1}; not so: "
                    f"{join_some(sorted(set(names) ^ labels))}."
                )
            names = [names[str(label)] for label in range(len(names))]
        # Blank lines at the end are no classes; one in between would shift the labels of all that follow.
        while isinstance(names, list) and names and isinstance(names[-1], str) and not names[-1].strip():
            names.pop()
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} is no list of names: expected at least one, each a text.")
    names = [name.strip() for name in names if name.strip() or not skip_blank]
    for label, name in enumerate(names):
        if not name:
            raise DataError(f"{where} has no name for label {label}: expected one for each, without gaps.")
        if names.index(name) != label:
            raise DataError(f"{where} has {name!r} for the labels {names.index(name)} and {label}: expected it once.")
    return names
