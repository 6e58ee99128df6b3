"""Fonts for texts of any script, checked letter by letter: what no font can write is never drawn as boxes."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS_ADVICE = "install fonts for them on your system, such as Noto (on Debian and Ubuntu: fonts-noto)"
_ENDINGS = (".ttf", ".otf", ".ttc")
# Plain fonts come before those whose names have one of these, and fonts with many scripts before all others.
_ODD = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "medium", "display")
_BROAD = ("dejavusans", "notosans", "arialunicode", "arial", "segoeui", "msyh", "malgun", "notoemoji", "symbola")
# A font that has boxes for all characters there are.
_LAST_RESORT = "lastresort"
# No character, and never will be one: fonts draw for it what they draw for all that they lack.
_NOT_A_CHARACTER = "\ufdd0"
_JOINERS = "\u200c\u200d"
# A size at which glyphs differ.
_CHECKED_SIZE = 24


def font_for(text: str, size: int) -> Font | None:
    """
    The first font that has a glyph for every letter of a text: Pillow's own, then those of the system.

    Args:
        text: one line. Scripts whose letters join, stack or run from right to left need Pillow with libraqm, too.
        size: in pixels.

    Returns:
        The font, or `None` if there is none, and the text can't be drawn.
    """
    file = _file_for(drawable(text))
    return None if file is None else _load(file, size)


def drawable(text: str) -> str:
    """The text as fonts know it: letters and their accents as one character, without what has no glyph."""
    composed = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(
        letter for letter in composed if letter in _JOINERS or not (_is_format(letter) or _is_variation(letter))
    )


def font_files() -> list[str]:
    """Files of the system's fonts, plain ones first."""
    return list(_font_files())


@cache
def _font_files() -> tuple[str, ...]:
    found: dict[str, str] = {}
    for folder in _system_folders():
        for path, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(_ENDINGS) and _LAST_RESORT not in name.lower():
                    found.setdefault(name.lower(), os.path.join(path, name))

    def rank(name: str) -> tuple[int, int, str]:
        plain = name.replace("-", "").replace(" ", "")
        broad = [number for number, start in enumerate(_BROAD) if plain.startswith(start)]
        return sum(odd in plain for odd in _ODD), broad[0] if broad else len(_BROAD), name

    return tuple(found[name] for name in sorted(found, key=rank))


def _system_folders() -> Iterator[Path]:
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"
        yield Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft" / "Windows" / "Fonts"
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts")
    else:
        yield home / ".fonts"
        yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "fonts"
        for folder in (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":"):
            yield Path(folder) / "fonts"


@cache
def _file_for(text: str) -> str | None:
    """The file of the font for a text; "" for Pillow's own."""
    if _needs_shaping(text) and not features.check("raqm"):
        return None
    letters = sorted({letter for letter in text if not letter.isspace() and letter not in _JOINERS})
    for file in ("", *font_files()):
        if all(_has_glyph(file, letter) for letter in letters):
            return file
    return None


@cache
def _has_glyph(file: str, letter: str) -> bool:
    if unicodedata.category(letter) in ("Cc", "Cs", "Cn"):
        return False
    try:
        font = _load(file, _CHECKED_SIZE, shaped=False)
        glyph, missing = (_pixels(font, text) for text in (letter, _NOT_A_CHARACTER))
    # A font of bitmaps in sizes of its own, or a broken file.
    except (OSError, ValueError):
        return False
    return any(glyph) and glyph != missing


def _pixels(font: Font, letter: str) -> bytes:
    image = Image.new("L", (4 * _CHECKED_SIZE, 3 * _CHECKED_SIZE))
    # Accents may stand to the left of where they are drawn.
    ImageDraw.Draw(image).text((_CHECKED_SIZE, _CHECKED_SIZE), letter, 255, font)
    return image.tobytes()


@cache
def _load(file: str, size: int, shaped: bool = True) -> Font:
    if not file:
        return ImageFont.load_default(size)
    engine = None if shaped else ImageFont.Layout.BASIC
    font = ImageFont.truetype(file, size, layout_engine=engine)
    try:
        # Fonts whose weight can be chosen are thin by default, some of them.
        axes = font.get_variation_axes()
        defaults = [float(axis["default"] or 0) for axis in axes]
        font.set_variation_by_axes([400.0 if axis["name"] == b"Weight" else d for axis, d in zip(axes, defaults)])
    except (OSError, NotImplementedError):
        pass
    return font


def _needs_shaping(text: str) -> bool:
    """Whether letters of a text join, stack or run from right to left."""
    return any(
        letter in _JOINERS
        or unicodedata.bidirectional(letter) in ("R", "AL", "AN")
        or unicodedata.category(letter) in ("Mn", "Mc", "Me")
        # Skin tones, and the halves of flags.
        or "\U0001f3fb" <= letter <= "\U0001f3ff"
        or "\U0001f1e6" <= letter <= "\U0001f1ff"
        for letter in text
    )


def _is_format(letter: str) -> bool:
    return unicodedata.category(letter) == "Cf"


def _is_variation(letter: str) -> bool:
    return "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef"
