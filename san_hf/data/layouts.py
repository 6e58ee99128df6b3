"""The benchmarks as their owners ship them: which files belong together, and what their labels mean."""

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy.io import loadmat

from san_hf.vocabularies import load_class_ids

from .benchmarks import BENCHMARKS
from .errors import DataError
from .loading import to_label_map


# In a label table: a value that the owner's labels don't have.
UNKNOWN = -1
DETAIL_FILE = "trainval_merged.json"
ADE_INDEX_FILE = "index_ade20k.pkl"


@dataclass(frozen=True)
class Source:
    """
    An image, and where its labels are.

    Attributes:
        name: the image's.
        image: its file.
        labels: the file with its labels; or, of Pascal in Detail's annotations, pairs of an id and the RLE of its
            region, later ones lying on top.
    """

    name: str
    image: Path
    labels: Path | list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Layout:
    """
    How to read a benchmark.

    Attributes:
        find: the images of a split ("train" or "validation"), of which so many are expected, below a folder. Raises
            DataError where there is no such folder, or no list of its images.
        read_ids: (H, W) integers, the owner's ids of the pixels, from [`Source.labels`] and the image's (H, W).
        shorter_side: larger images and their labels are scaled down to this, if it is given.
        upright: whether labels lie on the image as its EXIF orientation turns it, or else as it is stored.
    """

    find: Callable[[Path, str, int], list[Source]]
    read_ids: Callable[[Any, tuple[int, int]], np.ndarray]
    shorter_side: int | None = None
    upright: bool = True


def label_table(name: str) -> np.ndarray:
    """
    What becomes of a benchmark's ids: (N,) int32, at each id its label, the ignore index for what is unlabelled or of
    none of the classes, and UNKNOWN for what is no id; the last entry stands for all ids beyond.
    """
    ids, ignore_index = load_class_ids(name), BENCHMARKS[name].ignore_index
    if name == "coco-stuff":
        # Its maps hold id - 1, and 255 where unlabelled.
        table = np.full(256, ignore_index)
        table[np.array(ids) - 1] = range(len(ids))
    elif name == "ade20k-847":
        # The classes are the most frequent of over 3,000 objects.
        table = np.full(26 * 256, ignore_index)
        table[ids] = range(len(ids))
    elif name == "pascal-context-59":
        # The classes are the most frequent of the 459.
        table = np.full(460, ignore_index)
        table[ids] = range(len(ids))
    else:
        table = np.full(256 if name == "voc" else len(ids) + 1, UNKNOWN)
        table[0] = ignore_index
        table[ids] = range(len(ids))
        if name == "voc":
            table[255] = ignore_index  # the border of objects; 0 is what lies behind them
    return np.append(table, UNKNOWN).astype(np.int32)


def _find_folder(source: Path, candidates: Iterable[str], what: str) -> Path:
    candidates = list(candidates)
    found = next((source / name for name in candidates if (source / name).is_dir()), None)
    if found is None:
        raise DataError(f"There is no folder of {what} in '{source}': looked for {', '.join(candidates)}.")
    return found


def _stems(folder: Path, ending: str) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix == ending and not path.name.startswith(".")}


def _pair(images: Path, labels: Path) -> list[Source]:
    """All images (.jpg) and label maps (.png) of two folders; a file that lacks its counterpart is found missing."""
    names = sorted(_stems(images, ".jpg") | _stems(labels, ".png"))
    return [Source(f"{name}.jpg", images / f"{name}.jpg", labels / f"{name}.png") for name in names]


def _read_png(labels: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(labels) as image:
        image.load()
        return to_label_map(image)


def _read_list(source: Path, candidates: Sequence[str], expected: int) -> list[str]:
    """
    Names without ending, from the first list of the expected length, else from the first that exists. Lines hold a
    name, or the paths of an image and its label map.
    """
    lists = {}
    for name in candidates:
        if (source / name).is_file():
            lines = (source / name).read_text(encoding="utf-8").splitlines()
            lists[name] = sorted({PurePosixPath(line.split()[0]).stem for line in lines if line.strip()})
    if not lists:
        raise DataError(f"There is no list of the images in '{source}': looked for {', '.join(candidates)}.")
    return next((names for names in lists.values() if len(names) == expected), next(iter(lists.values())))


def _find_coco(source: Path, split: str, expected: int) -> list[Source]:
    folder = {"train": "train2017", "validation": "val2017"}[split]
    images = _find_folder(source, [folder, f"images/{folder}"], f"images of {split}")
    tops = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations")
    return _pair(images, _find_folder(source, [f"{top}/{folder}" for top in tops], f"label maps of {split}"))


def _find_ade_150(source: Path, split: str, expected: int) -> list[Source]:
    folder = {"train": "training", "validation": "validation"}[split]
    tops = ("", "ADEChallengeData2016/")
    images = _find_folder(source, [f"{top}images/{folder}" for top in tops], f"images of {split}")
    return _pair(images, _find_folder(source, [f"{top}annotations/{folder}" for top in tops], f"labels of {split}"))


def _find_devkit(source: Path, year: str) -> Path:
    """The folder of a Pascal VOC release."""
    return _find_folder(source, [f"{top}JPEGImages" for top in ("", f"{year}/", f"VOCdevkit/{year}/")], "images").parent


def _find_voc(source: Path, split: str, expected: int) -> list[Source]:
    root = _find_devkit(source, "VOC2012")
    augmented, own = root / "SegmentationClassAug", root / "SegmentationClass"
    validation = _read_list(
        root, ["ImageSets/SegmentationAug/val.txt", "ImageSets/Segmentation/val.txt", "val.txt"], expected
    )
    if split == "validation":
        names = validation
    else:
        # The owners' list of 1,464 images is without the Berkeley annotations. SegmentationClassAug holds the label
        # maps of all images that have any: what isn't for validation is for training.
        tops = ("ImageSets/SegmentationAug", "ImageSets/Segmentation", ".")
        lists = [f"{top}/{name}.txt" for top in tops for name in ("train_aug", "trainaug", "train")]
        names = _read_list(root, lists, expected)
        if len(names) != expected and augmented.is_dir():
            rest = sorted(_stems(augmented, ".png") - set(validation))
            names = rest if len(rest) == expected else names

    def labels(name: str) -> Path:
        file = augmented / f"{name}.png"
        return own / file.name if split == "validation" and not file.is_file() else file

    return [Source(f"{name}.jpg", root / "JPEGImages" / f"{name}.jpg", labels(name)) for name in names]


def _find_context(source: Path, split: str, expected: int, folders: Sequence[tuple[str, str]]) -> list[Source]:
    """The images of Pascal Context, with labels from the first of these folders that exists."""
    root = _find_devkit(source, "VOC2010")
    name = {"train": "train", "validation": "val"}[split]
    # VOC 2010's own lists of all its images are those of Pascal Context.
    lists = [
        f"ImageSets/SegmentationContext/{name}.txt",
        f"pascalcontext_{name}.txt",
        f"{name}.txt",
        f"ImageSets/Main/{name}.txt",
    ]
    names = _read_list(root, lists, expected)
    labels = _find_folder(root, [folder for folder, _ in folders], f"labels of {split}")
    ending = dict(folders)[labels.name]
    return [Source(f"{name}.jpg", root / "JPEGImages" / f"{name}.jpg", labels / f"{name}{ending}") for name in names]


def _find_context_459(source: Path, split: str, expected: int) -> list[Source]:
    return _find_context(source, split, expected, [("trainval", ".mat")])


def _find_context_59(source: Path, split: str, expected: int) -> list[Source]:
    root = _find_devkit(source, "VOC2010")
    for file in (root / DETAIL_FILE, source / DETAIL_FILE):
        if file.is_file():
            return _find_detail(file, root / "JPEGImages", split)
    folders = [("59_context_labels", ".png"), ("SegmentationClassContext", ".png"), ("trainval", ".mat")]
    return _find_context(source, split, expected, folders)


def _find_detail(file: Path, images: Path, split: str) -> list[Source]:
    phase = {"train": "train", "validation": "val"}[split]
    data = _read_detail(file)
    regions: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for region in data["annos_segmentation"]:
        regions.setdefault(region["image_id"], []).append((region["category_id"], region["segmentation"]))
    chosen = sorted((image["file_name"], image["image_id"]) for image in data["images"] if image["phase"] == phase)
    return [Source(name, images / PurePosixPath(name).name, regions.get(number, [])) for name, number in chosen]


@lru_cache(maxsize=1)
def _read_detail(file: Path) -> dict[str, Any]:
    """Pascal in Detail's annotations: what matters of them, for they are large."""
    keep = {"images", "annos_segmentation", "image_id", "file_name", "phase", "category_id", "segmentation"}
    keep |= {"size", "counts"}
    try:
        with open(file, encoding="utf-8") as stream:
            data = json.load(stream, object_hook=lambda entry: {key: entry[key] for key in entry if key in keep})
    except ValueError as error:
        raise DataError(f"'{file}' is no JSON: {error}. Get it again.") from error
    expected = {"images": {"image_id", "file_name", "phase"}}
    expected["annos_segmentation"] = {"image_id", "category_id", "segmentation"}
    for key, keys in expected.items():
        if not isinstance(data, dict) or not all(keys <= set(entry) for entry in data.get(key, [{}])):
            raise DataError(f"'{file}' has no {key!r} with {', '.join(sorted(keys))}: expected Pascal in Detail's.")
    return data


def _read_context(labels: Path | list, size: tuple[int, int]) -> np.ndarray:
    """Ids among the 459 classes."""
    if isinstance(labels, list):
        ids = np.zeros(size, np.int32)
        for number, region in labels:
            if isinstance(region["counts"], list):
                region = rle.frPyObjects(region, *region["size"])
            mask = rle.decode(region).astype(bool)
            if mask.shape != size:
                raise ValueError(f"a region of id {number} is {mask.shape[1]} x {mask.shape[0]} pixels")
            ids[mask] = number
        return ids
    if labels.suffix == ".png":
        # 0 is unlabelled, 1..59 are the 59 classes in the order of their ids.
        table = np.array([0, *load_class_ids("pascal-context-59")])
        numbers = _read_png(labels, size)
        if numbers.max(initial=0) >= len(table):
            raise ValueError(f"has the label {numbers.max()}, expected 0..{len(table) - 1}")
        return table[numbers]
    variables = loadmat(labels, variable_names=["LabelMap"])
    if "LabelMap" not in variables:
        raise ValueError("has no variable LabelMap")
    return variables["LabelMap"].astype(np.int32)


def _find_ade_847(source: Path, split: str, expected: int) -> list[Source]:
    candidates = [source, source / "ADE20K_2021_17_01"]
    root = next((folder for folder in candidates if (folder / ADE_INDEX_FILE).is_file()), None)
    if root is None:
        raise DataError(f"There is no {ADE_INDEX_FILE} in '{source}', nor in a folder ADE20K_2021_17_01 there.")
    sources = []
    for folder, name in zip(*read_ade_index(root / ADE_INDEX_FILE)):
        parts = PurePosixPath(folder).parts
        if ".." in parts or PurePosixPath(folder).is_absolute() or PurePosixPath(name).name != name:
            raise DataError(f"'{root / ADE_INDEX_FILE}' names '{folder}/{name}', which is not below the data set.")
        fields = name.split("_")
        if ("validation" if len(fields) > 1 and fields[1] == "val" else "train") != split:
            continue
        # Folders are given from above the data set's.
        image = root.joinpath(*parts[1:], name)
        sources.append(Source(name, image, image.with_name(f"{image.stem}_seg.png")))
    return sorted(sources, key=lambda item: item.name)


def _read_ade_847(labels: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(labels) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"got a {image.mode} image, expected RGB, with the ids in red and green")
        pixels = np.asarray(image, dtype=np.int32)
    return pixels[..., 0] // 10 * 256 + pixels[..., 1]


class _Ignored:
    """Stands for an array of ADE20K's index, whose contents aren't needed."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any):
        pass


class _IndexUnpickler(pickle.Unpickler):
    """
    Reads lists, dictionaries, strings and numbers. NumPy's arrays are passed over; whatever else a pickle asks to be
    imported or called is refused, before it is.
    """

    _ARRAYS = {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.multiarray", "scalar"),
            (f"{package}.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        )
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self._ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such an index has no use for")
        return _Ignored


def read_ade_index(file: Path) -> tuple[list[str], list[str]]:
    """
    The folder and the file name of every image of ADE20K. Nothing that the pickle holds is executed.

    Raises:
        DataError: it can't be read, holds anything but data, or has no such lists.
    """
    try:
        with open(file, "rb") as stream:
            index = _IndexUnpickler(stream).load()
    # What is no pickle makes the unpickler fail in many ways.
    except Exception as error:
        raise DataError(f"'{file}' can't be read as ADE20K's index: {error}. Get it from ADE20K's owners.") from error
    lists = [index.get(key) for key in ("folder", "filename")] if isinstance(index, dict) else [None, None]
    for key, names in zip(("folder", "filename"), lists):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"'{file}' has no list of texts {key!r}: expected ADE20K's index.")
    if len(lists[0]) != len(lists[1]):
        raise DataError(f"'{file}' has {len(lists[0])} folders for {len(lists[1])} file names, expected as many.")
    return lists[0], lists[1]


LAYOUTS: dict[str, Layout] = {
    "coco-stuff": Layout(_find_coco, _read_png),
    "voc": Layout(_find_voc, _read_png),
    "pascal-context-59": Layout(_find_context_59, _read_context),
    "pascal-context-459": Layout(_find_context_459, _read_context),
    "ade20k-150": Layout(_find_ade_150, _read_png),
    "ade20k-847": Layout(_find_ade_847, _read_ade_847, shorter_side=512, upright=False),
}
