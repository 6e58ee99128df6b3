"""Texts in drawings: class names, cut and numbered where there is no font for them, and legends."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from san_hf.fonts import FONTS_ADVICE, Font, drawable, font_for


# Drawn names are cut to this many characters.
MAX_NAME_LENGTH = 40
# A legend stands below, and beside what is narrower than this many letters' height and more than twice as tall.
_ROOM = 24
_SHARE_COLOR = (90, 90, 90)


@dataclass(frozen=True)
class LegendEntry:
    """
    A class in a legend.

    Attributes:
        color: RGB, 0..255.
        name: as it is drawn, see [`drawn_name`].
        share: such as "5.0%", drawn apart from the name and in grey; "" for none.
    """

    color: Iterable[int]
    name: str
    share: str = ""


def drawn_name(label: int, name: str) -> str:
    """
    What drawings call a class: its name, in one line of at most `MAX_NAME_LENGTH` characters, or its label's number,
    "#3", if there is no font for it: see [`san_hf.fonts.font_for`].
    """
    name = drawable(name)
    if len(name) > MAX_NAME_LENGTH:
        shorter = _without_end(name, MAX_NAME_LENGTH - 1).rstrip()
        name = next((text for text in (shorter + "…", shorter) if font_for(text, 14) is not None), name)
    return name if font_for(name, 14) is not None else f"#{label}"


def numbered_names(class_names: Sequence[str], labels: Iterable[int] | None = None) -> dict[int, str]:
    """
    Names that drawings replace by their label's number, by label.

    Args:
        class_names: one for each label.
        labels: which to look at; all by default.
    """
    labels = range(len(class_names)) if labels is None else labels
    return {label: name for label in labels if drawn_name(label, name := class_names[label]) == f"#{label}" != name}


def numbers_note(names: dict[int, str]) -> str:
    """One line that says which names are drawn as numbers, and what to do."""
    listed = ", ".join(f"#{label} {name}" for label, name in names.items())
    return f"Drawn by number: {listed}. There is no font for these names here: {FONTS_ADVICE}."


def text_font(text: str, size: int) -> Font:
    """The font of a text that can be drawn; one that can't be is a mistake of the caller's."""
    font = font_for(text, size)
    if font is None:
        raise ValueError(f"There is no font for {text!r:.100}: {FONTS_ADVICE}.")
    return font


def fitted(text: str, size: int, room: float) -> str:
    """The text, cut to the room there is, in pixels; letters without a font are drawn as "?"."""
    text = drawable(text)
    if font_for(text, size) is None:
        text = "".join(letter if letter.isspace() or font_for(letter, size) else "?" for letter in text)
    if font_for(text, size) is None:
        text = "".join(letter if letter.isascii() else "?" for letter in text)
    font = text_font(text, size)
    if font.getlength(text) <= room:
        return text
    ellipsis = "…" if font_for(text + "…", size) is not None else ""
    while text and text_font(text + ellipsis, size).getlength(text + ellipsis) > room:
        text = _without_end(text, len(text) - 1)
    return text.rstrip() + ellipsis


def legend_canvas(size: tuple[int, int], entries: Sequence[LegendEntry], font_size: int) -> Image.Image:
    """
    A legend with white room for its image, at the top left: in lines below the image, or in columns on its right if it
    is tall and narrow. An image that is drawn there is in memory once.

    Args:
        size: (width, height) of the image, in pixels.
        entries: in the order in which they are listed.
        font_size: in pixels.
    """
    line, gap = font_size * 3 // 2, font_size * 2 // 3
    cells = [_Cell(entry, font_size) for entry in entries]
    widest = max(cell.width for cell in cells) + gap
    positions: list[tuple[float, float]] = []
    image_width, image_height = size
    if image_height > 2 * image_width and image_width < _ROOM * font_size:
        rows = min(max(1, (image_height - 2 * gap) // line), len(cells))
        columns = -(-len(cells) // rows)
        rows = -(-len(cells) // columns)
        size = image_width + gap + round(columns * widest), max(image_height, 2 * gap + rows * line)
        positions = [
            (image_width + gap + number // rows * widest, gap + number % rows * line) for number in range(len(cells))
        ]
    else:
        width = max(image_width, round(widest) + gap)
        x, y = float(gap), float(image_height + gap)
        for cell in cells:
            if x > gap and x + cell.width + gap > width:
                x, y = float(gap), y + line
            positions.append((x, y))
            x += cell.width + gap
        size = width, round(y) + line + gap
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for cell, (x, y) in zip(cells, positions):
        cell.draw(draw, x, y)
    return canvas


class _Cell:
    """An entry of a legend, with the room that it takes."""

    def __init__(self, entry: LegendEntry, font_size: int):
        self.entry, self.font_size = entry, font_size
        self.name_font = text_font(entry.name, font_size)
        self.share_font = text_font(entry.share, font_size)
        self.name_at = font_size * 3 // 2 - 2
        self.share_at = self.name_at + self.name_font.getlength(entry.name) + font_size * 0.5
        self.width = self.share_at + self.share_font.getlength(entry.share) + font_size * 0.5

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
        fill = tuple(int(value) for value in self.entry.color)
        top, size = y + 1, self.font_size
        draw.rectangle((x, top, x + size, top + size), fill=fill, outline=(0, 0, 0))
        middle = top + size / 2
        draw.text((x + self.name_at, middle), self.entry.name, (0, 0, 0), self.name_font, anchor="lm")
        draw.text((x + self.share_at, middle), self.entry.share, _SHARE_COLOR, self.share_font, anchor="lm")


def _without_end(text: str, length: int) -> str:
    """The first letters of a text; none is cut off its accents or what it is joined with."""
    while 0 < length < len(text) and (
        unicodedata.category(text[length]) in ("Mn", "Mc", "Me") or "\u200d" in text[length - 1 : length + 1]
    ):
        length -= 1
    return text[:length]
