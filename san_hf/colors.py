"""Colours of classes: which one a name gets, how far apart they are to any eye, and colours that are given."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import ImageColor

from san_hf.json_files import parse_json, read_text
from san_hf.messages import one_line


OTHER_COLOR = (128, 128, 128)
# What a colour may be given as: "#87ceeb", a name that Pillow knows, or three integers 0..255.
Color = str | Sequence[int]
# What eyes without one kind of cone see of linear RGB: Machado, Oliveira and Fernandes, "A Physiologically-based Model
# for Simulation of Color Vision Deficiency", IEEE TVCG 15(6), 2009; severity 1.0.
COLOR_BLINDNESS = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# The first twelve colours and grey are at least 0.11 apart in Oklab for each kind of eye (a just noticeable difference
# is about 0.02), with lightness 0.42 to 0.92 and chroma 0.06 to 0.25. Found by exchanging one colour at a time from
# random starts; in an order in which each is far from those before it.
_FIRST = (
    (90, 0, 195),
    (180, 255, 0),
    (255, 45, 45),
    (195, 150, 255),
    (105, 180, 165),
    (255, 150, 0),
    (240, 210, 165),
    (180, 15, 0),
    (105, 60, 90),
    (60, 105, 165),
    (120, 225, 255),
    (195, 75, 240),
)
# Names try for a colour of the first group, then for one of the next: see `name_colors`.
_GROUPS = (0, 12, 36, 108, 324, 1000)
# Colours of names keep away from given colours by this much.
_ALIKE = 0.08


def class_colors(num_classes: int) -> np.ndarray:
    """
    Colours by index: the first twelve are told apart by people with any of the common kinds of colour blindness, too;
    each later one is as far as can be from all before it. None is near `OTHER_COLOR`, black or white.

    Args:
        num_classes: how many. From index 1,000 on they repeat.

    Returns:
        `np.ndarray` of shape (num_classes, 3), uint8 RGB.
    """
    palette = _palette(_size_for(num_classes))
    return palette[np.arange(num_classes) % len(palette)]


def name_colors(class_names: Sequence[str], given: Mapping[str, Color] | None = None) -> np.ndarray:
    """
    Colours by name: the same one in every run, and in every vocabulary but where two names want the same.

    A name's hash chooses among the first twelve of [`class_colors`]. Where that one is taken, the next free one
    follows, and where all twelve are taken, one of the next 24, 72, ... The first twelve names choose before the
    others, so that they are told apart by everybody; otherwise the order of the names doesn't matter. Neither do
    capitals and spaces around a name.

    Args:
        class_names: one for each label.
        given: colours by name, for those that are to have their own; other names in it are ignored. Names without one
            get no colour that is near a given one.

    Returns:
        `np.ndarray` of shape (len(class_names), 3), uint8 RGB.

    Raises:
        ValueError: a given colour that is none.
    """
    chosen = {_key(name): parse_color(color, name) for name, color in (given or {}).items()}
    keys = [_key(name) for name in class_names]
    colors = np.zeros((len(keys), 3), dtype=np.uint8)
    palette = _palette(_size_for(2 * len(keys) + 24))  # more than are needed, as given colours block some
    taken = np.zeros(len(palette), dtype=bool)
    for color in {chosen[key] for key in keys if key in chosen}:
        taken |= np.linalg.norm(oklab(palette) - oklab(np.array(color)), axis=-1) < _ALIKE
    hashes = [int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") for key in keys]
    first = _GROUPS[1]
    for label in sorted(range(len(keys)), key=lambda label: (label >= first, hashes[label], label)):
        if keys[label] in chosen:
            colors[label] = chosen[keys[label]]
            continue
        if taken.all():
            taken[:] = False
        slot = _free_slot(hashes[label], taken)
        taken[slot] = True
        colors[label] = palette[slot]
    return colors


def parse_color(color: Color, name: str = "") -> tuple[int, int, int]:
    """
    A colour as (red, green, blue), each 0..255.

    Args:
        color: "#rgb", "#rrggbb", "rgb(135, 206, 235)", the name of an HTML colour, or three integers 0..255.
        name: what it is the colour of, for the message.

    Raises:
        ValueError: anything else.
    """
    try:
        values = ImageColor.getrgb(color.strip()) if isinstance(color, str) else tuple(color)
        if len(values) == 3 and all(
            isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= value <= 255
            for value in values
        ):
            return int(values[0]), int(values[1]), int(values[2])
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"Got {color!r:.100} as the colour{f' of {name!r:.100}' if name else ''}, expected three whole numbers from 0 "
        'to 255, or a text such as "#87ceeb" or "skyblue".'
    )


def read_colors(file: str | os.PathLike) -> dict[str, tuple[int, int, int]]:
    """
    Colours by name, from a file: text with `name=colour` in each line, or JSON, {"sky": "#87ceeb", "grass": [0, 128,
    0]}; also the JSON that `san-hf segment --format json` writes.

    Raises:
        ValueError: it can't be read, or isn't such a file.
    """
    expected = 'expected lines such as sky=#87ceeb, or JSON such as {"sky": "#87ceeb"}'
    where = f"The file of colours '{os.fspath(file)}'"
    try:
        text = read_text(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} can't be read: {one_line(error)}.") from error
    if os.fspath(file).lower().endswith(".json"):
        content = parse_json(text, where)
        if isinstance(content, dict) and isinstance(content.get("classes"), list):
            entries = content["classes"]
            if all(isinstance(entry, dict) and {"name", "color"} <= entry.keys() for entry in entries):
                content = {entry["name"]: entry["color"] for entry in entries}
    else:
        content = dict(split_color(line, where) for line in text.splitlines() if line.strip())
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no colours by name: {expected}.")
    try:
        return {str(name): parse_color(color, str(name)) for name, color in content.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def split_color(text: str, where: str) -> tuple[str, str]:
    """
    Name and colour of "name=colour". A name may have an equals sign, a colour has none.

    Raises:
        ValueError: no such text; `where` says whose it is.
    """
    name, sign, color = text.rpartition("=")
    if not (sign and name.strip() and color.strip()):
        raise ValueError(f"{where} has {text.strip()!r:.100}, expected name=colour, such as sky=#87ceeb.")
    return name.strip(), color.strip()


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..255 as Oklab, where distance is about difference to the eye (Ottosson 2020)."""
    cones = _linear(rgb) @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def as_seen_with(kind: str, rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..255 as it is seen with a kind of `COLOR_BLINDNESS`, float sRGB in 0..255."""
    linear = (_linear(rgb) @ np.transpose(COLOR_BLINDNESS[kind])).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _linear(rgb: np.ndarray) -> np.ndarray:
    srgb = np.asarray(rgb) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _size_for(count: int) -> int:
    """The first group's end up to which there are as many colours."""
    return next((stop for stop in _GROUPS[1:] if stop >= count), _GROUPS[-1])


@cache
def _palette(size: int) -> np.ndarray:
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Neither near black or white nor near grey, and not so glaring that an image can't be seen through them.
    lightness, *ab = oklab(candidates).T
    chroma = np.hypot(*ab)
    candidates = candidates[(lightness > 0.42) & (lightness < 0.92) & (chroma > 0.06) & (chroma < 0.25)]
    seen = _seen_by_all(candidates)
    distance = np.full(len(candidates), np.inf)
    for color in (OTHER_COLOR, *_FIRST):
        distance = np.minimum(distance, _difference(seen, _seen_by_all(np.array([color]))))
    chosen: list[int] = []
    while len(_FIRST) + len(chosen) < size:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _difference(seen, seen[:, chosen[-1:]]))
    return np.concatenate([_FIRST, candidates[chosen]]).astype(np.uint8)


def _seen_by_all(rgb: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB as (1 + kinds, N, 3) Oklab: first as most people see it, then with each kind of colour blindness."""
    return oklab(np.stack([rgb, *(as_seen_with(kind, rgb) for kind in COLOR_BLINDNESS)]))


def _difference(seen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """
    How well colours are told apart from another one: the least squared distance. Without a kind of cone there are
    fewer colours to choose from: what most people see counts by a third, so that to them many classes still differ.
    """
    squared = np.square(seen - other).sum(axis=-1)
    squared[0] *= 0.35**2
    return squared.min(axis=0)


def _free_slot(number: int, taken: np.ndarray) -> int:
    for start, stop in zip(_GROUPS, _GROUPS[1:]):
        if stop > len(taken):
            break
        size = stop - start
        slots = start + (number % size + np.arange(size)) % size
        free = slots[~taken[slots]]
        if len(free):
            return int(free[0])
    raise ValueError("No colour is left.")


def _key(name: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
