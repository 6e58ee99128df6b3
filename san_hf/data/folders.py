"""Folders of images beside folders of label maps, as they are usually laid out, and the splits they have."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Image as ImageFeature

from san_hf.json_files import LARGEST_LIST, read_text
from san_hf.messages import join_some, notify, one_line, printable
from san_hf.paths import ImageListing, list_images

from .errors import DataError
from .splits import OTHER_NAMES, take_split


# What the two folders are usually called: our own, ADE20K's, mmsegmentation's, and others'.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir")
LABEL_FOLDERS = ("labels", "label", "annotations", "masks", "mask", "ann_dir")
# Those of Pascal VOC, whose folder "Annotations" holds boxes.
_VOC_FOLDERS = ("JPEGImages", "SegmentationClass")
# Where lists of the splits' images lie, below the folder of the set; in VOC's, any text file is one.
_VOC_LISTS = "ImageSets/Segmentation"
_LIST_FOLDERS = (_VOC_LISTS, "ImageSets", "splits", "")
_SPLIT_NAME = re.compile(
    r"(train(ing|val)?|val(id(ation)?)?|test(ing|dev)?|dev|eval(uation)?)"
    r"([-_ ]?(\d.*|aug|set|split|extra|mini|small))?",
    re.IGNORECASE,
)
# The split of a pair of folders that has none.
ONLY_SPLIT = "train"


@dataclass(frozen=True)
class FolderPair:
    """
    A split: a folder of images, one of label maps, and the text file that lists which of them it has, if not all.
    """

    images: Path
    labels: Path
    listed_in: Path | None = None


def open_folders(
    source: Path, split: str, image_folder: str | None = None, label_folder: str | None = None
) -> datasets.Dataset | None:
    """
    A split of a folder whose images and label maps are files of the same name but for the ending.

    Args:
        source: the folder.
        split: a split's name, or parts such as "train[:80%]"; "validation" is also what is called "val", and the like.
        image_folder, label_folder: what the two folders are called, if not as usual.

    Returns:
        With the columns "image", "label" and "file_name"; None where there are no such two folders.

    Raises:
        DataError: there is no such split, it is not clear which folders are meant, or a file lacks its counterpart.
    """
    splits = find_splits(source, image_folder, label_folder)
    if not splits:
        return None
    known = dict(splits)
    for name, others in OTHER_NAMES.items():
        if name not in known and (present := [splits[other] for other in others if other in splits]):
            known[name] = present[0]
    hint = ""
    if list(splits) == [ONLY_SPLIT] and splits[ONLY_SPLIT].listed_in is None:
        hint = (
            f" Take parts of it, such as {ONLY_SPLIT}[:80%] and {ONLY_SPLIT}[80%:], or have a share set aside for "
            "validation: data.validation_split=0.1 in training, --validation-split 0.1 in evaluation."
        )
    return take_split(split, known, lambda name: _pair_files(known[name]), f"'{printable(source)}'", hint)


def find_splits(
    source: Path, image_folder: str | None = None, label_folder: str | None = None
) -> dict[str, FolderPair]:
    """
    The splits of a folder by name: folders of their names with a pair of folders each, a pair with folders of their
    names, or a pair and lists. A pair without any of these is the one split "train".

    Raises:
        DataError: a split is in two places, or several folders could be meant.
    """
    names = image_folder, label_folder
    splits: dict[str, FolderPair] = {}
    for folder in _folders_in(source):
        if pair := _find_pair(folder, *names):
            splits[folder.name] = pair
    if top := _find_pair(source, *names):
        for name, pair in _splits_of_pair(source, top).items():
            if name in splits:
                raise DataError(
                    f"'{printable(source)}' has the split {name!r} twice: '{printable(splits[name].images)}' and "
                    f"'{printable(pair.images)}'. Expected one of them."
                )
            splits[name] = pair
    return splits


def _find_pair(folder: Path, image_folder: str | None, label_folder: str | None) -> FolderPair | None:
    def choose(key: str, given: str | None, usual: tuple[str, ...]) -> Path | None:
        present = [folder / name for name in ([given] if given else usual) if (folder / name).is_dir()]
        # An "annotations" beside "masks" may hold files of another kind.
        filled = [path for path in present if list_images(path).files] if len(present) > 1 else present
        if len(filled) > 1:
            raise DataError(
                f"'{printable(folder)}' has {', '.join(path.name for path in filled)}: which of them is meant? Give "
                f"{key}={filled[0].name}, or another."
            )
        return next(iter(filled or present), None)

    voc_images, voc_labels = _VOC_FOLDERS
    images = choose("image_column", image_folder, (*IMAGE_FOLDERS, voc_images))
    if images is None:
        return None
    usual = (voc_labels,) if images.name == voc_images else LABEL_FOLDERS
    labels = choose("label_column", label_folder, usual)
    return FolderPair(images, labels) if labels is not None else None


def _splits_of_pair(source: Path, pair: FolderPair) -> dict[str, FolderPair]:
    for place in _LIST_FOLDERS:
        lists = [path for path in sorted((source / place).glob("*.txt")) if path.is_file()]
        if place != _VOC_LISTS:
            lists = [path for path in lists if _SPLIT_NAME.fullmatch(path.stem)]
        if lists:
            return {path.stem: FolderPair(pair.images, pair.labels, path) for path in lists}
    inside = [path.name for path in _folders_in(pair.images) if (pair.labels / path.name).is_dir()]
    splits = {name: FolderPair(pair.images / name, pair.labels / name) for name in inside}
    if not any(_SPLIT_NAME.fullmatch(name) for name in inside):
        # Folders of cities or days, say: all together they are the one split.
        return {ONLY_SPLIT: pair, **splits}
    loose = [path.name for path in list_images(pair.images).files if path.parent == pair.images]
    if loose:
        notify(f"Left out of '{printable(pair.images)}': files in no folder of a split: {join_some(loose, 4)}.")
    return splits


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pair_files(pair: FolderPair) -> datasets.Dataset:
    """The images below one folder with the label maps of the same name below the other."""
    found, left_out = {}, {}
    for folder in (pair.images, pair.labels):
        try:
            listing = list_images(folder)
        except OSError as error:
            raise DataError(f"'{printable(error.filename or folder)}' can't be read: {one_line(error)}.") from error
        found[folder] = _by_name(listing)
        left_out[folder] = listing.describe_left_out()
        if left_out[folder]:
            notify(left_out[folder])
    images, labels = found[pair.images], found[pair.labels]
    if pair.listed_in is not None:
        names = list(dict.fromkeys(_read_list(pair.listed_in, pair, images)))
        images = {name: images[name] for name in names if name in images}
        labels = {name: labels[name] for name in names if name in labels}
    for files in [*images.values(), *labels.values()]:
        if len(files) > 1:
            raise DataError(
                f"'{printable(files[0])}' and '{printable(files[1])}' have the same name: expected one file of each."
            )
    for here, there, folder in ((images, labels, pair.labels), (labels, images, pair.images)):
        if unpaired := [printable(here[name][0]) for name in here if name not in there]:
            reason = f" {left_out[folder]}" if left_out[folder] else ""
            raise DataError(f"No file of the same name in '{printable(folder)}' for {join_some(unpaired)}.{reason}")
    if not images:
        raise DataError(
            f"There is no image in '{printable(pair.images)}', expected at least one. {left_out[pair.images]}".strip()
        )
    paths = {name: (str(files[0]), str(labels[name][0])) for name, files in images.items()}
    for path in (path for both in paths.values() for path in both):
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"The name of '{printable(path)}' is no text in UTF-8: rename the file.") from error
    columns = {
        "image": [image for image, _ in paths.values()],
        "label": [label for _, label in paths.values()],
        "file_name": [Path(image).relative_to(pair.images).as_posix() for image, _ in paths.values()],
    }
    features = {"image": ImageFeature(), "label": ImageFeature(), "file_name": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _by_name(listing: ImageListing) -> dict[str, list[Path]]:
    """The files by their path below the folder without its ending."""
    files: dict[str, list[Path]] = {}
    for path in listing.files:
        files.setdefault(path.relative_to(listing.folder).with_suffix("").as_posix(), []).append(path)
    return files


def _read_list(file: Path, pair: FolderPair, images: dict[str, list[Path]]) -> Iterator[str]:
    """
    The names that a list has, one a line: with or without the ending or the folder, and perhaps followed by those of
    the label maps.
    """
    try:
        lines = read_text(file, LARGEST_LIST).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"The list '{printable(file)}' can't be read: {one_line(error)}.") from error
    unknown = []
    for line in filter(None, map(str.strip, lines)):
        candidates = []
        for text in (line, line.split()[0]):
            path = text.replace("\\", "/").removeprefix("./").lstrip("/")
            for prefix in ("", f"{pair.images.parent.name}/{pair.images.name}/", f"{pair.images.name}/"):
                if path.startswith(prefix):
                    rest = path[len(prefix) :]
                    candidates += [rest, os.path.splitext(rest)[0]]
        name = next((name for name in candidates if name in images), None)
        if name is None:
            unknown.append(line)
        else:
            yield name
    if unknown:
        raise DataError(
            f"'{printable(pair.images)}' lacks {join_some(map(printable, unknown))}, which '{printable(file)}' lists."
        )
