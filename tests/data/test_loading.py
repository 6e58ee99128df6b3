"""Data sets from folders, files and columns: what comes out, and what is said of data that can't be used."""

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from san_hf.data import DataError, load_segmentation_dataset, read_class_names
from san_hf.modeling import SANImageProcessorPil
from tests.data.miniature_sets import bands, orientation, write_photograph, write_png


NAMES = ["sky", "road", "car"]
LABELS = {"a": bands([0, 1, 255]), "b/c": bands([2, 2, 1]), "d": bands([255, 0, 2])}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def build_pairs(images: Path, labels: Path) -> None:
    for seed, (stem, label_map) in enumerate(LABELS.items()):
        write_photograph(images / f"{stem}.jpg", seed)
        write_png(labels / f"{stem}.png", label_map)


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder with images/ and labels/ in train/, and a class list."""
    folder = tmp_path / "streets"
    build_pairs(folder / "train" / "images", folder / "train" / "labels")
    (folder / "classes.txt").write_text("sky\nroad\ncar\n\n")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "places", [("train/images", "train/labels"), ("images/train", "labels/train"), ("images", "labels")]
)
def test_pairs_of_folders(tmp_path, places, streaming):
    """Catches images with the labels of others, files of sub-folders left out, and hidden files taken for images."""
    build_pairs(*(tmp_path / place for place in places))
    (tmp_path / places[0] / ".hidden.jpg").write_bytes(b"")
    (tmp_path / places[0] / "Thumbs.db").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    data = load_segmentation_dataset(tmp_path, "train", streaming=streaming)
    assert (data.class_names, data.ignore_index, data.split) == (NAMES, 255, "train")
    examples = list(data)
    assert [name for _, _, name in examples] == [f"{stem}.jpg" for stem in LABELS]
    for (image, label_map, name), expected in zip(examples, LABELS.values()):
        assert label_map.dtype == np.int32 and np.array_equal(label_map, expected)
        with Image.open(tmp_path / places[0] / name) as stored:
            assert image.mode == "RGB" and np.array_equal(image, stored)
    if not streaming:
        assert len(data) == 3 and np.array_equal(data[-1][1], examples[-1][1])


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "upright"])
def test_images_are_what_the_processor_sees(pairs, mode):
    """Catches training on other pixels than inference sees: alpha as black, 16 bits cut off, an image on its side."""
    file = pairs / "train" / "images" / "a.jpg"
    write_photograph(file, 5)
    with Image.open(file) as image:
        if mode == "upright":
            image = image.transpose(Image.Transpose.ROTATE_90)
            image.save(file, exif=orientation(6))
        else:
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 250 + 7)
            elif mode in ("RGBA", "LA"):
                image = image.convert(mode)
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            else:
                image = image.convert(mode)
            file.unlink()
            file = file.with_suffix(".jpg" if mode == "CMYK" else ".png")
            image.save(file)
    seen, _, _ = load_segmentation_dataset(pairs, "train")[0]
    expected = SANImageProcessorPil().process_image(str(file), do_convert_rgb=True, do_rescale=True)
    assert seen.mode == "RGB" and seen.size == (30, 20)
    assert np.array_equal(np.asarray(seen), np.moveaxis(expected, 0, -1))


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "1"])
def test_label_images(pairs, mode):
    """Catches palettes' colours or a scaled 16-bit range taken for labels."""
    file = pairs / "train" / "labels" / ("a.tiff" if mode == "I" else "a.png")
    file.with_suffix(".png").unlink()
    values = bands([0, 1, 1])
    if mode == "P":
        write_png(file, values, palette=True)
    elif mode == "1":
        Image.fromarray(values * 255).convert("1").save(file)
    else:
        Image.fromarray(values.astype({"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode])).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
    assert np.array_equal(load_segmentation_dataset(pairs, "train")[0][1], values)


def test_16_bit_labels_and_their_ignore_index(tmp_path):
    """Catches labels from 255 on wrapped or ignored, and an ignore index that is one of the classes."""
    names = [f"class {label}" for label in range(459)]
    write_photograph(tmp_path / "images" / "a.png", 0)
    write_png(tmp_path / "labels" / "a.png", bands([254, 255, 458, 65535], np.uint16))
    data = load_segmentation_dataset(tmp_path, "train", class_names=names)
    assert data.ignore_index == 65535
    assert np.array_equal(data[0][1], bands([254, 255, 458, 65535], np.int32))
    with pytest.raises(DataError, match="ignore_index 255 is the label of the class 'class 255'"):
        load_segmentation_dataset(tmp_path, "train", class_names=names, ignore_index=255)


def test_shifted_labels(pairs):
    """Catches an ignore index that is shifted, too, and a 0 that becomes the last class."""
    for stem, label_map in LABELS.items():
        shifted = np.where(label_map == 255, 255, label_map + 1).astype(np.uint8)
        shifted[0] = 0
        write_png(pairs / "train" / "labels" / f"{stem}.png", shifted)
    data = load_segmentation_dataset(pairs, "train", label_shift=-1)
    for (_, label_map, _), expected in zip(data, LABELS.values()):
        assert (label_map[0] == 255).all() and np.array_equal(label_map[1:], expected[1:])
    with pytest.raises(DataError, match=r"a\.jpg \(train\[0\]\): has the labels 3, expected .* 0\.\.2, or 255"):
        # Without the shift, "a" has 0, 1, 2: right by chance. "b/c" hasn't.
        write_png(pairs / "train" / "labels" / "a.png", bands([3, 3, 1]))
        load_segmentation_dataset(pairs, "train")


@pytest.mark.parametrize("option", ["label_shift", "ignore_index"])
@pytest.mark.parametrize("value", [65536, -65536, 10**12, -(10**12)])
def test_labels_beyond_any_label_map(pairs, option, value):
    """Catches a shift that wraps around or ends in the depths, and an ignore index that no pixel can have."""
    with pytest.raises(DataError, match=f"{option} is {value}, expected an integer between -65535 and 65535"):
        load_segmentation_dataset(pairs, "train", **{option: value})


def columns(**others) -> datasets.Dataset:
    images = [Image.fromarray(np.full((20, 30, 3), 40 * index, np.uint8)) for index in range(3)]
    maps = [Image.fromarray(label_map) for label_map in LABELS.values()]
    features = {"picture": datasets.Image(), "annotation": datasets.Image(), "label": datasets.ClassLabel(names=["x"])}
    data = {"picture": images, "annotation": maps, "label": [0, 0, 0]}
    return datasets.Dataset.from_dict(data | others, features=datasets.Features(features))


@pytest.fixture
def repository(tmp_path) -> str:
    """A data set that `datasets` reads, of other columns than ours."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    columns().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    columns().select(range(2)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_any_data_set_by_its_columns(repository, streaming):
    """Catches columns that are mixed up (a "label" that classifies images), and streams that give other examples."""
    arguments = {"image_column": "picture", "label_column": "annotation", "class_names": NAMES, "streaming": streaming}
    data = load_segmentation_dataset(repository, "train", **arguments)
    assert data.name == "repository"
    for index, ((image, label_map, name), expected) in enumerate(zip(data, LABELS.values())):
        assert name == f"train[{index}]"
        assert image.getpixel((0, 0)) == (40 * index,) * 3
        assert np.array_equal(label_map, expected)
    assert len(list(data)) == 3
    if not streaming:
        part = load_segmentation_dataset(repository, "test[1:]", **arguments)
        assert len(part) == 1 and np.array_equal(part[0][1], LABELS["b/c"])


def test_labels_as_lists(tmp_path):
    """Catches label maps that are taken for images only."""
    features = {"image": datasets.Image(), "mask": datasets.List(datasets.List(datasets.Value("uint8")))}
    data = {"image": [Image.new("RGB", (3, 2))], "mask": [[[0, 1, 2], [255, 1, 0]]]}
    data = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    data.to_parquet(tmp_path / "train.parquet")
    _, label_map, _ = load_segmentation_dataset(tmp_path, "train", class_names=NAMES)[0]
    assert label_map.tolist() == [[0, 1, 2], [255, 1, 0]]


def test_columns_that_are_not_there(repository):
    """Catches a KeyError from the depths, or another column taken in silence."""
    with pytest.raises(DataError, match="no column 'photo' .*; it has picture, annotation, label"):
        load_segmentation_dataset(repository, "train", image_column="photo", class_names=NAMES)
    with pytest.raises(DataError, match="no column 'image'; it has picture, .* image_column=..."):
        load_segmentation_dataset(repository, "train", class_names=NAMES)
    with pytest.raises(DataError, match="The column 'label' .* holds ClassLabel.* label_column=..."):
        load_segmentation_dataset(repository, "train", image_column="picture", class_names=NAMES)
    with pytest.raises(DataError, match="image_column and label_column are the same, 'picture'"):
        load_segmentation_dataset(
            repository, "train", image_column="picture", label_column="picture", class_names=NAMES
        )


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


SPOILERS = {
    "the image can't be read: .*[Tt]runcated": lambda image, label: cut_off(image),
    "the image can't be read: (the file is empty|cannot identify)": lambda image, label: image.write_bytes(b""),
    "the image can't be read: cannot identify": lambda image, label: image.write_bytes(b"no image at all"),
    "the label map can't be read: cannot identify": lambda image, label: label.write_bytes(b"no image at all"),
    r"the label map can't be read: got a RGB image, expected one label .* image\.getchannel\(0\)": (
        lambda image, label: Image.new("RGB", (30, 20)).save(label)
    ),
    "the label map is 20 x 30 pixels, its image, upright, 30 x 20": lambda image, label: write_png(
        label, bands([1, 2], size=(20, 30))
    ),
    r"has the labels 3, 4, 5, 6, 7, 8, 9, 10 and 2 more, expected those of the 3 classes, 0\.\.2, or 255": (
        lambda image, label: write_png(label, bands([*range(3, 13), 255]))
    ),
}


@pytest.mark.parametrize("message", SPOILERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_examples_that_are_wrong(pairs, message, streaming):
    """Catches wrong data that trains or scores in silence, and messages that don't say which file it is."""
    SPOILERS[message](pairs / "train" / "images" / "d.jpg", pairs / "train" / "labels" / "d.png")
    data = load_segmentation_dataset(pairs, "train", streaming=streaming)
    examples = iter(data)
    next(examples), next(examples)
    with pytest.raises(DataError, match=rf"^streets: d\.jpg \(train\[2\]\): ({message})"):
        next(examples)


def test_a_row_without_an_image(repository, tmp_path):
    """Catches None that travels on."""
    data = columns(picture=[Image.new("RGB", (30, 20)), None, None])
    data.to_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet")
    data = load_segmentation_dataset(
        repository, "train", image_column="picture", label_column="annotation", class_names=NAMES
    )
    with pytest.raises(DataError, match=r"repository: train\[1\]: the image can't be read: there is none"):
        data[1]


def test_no_label_at_all(pairs):
    """Catches training on nothing; an example of that kind among others is right."""
    for stem in ("a", "b/c"):
        write_png(pairs / "train" / "labels" / f"{stem}.png", bands([255]))
    data = load_segmentation_dataset(pairs, "train")
    assert (data[0][1] == 255).all()
    write_png(pairs / "train" / "labels" / "d.png", bands([255]))
    with pytest.raises(DataError, match="streets: no pixel of the 3 examples of train has a label: all are 255"):
        load_segmentation_dataset(pairs, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_split(repository, tmp_path, streaming):
    """Catches training on nothing, and a division by zero in what evaluates it."""
    columns().select([]).to_parquet(tmp_path / "repository" / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="The split 'test' of '.*repository' is empty"):
        load_segmentation_dataset(repository, "test", class_names=NAMES, streaming=streaming)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match="There is no image in '.*images'"):
        load_segmentation_dataset(tmp_path, "train", class_names=NAMES)


def test_files_without_their_counterpart(pairs):
    """Catches images that are left out in silence."""
    (pairs / "train" / "labels" / "d.png").unlink()
    with pytest.raises(DataError, match=r"No file of the same name in '.*labels' for .*d\.jpg\."):
        load_segmentation_dataset(pairs, "train")
    (pairs / "train" / "images" / "d.jpg").unlink()
    write_png(pairs / "train" / "labels" / "e.png", LABELS["a"])
    with pytest.raises(DataError, match=r"No file of the same name in '.*images' for .*e\.png\."):
        load_segmentation_dataset(pairs, "train")
    write_png(pairs / "train" / "labels" / "a.bmp", LABELS["a"])
    with pytest.raises(DataError, match=r"a\.bmp' and '.*a\.png' have the same name"):
        load_segmentation_dataset(pairs, "train")


def test_splits_and_sources_that_are_not_there(pairs, repository, tmp_path):
    """Catches another split taken in silence, and stack traces for misspelt names."""
    with pytest.raises(DataError, match="'.*streets' has no split 'validation', expected one of train"):
        load_segmentation_dataset(pairs, "validation")
    with pytest.raises(DataError, match="(?s)'val' of '.*repository' can't be loaded: Unknown split.*test"):
        load_segmentation_dataset(repository, "val", class_names=NAMES)
    with pytest.raises(DataError, match="There is no folder '/nowhere/at/all', and it is no name"):
        load_segmentation_dataset("/nowhere/at/all", "train")
    with pytest.raises(DataError, match="The split 'train' of 'no-one/nothing' can't be loaded"):
        load_segmentation_dataset("no-one/nothing", "train", class_names=NAMES)
    file = tmp_path / "set.zip"
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"set.zip' is a file, expected a folder"):
        load_segmentation_dataset(file, "train")


def test_class_lists(tmp_path, monkeypatch):
    """Catches names by another label than the file gives them."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    assert read_class_names(write("list.txt", "\ufeffsky \nroad, route\n car\n\n\n")) == ["sky", "road, route", "car"]
    assert read_class_names(write("list.json", '["sky", "road"]')) == ["sky", "road"]
    reordered = {str(label): f"class {label}" for label in (2, 10, 0, 1, 9, 3, 4, 5, 6, 7, 8)}
    assert read_class_names(write("id2label.json", json.dumps(reordered))) == [f"class {i}" for i in range(11)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_class_names("~/list.json") == read_class_names("$HOME/list.json") == ["sky", "road"]
    with pytest.raises(DataError, match="NO_SUCH_VARIABLE, which isn't set"):
        read_class_names("$NO_SUCH_VARIABLE/list.txt")
    assert read_class_names("voc")[0] == "aeroplane" and len(read_class_names("pascal-context-459")) == 459
    for text, message in (
        ("sky\n\nroad\n", "a blank class name at position 1"),
        ("sky\nroad\nsky\n", "the class name 'sky' at the positions 0 and 2"),
        ("\n", "Got an empty list for the class list"),
    ):
        with pytest.raises(DataError, match=message):
            read_class_names(write("list.txt", text))
    with pytest.raises(DataError, match=r"id2label.json' has 2 names, expected .* 0\.\.1; not so: 1, 2"):
        read_class_names(write("id2label.json", '{"0": "sky", "2": "road"}'))
    with pytest.raises(DataError, match="list.json' is no JSON, perhaps cut short"):
        read_class_names(write("list.json", "{"))
    with pytest.raises(DataError, match="'animals' can't be read: .* one of .*coco-stuff, "):
        read_class_names("animals")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.json", '"sky"', "holds 'sky', expected a list"),
        ("list.json", "7", "holds 7, expected a list"),
        ("list.json", "[true, 1e3]", "Got True at position 0 of .*go in quotes"),
        ("list.json", '{"sky": 0, "road": 1}', "gives labels by name, expected names by label"),
        ("list.json", '{"0": "sky", "0": "road"}', "has a label twice"),
        ("list.json", "[" * 100_000, "is no JSON"),
        ("list.json", '["caf\u00e9", "cafe\u0301"]', "which are one to the tokenizer"),
        ("list.txt", '[\n"sky",\n"road"\n]', r"has '\[' in line 1, expected nothing but a name"),
        ("list.txt", "sky, road\n", "with ',' in it. Expected 2 names"),
        ("list.txt", "sky|road\n", r"with '\|' in it. Expected 2 names"),
        ("list.txt", "sky\t0\nroad\t1\n", "in line 1, expected nothing but a name"),
        ("list.txt", "0: sky\n1: road\n", "'0: sky' in line 1, expected nothing but a name"),
        ("list.txt", "# classes\nsky\n", "'# classes' in line 1, expected nothing but a name"),
        ("list.txt", "VOC", "did you mean the benchmark voc"),
        ("list.yaml", "[sky, road]", "is YAML. Expected a text file"),
    ],
)
def test_class_lists_that_are_not_meant(tmp_path, name, text, message):
    """Catches a file of another form whose brackets, numbers or separators become names of classes."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_class_names(tmp_path / name)


def test_class_lists_of_other_encodings_and_kinds(tmp_path):
    """Catches decoding errors without the file's name, and a name that is composed in one list and not in another."""
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt' can't be read: .* isn't text in UTF-8"):
        read_class_names(tmp_path / "latin.txt")
    with pytest.raises(DataError, match="is no regular file"):
        read_class_names(tmp_path)
    assert read_class_names(["cafe\u0301 "]) == ["caf\u00e9"] == read_class_names({0: "cafe\u0301"})
    assert read_class_names(("a, b", "10: c")) == ["a, b", "10: c"]
    with pytest.raises(DataError, match="Got a set as class_names"):
        read_class_names({"sky", "road"})


def test_no_class_list(pairs, repository):
    """Catches classes made up from the labels that happen to occur."""
    (pairs / "classes.txt").unlink()
    with pytest.raises(DataError, match="class names of '.*streets' are not known.* or put a classes.txt there"):
        load_segmentation_dataset(pairs, "train")
    data = load_segmentation_dataset(pairs, "train", class_names="voc")
    assert len(data.class_names) == 20
    with pytest.raises(DataError, match="ignore_index 1 is the label of the class 'road'"):
        load_segmentation_dataset(pairs, "train", class_names=NAMES, ignore_index=1)


def test_workers_can_have_it(pairs):
    """Catches what a data loader's processes can't be sent."""
    data = load_segmentation_dataset(pairs, "train")
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy[1][1], data[1][1]) and copy[1][2] == "b/c.jpg"
