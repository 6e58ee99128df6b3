"""Colours of classes: apart to any eye, the same for a name everywhere, and given ones."""

import json

import numpy as np
import pytest

from san_hf.colors import COLOR_BLINDNESS, OTHER_COLOR, as_seen_with, class_colors, name_colors, oklab, read_colors
from san_hf.vocabularies import load_vocabulary


STREET = ["road", "car", "tree", "sky", "building", "person"]


@pytest.mark.parametrize("kind", [None, *COLOR_BLINDNESS])
def test_the_first_twelve_are_told_apart_by_everybody(kind):
    """Catches red beside green of equal lightness: a just noticeable difference in Oklab is about 0.02."""
    colors = np.concatenate([class_colors(12), [OTHER_COLOR]])
    lab = oklab(colors if kind is None else as_seen_with(kind, colors))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(13, dtype=bool)]
    assert distances.min() > 0.11


def test_known_colors_of_oklab():
    """Catches swapped matrices: values of Ottosson's page (2020), white and the three primaries."""
    known = {(255, 255, 255): (1, 0, 0), (255, 0, 0): (0.628, 0.2249, 0.1258), (0, 0, 255): (0.452, -0.0325, -0.3115)}
    for rgb, expected in known.items():
        np.testing.assert_allclose(oklab(np.array(rgb)), expected, atol=1e-3)
    # Greys are seen as they are by everybody.
    for kind in COLOR_BLINDNESS:
        np.testing.assert_allclose(as_seen_with(kind, np.array([128, 128, 128])), 128, atol=0.5)


def test_by_index():
    """Catches repeated colours, and colours that change when a class is added."""
    colors = class_colors(847)
    assert len(np.unique(colors, axis=0)) == 847
    np.testing.assert_array_equal(class_colors(7), colors[:7])
    np.testing.assert_array_equal(class_colors(2500)[2000:], class_colors(500))


def test_a_name_keeps_its_color():
    """Catches colours that follow the order, the capitals or the other names of a list."""
    colors = dict(zip(STREET, name_colors(STREET).tolist()))
    turned = STREET[::-1]
    assert dict(zip(turned, name_colors(turned).tolist())) == colors
    assert name_colors([f" {name.upper()} " for name in STREET]).tolist() == list(colors.values())
    # Alone, each has the colour it asks for first; in a list most do.
    kept = [name_colors([name])[0].tolist() == colors[name] for name in STREET]
    assert sum(kept) >= len(STREET) / 2


@pytest.mark.parametrize("name", ["coco-stuff", "ade20k-847"])
def test_no_two_names_of_a_benchmark_share_a_color(name):
    """Catches hashes that meet."""
    names = load_vocabulary(name)
    assert len(np.unique(name_colors(names), axis=0)) == len(names)


def test_up_to_twelve_names_have_the_colors_for_everybody():
    """Catches names that get a later colour while one of the first twelve is free."""
    names = load_vocabulary("coco-stuff")
    first = {tuple(color) for color in class_colors(12).tolist()}
    assert {tuple(color) for color in name_colors(names[:12]).tolist()} == first
    assert {tuple(color) for color in name_colors(names)[:12].tolist()} == first


def test_given_colors():
    """Catches given colours that are ignored, or that another class has, too."""
    given = {"Sky": "#87ceeb", "road": [0, 0, 0], "elsewhere": "red"}
    colors = name_colors(STREET, given)
    assert colors[3].tolist() == [135, 206, 235] and colors[0].tolist() == [0, 0, 0]
    lab = oklab(colors)
    others = [index for index in range(len(STREET)) if index != 3]
    assert np.linalg.norm(lab[others] - lab[3], axis=-1).min() > 0.05


@pytest.mark.parametrize("color", ["#12", "blurple", [1, 2], [0, 0, 256], [0, 0, 1.5], [True, 0, 0], None, 7, ""])
def test_what_is_no_color(color):
    """Catches a stack trace from Pillow, and numbers that wrap around."""
    with pytest.raises(ValueError, match=r"the colour of 'sky', expected three whole numbers"):
        name_colors(["sky"], {"sky": color})


@pytest.mark.parametrize(
    "file, content",
    [
        ("a.txt", "sky=#87ceeb\n\n grass = green\na=b=rgb(1, 2, 3)\n"),
        ("a.json", json.dumps({"sky": "#87ceeb", "grass": [0, 128, 0], "a=b": "#010203"})),
        (
            "b.json",
            json.dumps(
                {
                    "classes": [
                        {"name": "sky", "color": "#87ceeb"},
                        {"name": "grass", "color": "#008000"},
                        {"name": "a=b", "color": "#010203"},
                    ]
                }
            ),
        ),
    ],
)
def test_files_of_colors(tmp_path, file, content):
    """Catches names cut at another equals sign, and the command's own JSON refused."""
    (tmp_path / file).write_text(content)
    assert read_colors(tmp_path / file) == {"sky": (135, 206, 235), "grass": (0, 128, 0), "a=b": (1, 2, 3)}


@pytest.mark.parametrize(
    "file, content",
    [
        ("a.txt", b"sky\n"),
        ("a.txt", b"sky=\n"),
        ("a.txt", b"sky=blurple\n"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.json", b"[1, 2]"),
        ("a.json", b"{"),
        ("a.json", b'{"sky": {"a": 1}}'),
        ("a.json", b"[" * 100_000),
        ("a.txt", b"x" * (1 << 20) + b"x"),
    ],
)
def test_files_that_hold_no_colors(tmp_path, file, content):
    """Catches a stack trace, and an error that doesn't name the file."""
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        read_colors(tmp_path / file)
