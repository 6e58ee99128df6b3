"""What the colours of label maps stand for: palettes of two benchmarks, black and white, and one's own."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from san_hf.json_files import parse_json, read_text
from san_hf.messages import join_some, one_line
from san_hf.paths import expand_path

from .errors import DataError


IGNORED = "ignore"
# Cityscapes' evaluated classes in the order of its vocabulary (cityscapesscripts/helpers/labels.py). All others are
# ignored there; but "polegroup" has the colour of "pole", and "license plate" that of "car".
_CITYSCAPES = (
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 "
    "005064 0000e6 770b20"
).split()
_CITYSCAPES_IGNORED = "000000 6f4a00 510051 faaaa0 e6968c b4a5b4 966464 96785a 00005a 00006e".split()
_VOC_CLASSES = 20
_VOC_BORDER = 0xE0E0C0


@dataclass(frozen=True)
class Palette:
    """
    Labels by colour.

    Attributes:
        name: the palette's, for messages.
        codes: (K,) int32, ascending: red, green and blue of each colour as one number 0xRRGGBB.
        labels: (K,) int32, the label of each.
    """

    name: str
    codes: np.ndarray
    labels: np.ndarray


def load_palette(
    source: str | os.PathLike | Mapping[Sequence[int] | str, str | int], class_names: Sequence[str], ignore_index: int
) -> Palette:
    """
    A palette for a class list.

    Args:
        source: "voc" or "cityscapes" for those benchmarks' usual colours; "binary" for black (the first of two classes)
            and white (the second); or a file, or a mapping, of colours and classes. A colour is "#rrggbb" or three
            numbers 0..255; a class a name of the list, a label, or "ignore". A text file has a colour and a class, or
            a class and a colour, on each line; a JSON file is a mapping from "#rrggbb" or "r,g,b".
        class_names: by label.
        ignore_index: the label of what is ignored.

    Raises:
        DataError: no such file, a colour or a class that can't be understood, or a colour of two classes.
    """
    if isinstance(source, Mapping):
        return _build("label_palette", [(color, name) for color, name in source.items()], class_names, ignore_index)
    text = os.fspath(source)
    if text in _BUILT_IN and not os.path.isfile(text):
        pairs = _BUILT_IN[text](len(class_names), ignore_index)
        codes, labels = np.array(sorted(pairs), dtype=np.int32).T
        return Palette(text, codes, labels)
    path = expand_path(text)
    where = f"The palette '{text}'"
    try:
        content = read_text(path)
        entries = parse_json(content, where) if path.lower().endswith(".json") else _read_lines(content, where)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where} can't be read: {one_line(error)}. Expected a file of colours and classes, or one of "
            f"{', '.join(_BUILT_IN)}."
        ) from error
    if isinstance(entries, Mapping):
        entries = list(entries.items())
    if not isinstance(entries, list) or not all(isinstance(x, list | tuple) and len(x) == 2 for x in entries):
        raise DataError(f"{where} is no mapping from colours to classes.")
    return _build(where, entries, class_names, ignore_index, Path(path).name)


def _build(
    where: str, entries: Sequence, class_names: Sequence[str], ignore_index: int, name: str = "label_palette"
) -> Palette:
    labels: dict[int, int] = {}
    for color, value in entries:
        code = _color_code(color)
        if code is None:
            raise DataError(f"{where}: got the colour {color!r:.80}, expected #rrggbb or three numbers 0..255.")
        label = _label(value, class_names, ignore_index)
        if label is None:
            raise DataError(
                f"{where}: got the class {value!r:.80} for #{code:06x}, expected a name of the class list, a label "
                f"0..{len(class_names) - 1}, or {IGNORED}. The list has {join_some(class_names)}."
            )
        if labels.setdefault(code, label) != label:
            raise DataError(f"{where}: has #{code:06x} for the labels {labels[code]} and {label}: expected one.")
    if not labels:
        raise DataError(f"{where} has no colour, expected at least one.")
    codes = np.array(sorted(labels), dtype=np.int32)
    return Palette(name, codes, np.array([labels[code] for code in codes.tolist()], dtype=np.int32))


def _read_lines(content: str, where: str) -> list[tuple[str, str]]:
    """Pairs of a colour and a class; a first line without a colour is a heading."""
    number, hexadecimal = r"\d{1,3}", r"#[0-9a-fA-F]{6}"
    color = rf"(?:{hexadecimal}|{number}(?:[\s,;]+{number}){{2}})"
    entries: list[tuple[str, str]] = []
    for position, line in enumerate(content.splitlines()):
        line = line.strip()
        if not line:
            continue
        if match := re.fullmatch(rf"({color})[\s,;:]+(.+)", line):
            entries.append((match[1], match[2]))
        elif match := re.fullmatch(rf"(.+?)[\s,;:]+({color})", line):
            entries.append((match[2], match[1]))
        elif entries or position:
            raise DataError(f"{where}: got the line {line!r:.100}, expected a colour and a class.")
    return entries


def _color_code(color: object) -> int | None:
    if isinstance(color, str):
        if match := re.fullmatch(r"#?([0-9a-fA-F]{6})", color.strip()):
            return int(match[1], 16)
        parts: Sequence[object] = [int(part) for part in re.findall(r"\d+", color)]
        if not re.fullmatch(r"[\[(]?\s*\d+(?:[\s,;]+\d+){2}\s*[\])]?", color.strip()):
            return None
    else:
        parts = list(color) if isinstance(color, Sequence) else []
    if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
        return None
    red, green, blue = parts
    return red << 16 | green << 8 | blue  # type: ignore[operator]  # all are int


def _label(value: object, class_names: Sequence[str], ignore_index: int) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        if text in class_names:
            return class_names.index(text)
        if text.casefold() == IGNORED:
            return ignore_index
        if not re.fullmatch(r"-?\d{1,9}", text):
            return None
        value = int(text)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < len(class_names) or value == ignore_index else None


def _voc(num_classes: int, ignore_index: int) -> list[tuple[int, int]]:
    if num_classes not in (_VOC_CLASSES, _VOC_CLASSES + 1):
        raise DataError(f"The palette voc is for 20 classes, or 21 with the background first, got {num_classes}.")
    first = num_classes - _VOC_CLASSES - 1
    labels = [first + index if first + index >= 0 else ignore_index for index in range(_VOC_CLASSES + 1)]
    return [*((_voc_color(index), label) for index, label in enumerate(labels)), (_VOC_BORDER, ignore_index)]


def _voc_color(index: int) -> int:
    """The colour that the VOC devkit gives an index: its bits go to red, green and blue in turn, highest first."""
    channels = [0, 0, 0]
    for position in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * position + channel) & 1) << (7 - position)
    red, green, blue = channels
    return red << 16 | green << 8 | blue


def _cityscapes(num_classes: int, ignore_index: int) -> list[tuple[int, int]]:
    if num_classes != len(_CITYSCAPES):
        raise DataError(f"The palette cityscapes is for its {len(_CITYSCAPES)} classes, got {num_classes}.")
    ignored = [(int(color, 16), ignore_index) for color in _CITYSCAPES_IGNORED]
    return [*((int(color, 16), label) for label, color in enumerate(_CITYSCAPES)), *ignored]


def _binary(num_classes: int, _ignore_index: int) -> list[tuple[int, int]]:
    if num_classes != 2:
        raise DataError(f"The palette binary is for two classes, black and white, got {num_classes}.")
    return [(0, 0), (0xFFFFFF, 1)]


_BUILT_IN = {"binary": _binary, "voc": _voc, "cityscapes": _cityscapes}
