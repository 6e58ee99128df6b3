"""Colours, class maps and overlays, by their pixels."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from scipy import ndimage

from san_hf import visualization
from san_hf.colors import class_colors, name_colors
from san_hf.visualization import colorize, count_labels, draw_overlay


GREY = Image.new("RGB", (640, 480), (90, 90, 90))


def test_colorize():
    """Catches swapped axes, swapped channels and labels beyond 8 bits."""
    colors = class_colors(300)
    label_map = np.array([[0, 1, 299], [256, 1, 0]])
    picture = colorize(label_map, colors)
    assert picture.size == (3, 2) and picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), colors[label_map])


@pytest.mark.parametrize("labels", [[[0, 3]], [[-1, 0]], [0, 1], np.zeros((0, 4), int)])
def test_colorize_refuses(labels):
    """Catches an index that wraps around or an IndexError from the depths."""
    with pytest.raises(ValueError, match=r"label map"):
        colorize(np.array(labels), class_colors(3))


@pytest.mark.parametrize("opacity", [0.0, 0.25, 1.0])
def test_overlay_blends(opacity):
    """Catches a tint of the wrong strength or of the wrong region."""
    label_map = np.zeros((480, 640), int)
    label_map[:, 320:] = 1
    picture = np.asarray(draw_overlay(GREY, label_map, [" ", " "], opacity=opacity))
    for x, label in ((100, 0), (500, 1)):
        expected = (1 - opacity) * 90 + opacity * name_colors([" ", " "])[label]
        np.testing.assert_allclose(picture[50, x], expected, atol=1)
    assert (picture[50, 319:322] == 255).all(axis=-1).any()  # the outline


def name_pixels(label_map, names, label):
    """Where the picture above the legend changes when one class has no name: (H, W) booleans."""
    image = Image.fromarray(np.full((*label_map.shape, 3), 90, np.uint8))
    blank = [" " if i == label else name for i, name in enumerate(names)]
    height = label_map.shape[0]
    colors = class_colors(len(names))
    one, other = (np.asarray(draw_overlay(image, label_map, n, colors))[:height] for n in (names, blank))
    return (one[:, : label_map.shape[1]] != other[:, : label_map.shape[1]]).any(axis=-1)


def test_a_name_stands_inside_its_largest_region():
    """Catches names at the centre of mass (outside of a ring), in a small region, or over the edge of the picture."""
    y, x = np.mgrid[:480, :640]
    radius = np.hypot(y - 240, x - 300)
    ring = (radius > 110) & (radius < 220)
    label_map = ring.astype(int)
    label_map[:40, 560:] = 1  # a smaller piece of the same class
    changed = name_pixels(label_map, ["ground", "ring"], 1)
    assert changed.sum() > 50
    assert ring[changed].all()


def test_a_name_without_room_is_left_out():
    """Catches names that spill over their neighbours."""
    label_map = np.zeros((480, 640), int)
    label_map[200:206, 100:500] = 1
    assert not name_pixels(label_map, ["ground", "wire"], 1).any()
    assert name_pixels(label_map, ["ground", "wire"], 0).any()


def test_legend_lists_the_largest_first():
    """Catches a legend in another order, with classes that aren't there, or with another class's colour."""
    label_map = np.zeros((480, 640), int)
    label_map[:, 100:] = 3
    label_map[:, 600:] = 1
    names = ["small", "smaller", "absent", "large"]
    legend = np.asarray(draw_overlay(GREY, label_map, names))[480:]
    colors = name_colors(names)
    first_column = {}
    for label in range(4):
        columns = (legend == colors[label]).all(axis=-1).any(axis=0).nonzero()[0]
        if len(columns):
            first_column[label] = columns[0]
    assert sorted(first_column, key=first_column.get) == [3, 0, 1]


def test_small_pictures_are_enlarged_by_a_whole_factor():
    """Catches names drawn into a picture of thumb size, and regions that move when it is enlarged."""
    label_map = np.zeros((48, 64), int)
    label_map[:, 32:] = 1
    picture = draw_overlay(Image.new("RGB", (64, 48)), label_map, [" ", " "], opacity=1.0)
    assert picture.width == 640 and picture.height > 480
    picture = np.asarray(picture)
    colors = name_colors([" ", " "])
    np.testing.assert_array_equal(picture[100, 315], colors[0])
    np.testing.assert_array_equal(picture[100, 325], colors[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2)])
def test_thin_pictures(size):
    """Catches divisions by nothing and empty slices."""
    picture = draw_overlay(Image.new("RGB", size), np.zeros(size[::-1], int), ["something " * 40])
    assert picture.width >= size[0] and picture.height >= size[1]
    assert picture.width > size[0] or picture.height > size[1]  # the legend


def test_names_in_any_writing():
    """Catches crashes on line breaks, other alphabets and emoji."""
    names = ["new\nline", "猫", "Straße", "🐈", "x" * 500]
    label_map = np.arange(640)[None].repeat(480, axis=0) // 128
    assert draw_overlay(GREY, label_map, names).width >= 640


@pytest.mark.parametrize(
    "label_map, names, message",
    [
        (np.zeros((640, 480), int), ["a"], "same size"),
        (np.ones((480, 640), int), ["a"], "only 0..0 have colours"),
    ],
)
def test_overlay_refuses(label_map, names, message):
    """Catches a transposed label map that is drawn nevertheless, and labels without a name."""
    with pytest.raises(ValueError, match=message):
        draw_overlay(GREY, label_map, names)


def test_pillow_has_a_font_that_scales():
    """Catches a Pillow built without FreeType, where names would be drawn in a tiny fixed font."""
    assert isinstance(ImageFont.load_default(20), ImageFont.FreeTypeFont)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (40, 7), (90, 123), (60, 1600)])
@pytest.mark.parametrize("labels", [2, 300])
def test_outlines_are_those_of_plain_filters(size, labels):
    """Catches outlines that a faster way of finding them moves, at edges of the image or with labels beyond a byte."""
    block = 60 if max(size) >= 1500 else 17
    blocks = np.random.default_rng(0).integers(0, labels, [-(-side // block) for side in size])
    label_map = blocks.repeat(block, 0).repeat(block, 1)[: size[0], : size[1]]
    names = [f"n{label}" for label in range(labels)]
    image = Image.new("RGB", size[::-1], (100, 100, 100))
    drawn = np.asarray(draw_overlay(image, label_map, names, np.full((labels, 3), 100, np.uint8)))

    factor, width = max(1, round(640 / max(size))), 3 if max(size) >= 1500 else 1
    large = label_map.repeat(factor, 0).repeat(factor, 1)

    def lies_in_square(side):
        alike = ndimage.minimum_filter(large, side, mode="nearest") == ndimage.maximum_filter(
            large, side, mode="nearest"
        )
        return ndimage.maximum_filter(alike, side, mode="nearest")

    wide, seen, edges = lies_in_square(16 * width + 1), lies_in_square(4 * width + 1), np.zeros(large.shape, bool)
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        border = large[before] != large[after]
        edges[after] |= border & wide[after] & seen[before]
        edges[before] |= border & wide[before] & seen[after] & ~wide[after]
    expected = ndimage.maximum_filter(edges, width) & wide
    drawn = drawn[: large.shape[0], : large.shape[1]]
    # Names are white, too, in black.
    elsewhere = ~ndimage.maximum_filter((drawn < 50).all(-1), 15)
    np.testing.assert_array_equal((drawn == 255).all(-1)[elsewhere], expected[elsewhere])
    assert expected[elsewhere].any() or max(size) < 90


@pytest.mark.parametrize("size", [(1700, 900), (500, 60), (60, 700)])
@pytest.mark.parametrize("rows", [7, 384])
def test_bands_leave_no_trace(size, rows, monkeypatch):
    """Catches a seam in outlines, tint or class map where one band of rows ends and the next begins."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 300, (-(-size[1] // 70), -(-size[0] // 90)))
    label_map = blocks.repeat(70, 0).repeat(90, 1)[: size[1], : size[0]]
    label_map[rng.integers(0, size[1], 60), rng.integers(0, size[0], 60)] = 0
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    names, colors = [f"n{label}" for label in range(300)], class_colors(300)

    def draw():
        return [np.asarray(draw_overlay(image, label_map, names)), np.asarray(colorize(label_map, colors))]

    monkeypatch.setattr(visualization, "ROWS_AT_ONCE", 10**6)
    whole = draw()
    monkeypatch.setattr(visualization, "ROWS_AT_ONCE", rows)
    for parts, expected in zip(draw(), whole, strict=True):
        np.testing.assert_array_equal(parts, expected)
    np.testing.assert_array_equal(count_labels(label_map, 301), np.bincount(label_map.ravel(), minlength=301))
