"""Texts in drawings: letters without a font become numbers, and legends fit the image."""

import numpy as np
import pytest
from PIL import Image

from san_hf import fonts
from san_hf.colors import name_colors
from san_hf.fonts import font_for
from san_hf.legend import drawn_name, numbered_names, numbers_note
from san_hf.visualization import draw_overlay


# Chinese, Japanese, Korean, Thai, Hindi, Arabic, emoji.
ELSEWHERE = ["猫", "いぬ", "나무", "แมว", "बिल्ली", "قطة", "🐈 cat"]


@pytest.fixture
def bare_system(monkeypatch):
    """A machine without fonts: Pillow's own is left."""

    def clear():
        for cached in (fonts._font_files, fonts._file_for, fonts._has_glyph):
            cached.cache_clear()

    monkeypatch.setattr(fonts, "_system_folders", list)
    clear()
    yield
    monkeypatch.undo()
    clear()


def test_names_without_a_font_become_numbers(bare_system):
    """Catches boxes, which all look alike, and names that are lost: those drawn as numbers are listed."""
    names = ["sky", *ELSEWHERE, "red house"]
    assert [drawn_name(label, name) for label, name in enumerate(names)] == [
        "sky",
        *(f"#{label}" for label in range(1, 8)),
        "red house",
    ]
    numbered = numbered_names(names)
    assert numbered == dict(zip(range(1, 8), ELSEWHERE))
    assert "#1 猫, #2 いぬ" in numbers_note(numbered)
    image = Image.new("RGB", (640, 480))
    label_map = np.arange(640)[None].repeat(480, axis=0) * len(names) // 640
    assert draw_overlay(image, label_map, names).width == 640


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_drawn_has_a_glyph_for_each_letter(name):
    """Catches a font that has some of the letters, or boxes for all: no two letters may look alike."""
    font = font_for(name, 24)
    if font is None:
        assert drawn_name(5, name) == "#5"
    else:
        letters = [letter for letter in name if letter.isalpha()]
        drawn = {letter: bytes(font.getmask(letter)) for letter in letters}
        assert all(any(pixels) for pixels in drawn.values())
        assert len(set(drawn.values())) == len(drawn) and bytes(font.getmask("\ufdd0")) not in drawn.values()


def test_letters_without_a_picture(bare_system):
    """Catches line breaks and invisible letters drawn as boxes, or a name that they turn into a number."""
    assert drawn_name(0, "a\nb\t \u200bc\ufeff") == "a b c"
    assert drawn_name(0, "x" * 500) == drawn_name(0, "x" * 41) != f"{'x' * 41}"


@pytest.mark.parametrize("size", [(8000, 10), (800, 10), (60, 3000), (6, 8), (640, 480), (3000, 2000)])
def test_legends_keep_their_proportion(size):
    """Catches a legend that dwarfs a thin image, or that none can read below a large one."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    label_map = x * 2 // width + 2 * (y * 2 // height)
    picture = draw_overlay(Image.new("RGB", size), label_map, ["sky", "grass", "red house", "striped fish"])
    factor = max(1, round(640 / max(size)))
    # A line or two of text below, or a column beside.
    assert picture.height - height * factor <= max(60, 0.2 * height * factor)
    assert picture.width - width * factor <= max(200, 0.2 * width * factor)
    assert picture.height - height * factor >= 20 or picture.width - width * factor >= 100


def test_outlines_leave_fine_masks():
    """Catches outlines that cover what they go around: every pixel of noise has its class's tint."""
    label_map = np.random.default_rng(0).integers(0, 5, (480, 640))
    names = [f"class {label}" for label in range(5)]
    picture = np.asarray(draw_overlay(Image.new("RGB", (640, 480)), label_map, names, opacity=1.0))[:480]
    same = (picture == name_colors(names)[label_map]).all(axis=-1)
    assert same.mean() > 0.97  # the rest are names
