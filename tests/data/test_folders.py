"""Folders as people have them: their splits, the label files in them, and what lies beside the images."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from san_hf.data import DataError, check_disjoint, load_segmentation_dataset, set_aside
from san_hf.messages import Notice
from san_hf.paths import expand_path, list_images
from tests.data.miniature_sets import bands, write_photograph, write_png


NAMES = ["sky", "road"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def build(root: Path, images: str, labels: str, *names: str) -> None:
    for name in names:
        write_photograph(root / images / f"{name}.jpg", sum(map(ord, images + name)))
        write_png(root / labels / f"{name}.png", bands([0, 1]))
    (root / "classes.txt").write_text("\n".join(NAMES))


def names_of(root: Path, split: str, **options) -> list[str]:
    return [Path(name).stem for _, _, name in load_segmentation_dataset(root, split, **options)]


LAYOUTS = {
    "split first": (("{}/images", "{}/labels"), "train", "val"),
    "split last": (("images/{}", "labels/{}"), "train", "val"),
    "mmsegmentation": (("img_dir/{}", "ann_dir/{}"), "train", "val"),
    "ADE20K": (("images/{}", "annotations/{}"), "training", "validation"),
    "masks": (("{}/images", "{}/masks"), "train", "val"),
    "VOC": (("JPEGImages", "SegmentationClass"), "train", "val"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_of_every_layout(tmp_path, layout):
    """Catches a split that isn't there and gives all images, parts that are not taken, and layouts that don't open."""
    (images, labels), first, second = LAYOUTS[layout]
    for split, names in ((first, "abc"), (second, "d")):
        build(tmp_path, images.format(split), labels.format(split), *names)
        if layout == "VOC":
            list_file = tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt"
            list_file.parent.mkdir(parents=True, exist_ok=True)
            list_file.write_text("\n".join(names))
    assert names_of(tmp_path, first) == ["a", "b", "c"] and names_of(tmp_path, second) == ["d"]
    assert names_of(tmp_path, f"{first}[1:]+{second}") == ["b", "c", "d"]
    # By the names that options have by default, too.
    assert names_of(tmp_path, "train[:2]+validation") == ["a", "b", "d"]
    for wrong in ("vlidation", "nothing[:50%]", ".."):
        with pytest.raises(DataError, match=f"has no split '.*', expected one of {first}, {second}"):
            load_segmentation_dataset(tmp_path, wrong)
    with pytest.raises(DataError, match="can't be understood: expected a name"):
        load_segmentation_dataset(tmp_path, f"{first}[x:]")


def test_a_flat_pair_and_its_share(tmp_path):
    """Catches training that is validated on itself, and a share that depends on anything but images and seed."""
    build(tmp_path, "images", "labels", *"abcdefghij")
    (tmp_path / "images" / "k.jpg").write_bytes((tmp_path / "images" / "a.jpg").read_bytes())
    write_png(tmp_path / "labels" / "k.png", bands([0, 1]))
    with pytest.raises(DataError, match="no split 'validation', expected one of train. .*validation_split=0.1"):
        load_segmentation_dataset(tmp_path, "validation")
    data = load_segmentation_dataset(tmp_path, "train")
    shares = {}
    for seed in range(8):
        training, validation = set_aside(data, 0.2, seed)
        parts = [{name for _, _, name in part} for part in (training, validation)]
        assert len(parts[0]) + len(parts[1]) == 11 and not parts[0] & parts[1] and len(parts[1]) in (2, 3)
        assert {"a.jpg", "k.jpg"} <= parts[0] or {"a.jpg", "k.jpg"} <= parts[1]
        check_disjoint(training, validation)
        shares[seed] = parts[1]
        assert {name for _, _, name in set_aside(data, 0.2, seed)[1]} == parts[1]
    assert len({frozenset(share) for share in shares.values()}) > 2
    first, last = (load_segmentation_dataset(tmp_path, part) for part in ("train[:5]", "train[5:]"))
    with pytest.raises(DataError, match=r"1 of the 6 validation images .* training images, too: k\.jpg"):
        check_disjoint(first, last)
    with pytest.warns(Notice, match="1 of the 6"):
        check_disjoint(first, last, allow=True)


def test_objects_of_datasets(tmp_path):
    """Catches objects that are taken for paths, and another split than the one that was asked for."""
    build(tmp_path, "images", "labels", *"abc")
    rows = load_segmentation_dataset(tmp_path, "train").dataset
    both = datasets.DatasetDict({"train": rows.select([0, 1]), "test": rows.select([2])})
    for source, split, expected in (
        (rows, "train", "abc"),
        (both, "train[1:]+test", "bc"),
        (rows.to_iterable_dataset(), "train", "abc"),
        (datasets.IterableDatasetDict({"test": rows.to_iterable_dataset()}), "test", "abc"),
    ):
        data = load_segmentation_dataset(source, split, class_names=NAMES)
        assert [name for _, _, name in data] == [f"{letter}.jpg" for letter in expected]
    with pytest.raises(DataError, match="no split 'val', expected one of train, test"):
        load_segmentation_dataset(both, "val", class_names=NAMES)


@pytest.mark.parametrize(("bits", "ending"), [(1, "png"), (2, "png"), (4, "png"), (5, "pgm"), (8, "png")])
def test_numbers_of_few_bits(tmp_path, bits, ending):
    """Catches labels that Pillow has scaled to 0..255."""
    build(tmp_path, "images", "labels", "a")
    (tmp_path / "labels" / "a.png").unlink()
    values = np.tile(bands([0, 1]), 1)
    file = tmp_path / "labels" / f"a.{ending}"
    if ending == "pgm":
        file.write_bytes(b"P5 30 20 31\n" + values.tobytes())
    elif bits == 1:
        Image.fromarray(values * 255).convert("1").save(file)
    else:
        Image.fromarray(values).save(file, bits=bits)
    assert np.array_equal(load_segmentation_dataset(tmp_path, "train")[0][1], values)


@pytest.mark.parametrize(("ending", "message"), [("jpg", "JPEG"), ("webp", "WEBP"), ("gif", "GIF file with a palette")])
def test_label_files_that_are_not_exact(tmp_path, ending, message):
    """Catches labels that compression made up, and indices that a writer of GIF has numbered anew."""
    build(tmp_path, "images", "labels", "a")
    (tmp_path / "labels" / "a.png").unlink()
    Image.fromarray(bands([0, 7, 12])).save(tmp_path / "labels" / f"a.{ending}")
    with pytest.raises(DataError, match=f"a.jpg .*the label map can't be read: got a {message}"):
        load_segmentation_dataset(tmp_path, "train")


def test_black_and_white(tmp_path):
    """Catches a second class that doesn't exist, as its 255 stands for no label; and smoothed edges."""
    build(tmp_path, "images", "labels", "a")
    write_png(tmp_path / "labels" / "a.png", bands([0, 255]))
    with pytest.raises(DataError, match="only 0 and 255, .* 'road' never occurs .*label_palette=binary"):
        load_segmentation_dataset(tmp_path, "train")
    with pytest.warns(Notice, match="classes that never occur .*: 'road'"):
        load_segmentation_dataset(tmp_path, "train", ignore_index=255)
    for mode in ("L", "RGB", "1"):
        Image.fromarray(bands([0, 255])).convert(mode).save(tmp_path / "labels" / "a.png")
        data = load_segmentation_dataset(tmp_path, "train", label_palette="binary")
        assert np.array_equal(data[0][1], bands([0, 1]))
    write_png(tmp_path / "labels" / "a.png", bands([0, 128, 255]))
    with pytest.raises(DataError, match="has the colours #808080, 200 pixels"):
        load_segmentation_dataset(tmp_path, "train", label_palette="binary")


@pytest.mark.parametrize(
    "palette",
    [
        {(10, 20, 30): "sky", "#ff0000": 1, "0,0,255": "ignore"},
        "name,r,g,b\nsky,10,20,30\nroad,255,0,0\nignore,0,0,255\n",
        "10 20 30\tsky\n#ff0000 road\n0 0 255 255\n",
    ],
)
def test_own_palettes(tmp_path, palette):
    """Catches colours read as another class, or as the nearest one."""
    build(tmp_path, "images", "labels", "a")
    colors = np.array([[10, 20, 30], [255, 0, 0], [0, 0, 255]], np.uint8)
    Image.fromarray(colors[bands([0, 1, 2])]).save(tmp_path / "labels" / "a.png")
    if isinstance(palette, str):
        (tmp_path / "colors.txt").write_text(palette)
        palette = tmp_path / "colors.txt"
    data = load_segmentation_dataset(tmp_path, "train", label_palette=palette)
    assert np.array_equal(data[0][1], bands([0, 1, 255]))
    with pytest.raises(DataError, match="got a RGB image, .*label_palette"):
        load_segmentation_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("palette", "count", "colors", "labels"),
    [
        ("voc", 20, [(0, 0, 0), (128, 0, 0), (0, 64, 128), (224, 224, 192)], [255, 0, 19, 255]),
        ("voc", 21, [(0, 0, 0), (128, 0, 0), (0, 64, 128), (224, 224, 192)], [0, 1, 20, 255]),
        ("cityscapes", 19, [(128, 64, 128), (119, 11, 32), (0, 0, 0)], [0, 18, 255]),
    ],
)
def test_usual_palettes(tmp_path, palette, count, colors, labels):
    """Catches a benchmark's colours under another label."""
    build(tmp_path, "images", "labels", "a")
    image = Image.fromarray(np.array(colors, np.uint8)[bands(list(range(len(colors))))])
    image.convert("RGBA").save(tmp_path / "labels" / "a.png")
    names = [f"class {number}" for number in range(count)]
    data = load_segmentation_dataset(tmp_path, "train", class_names=names, label_palette=palette)
    assert np.array_equal(data[0][1], bands(labels))


def test_listings(tmp_path):
    """Catches linked folders passed over, loops that don't end, waits for a FIFO, and files left out unsaid."""
    build(tmp_path / "set", "images", "labels", "a")
    build(tmp_path / "disk", "images", "labels", "b")
    for kind in ("images", "labels"):
        folder = tmp_path / "set" / kind
        (folder / "more").symlink_to(tmp_path / "disk" / kind)
        (folder / "loop").symlink_to(folder)
        (folder / "itself").symlink_to("itself")
    images = tmp_path / "set" / "images"
    os.mkfifo(images / "pipe.png")
    (images / "c.heic").write_bytes(b"")
    listing = list_images(images)
    assert [path.relative_to(images).as_posix() for path in listing.files] == ["a.jpg", "more/b.jpg"]
    for left_out in ("pipe.png", "c.heic", "itself", "loop"):
        assert left_out in listing.describe_left_out()
    with pytest.warns(Notice, match="c.heic"):
        assert names_of(tmp_path / "set", "train") == ["a", "b"]


def test_paths(monkeypatch, tmp_path):
    """Catches `~` and variables taken for names of folders, and a name with a dollar taken for a variable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "set")
    build(tmp_path / "set", "images", "labels", "a")
    assert names_of("~/$DATA", "train") == ["a"]
    monkeypatch.chdir(tmp_path)
    Path("price$DATA").touch()
    assert expand_path("price$DATA") == "price$DATA"
    with pytest.raises(ValueError, match="variable NOWHERE, which isn't set"):
        expand_path("${NOWHERE}/x")
