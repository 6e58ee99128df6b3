"""What options of several commands say about the vocabulary: class names, expansion, templates and colours."""

import csv
import os
import re
from pathlib import Path
from typing import Any

from san_hf.cli.console import fail
from san_hf.data.class_names import is_class_list, read_class_names, refuse_separators
from san_hf.json_files import JSONError, read_text
from san_hf.messages import one_line, printable
from san_hf.paths import expand_path
from san_hf.vocabularies import EXPANSIONS
from san_hf.vocabularies.files import is_vocabulary_file


_LARGEST_FILE = 1 << 20


def class_names_of_options(classes: list[str] | None, file: Path | None) -> list[str] | str | None:
    """
    The names of both options in their order; `None` if neither is given. If it is one vocabulary's file and nothing
    else, its path, as its names needn't be encoded again.
    """
    if not classes and file is None:
        return None
    given = [*(classes or []), *([str(file)] if file is not None else [])]
    if len(given) == 1 and is_vocabulary_file(given[0]):
        read_class_names(given[0])  # says what is wrong with it before a model is loaded
        return expand_path(given[0])
    names = []
    for value in classes or []:
        names += read_class_names(value, skip_blank=True) if is_class_list(value) else split_names(value)
    if file is not None:
        names += read_class_names(file, skip_blank=True)
    garbled = [name for name in names if any("\ud800" <= letter <= "\udfff" for letter in name)]
    if garbled:
        fail(f"The class name '{printable(garbled[0])}' is no text in this terminal's encoding. Expected UTF-8.")
    if not names:
        fail('Got no class name, expected at least one, for example --classes "cat, grass, sky".')
    return names


def colors_of_options(values: list[str] | None) -> "dict[str, tuple[int, int, int]]":
    """Colours by class name, of files and of "name=colour"; later ones win."""
    from san_hf.colors import parse_color, read_colors, split_color

    colors: dict[str, tuple[int, int, int]] = {}
    for value in values or []:
        if os.path.isfile(expand_path(value)):
            colors |= read_colors(expand_path(value))
        else:
            name, color = split_color(value, "--colors")
            colors[name] = parse_color(color, name)
    return colors


def split_names(line: str, option: str = "--classes") -> list[str]:
    """Names separated by commas, those with a comma in double quotes."""
    if '"' not in line:
        for name in filter(None, map(str.strip, line.split(","))):
            refuse_separators(name, f"{option} {line!r:.200}", alone="," not in line)
    names = []
    # strict, so that a quote that isn't closed is an error; spaces after a closing quote are not.
    tidy = re.sub(r'"\s+(?=,|$)', '"', line)
    try:
        for row in csv.reader(tidy.splitlines(), skipinitialspace=True, strict=True):
            names += row
    except csv.Error as error:
        fail(f"{option} {line!r}: {error}. A name with a comma goes in double quotes.")
    return [name.strip() for name in names if name.strip()]


def expansion_of_option(value: str | None) -> str | list[str] | None:
    """An expansion's or benchmark's name, a file's path, or names that are separated by commas."""
    if value is None or value in EXPANSIONS:
        return value
    if is_class_list(value):
        return read_class_names(value, skip_blank=True)
    # A single word is rather the name of an expansion that there isn't.
    names = split_names(value, "--expand") if "," in value or '"' in value else []
    if not names:
        fail(
            f"Can't expand by {value!r:.80}: expected one of {', '.join(EXPANSIONS)}, a benchmark's name, a file, or "
            'names with commas, also a single one: "wall,".'
        )
    return names


def templates_of_options(values: list[str] | None) -> str | list[str] | None:
    """The name of templates, or templates: those that are given, and those of files, one a line."""
    if not values:
        return None
    from san_hf.modeling.prompts_san import PROMPT_TEMPLATES, split_templates

    if len(values) == 1 and values[0] in PROMPT_TEMPLATES:
        return values[0]
    templates: list[str] = []
    for value in values:
        if value in PROMPT_TEMPLATES:
            templates += PROMPT_TEMPLATES[value]
        elif "{}" in value:
            templates.append(value)
        elif os.path.isfile(expand_path(value)):
            templates += _lines(expand_path(value))
        else:
            fail(
                f"Got --templates {value!r:.200}, expected a sentence with one {{}} for the name, a file of such "
                f"lines, or one of {', '.join(PROMPT_TEMPLATES)}."
            )
    split_templates(templates)
    return templates


def class_facts(class_names: list[str] | str | None) -> Any:
    """What a run's labels depend on: the names; of a vocabulary's file its path, size and time."""
    if not isinstance(class_names, str):
        return class_names
    status = os.stat(class_names)
    return [class_names, status.st_size, status.st_mtime_ns]


def _lines(path: str) -> list[str]:
    try:
        lines = read_text(path, _LARGEST_FILE).splitlines()
    except (OSError, JSONError) as error:
        fail(f"The file of templates '{printable(path)}' can't be read: {one_line(error)}.")
    return [line.strip() for line in lines if line.strip()]
