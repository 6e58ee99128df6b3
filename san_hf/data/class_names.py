"""Lists of class names: a file, the name of a benchmark, or a list. Every command and function reads them here."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from san_hf.json_files import JSONError, parse_json, read_text
from san_hf.messages import join_some, one_line
from san_hf.paths import expand_path
from san_hf.vocabularies import EXPANSIONS, VOCABULARIES, load_vocabulary
from san_hf.vocabularies.files import FILE_ENDING, VocabularyError, is_vocabulary_file, read_vocabulary_names

from .errors import DataError


FILE_ENDINGS = (".txt", ".json", FILE_ENDING)
SEPARATORS = re.compile("[,;|\t]")


def is_class_list(value: str) -> bool:
    """Whether a text names a list that [`read_class_names`] reads, rather than classes: a benchmark, or a file."""
    single = "," not in value or os.path.isfile(value)
    return value in VOCABULARIES or (single and value.lower().endswith(FILE_ENDINGS))


def read_class_names(source: str | os.PathLike | Iterable[str] | Mapping, skip_blank: bool = False) -> list[str]:
    """
    A list of class names, composed (Unicode's NFC) and without spaces around them.

    Args:
        source: the names in the order of their labels, or by label ({0: "sky", ...}); or the name of one of
            `san_hf.VOCABULARIES`; or a file: text with one name a line, or JSON (.json), a list of names or names by
            label ({"0": "sky", ...}), or a vocabulary's file (.safetensors, see [`san_hf.Vocabulary.save`]).
        skip_blank: pass over blank lines of a text file, where no label depends on a name's position; otherwise they
            are an error, but for blank lines at the end.

    Raises:
        DataError: no such file or vocabulary; or not a list of different, non-empty names: see
            [`san_hf.modeling.text_san.check_class_names`].
    """
    from san_hf.modeling.text_san import check_class_names  # brings torch, which no command's help needs

    where: str = "class_names"
    names: Any = source
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if path in VOCABULARIES:
            return load_vocabulary(path)
        try:
            path = expand_path(path)
        except ValueError as error:
            raise DataError(str(error)) from error
        if is_vocabulary_file(path):
            try:
                return read_vocabulary_names(path)
            except VocabularyError as error:
                raise DataError(str(error)) from error
        where = f"the class list '{path}'"
        if Path(path).suffix.lower() == ".json":
            names = _read_json(_read_text(path), where)
        else:
            names = _read_lines(_read_text(path), where, skip_blank)
    if isinstance(names, Mapping):
        names = _by_label(names, where)
    try:
        return check_class_names(names, where)
    except ValueError as error:
        raise DataError(f"{error}{_hint_to_quote(names)}") from error


def refuse_separators(name: str, where: str, alone: bool = True) -> None:
    """
    Refuses a name that looks like several; and one that is `alone` and nearly the name of a benchmark.

    Raises:
        DataError: it is such a name.
    """
    if found := SEPARATORS.search(name):
        parts = [part.strip() for part in SEPARATORS.split(name) if part.strip()]
        raise DataError(
            f"{where} has the name {name!r:.200}, with {found[0]!r} in it. Expected {len(parts)} names, separated "
            'by commas on the command line, one a line in a text file? A name that has one goes into a JSON list, ["a, '
            'b"], or in double quotes on the command line.'
        )
    tidy = re.sub("[_ -]", "", name).lower()
    near = [known for known in VOCABULARIES if re.sub("[_-]", "", known) == tidy]
    near += [full for short, full in EXPANSIONS.items() if short == tidy]
    if near and alone:
        raise DataError(f"{where} has the name {name!r}: did you mean the benchmark {near[0]}?")


def _read_text(path: str) -> str:
    """
    Raises:
        DataError: it can't be read, or is no text.
    """
    expected = f"Expected a text file with one name a line, a JSON file, or one of {', '.join(VOCABULARIES)}."
    hint = ""
    if SEPARATORS.search(path) and not os.path.exists(path):
        hint = f" Or is a list of class names: {[part.strip() for part in SEPARATORS.split(path)]!s:.200} meant?"
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise DataError(f"The class list '{path}' is no regular file. {expected}")
        if file.suffix.lower() in (".yaml", ".yml"):
            raise DataError(f"The class list '{path}' is YAML. {expected}")
        return read_text(path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The class list '{path}' can't be read: {one_line(error)}. {expected}{hint}") from error


def _read_json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise DataError(f"{where} has a label twice, expected each once.")
        return found

    try:
        names = parse_json(text, where, once)
    except JSONError as error:
        raise DataError(str(error)) from error
    if not isinstance(names, list | dict):
        raise DataError(
            f'{where} holds {names!r:.80}, expected a list, ["sky", ...], or names by label, {{"0": "sky"}}.'
        )
    return names


def _read_lines(text: str, where: str, skip_blank: bool) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    # Blank lines at the end are no classes; one in between would shift the labels of all that follow.
    while lines and not lines[-1]:
        lines.pop()
    lines = [line for line in lines if line or not skip_blank]
    numbers = [re.match(r"(\d+)\s*[,;:|\t. ]", line) for line in lines]
    starts = [int(number[1][:9]) for number in numbers if number]
    numbered = (
        len(lines) > 1
        and len(starts) == len(lines)
        and starts
        in (
            list(range(len(lines))),
            list(range(1, len(lines) + 1)),
        )
    )
    for number, line in enumerate(lines, start=1):
        if numbered or "\t" in line or re.match(r'[\[\]{}#"]|- ', line):
            raise DataError(
                f"{where} has {line!r:.80} in line {number}, expected nothing but a name: no number, bracket, quote, "
                "dash, tab or comment. A JSON list goes into a file that ends in .json."
            )
    if len(lines) == 1:
        refuse_separators(lines[0], where)
    return lines


def _by_label(names: Mapping, where: str) -> list[Any]:
    """{0: "sky", ...}, also with the labels as text, in the order of the labels."""
    labels = {str(label) for label in range(len(names))}
    found = {str(label): name for label, name in names.items() if not isinstance(label, bool)}
    if set(found) != labels:
        turned = all(isinstance(label, int) for label in names.values()) and names
        raise DataError(
            f"{where} has {len(names)} names, expected them for the labels 0..{len(names) - 1}; not so: "
            f"{join_some(sorted(set(map(str, names)) ^ labels))}."
            + (" It gives labels by name, expected names by label." if turned else "")
        )
    return [found[str(label)] for label in range(len(found))]


def _hint_to_quote(names: Any) -> str:
    """For what a file's format takes for a number, a date or a truth value."""
    if isinstance(names, list) and any(not isinstance(name, str) and not hasattr(name, "__len__") for name in names):
        return " Names that look like numbers, dates, true, false or null go in quotes."
    return ""
