"""Benchmarks: facts, and functions that find their images and read their labels.

The files of the benchmarks import nothing heavy: what reads labels imports its libraries when it is called.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from san_hf.data.errors import DataError
from san_hf.json_files import LARGEST_LIST, read_text
from san_hf.vocabularies import load_class_ids, load_vocabulary


if TYPE_CHECKING:
    import numpy as np

# In a label table: a value that the owner's labels don't have.
UNKNOWN = -1
FLICKR_TERMS = "The photographs come from Flickr and stay under their photographers' terms."


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
class Benchmark:
    """
    A benchmark: what is published about it, its files as their owner ships them, and its prepared form.

    Attributes:
        name: what `san-hf prepare` calls it; also the name of its class list in `san_hf.vocabularies`.
        title: its usual name.
        published_title: its name in the tables of published results (`model_cards/`).
        splits: number of images of each split.
        other_splits: the same of other releases of the set, by what they are ("of the merged JSON file").
        ignore_index: value of pixels without a label; 65535 in sets with 16-bit labels.
        source: the owner's page.
        license: as the Hub calls it, "other" where it has no name for it.
        terms: the licence in a sentence.
        original_names: the original implementation's name of each split, where it has one.
        find_images: the images of a split ("train" or "validation"), of which so many are expected, below a folder.
            Raises DataError where there is no such folder, or no list of its images.
        read_ids: (H, W) integers, the owner's ids of the pixels, from [`Source.labels`] and the image's (H, W).
        num_ids: how many ids there are, from 0 on.
        id_offset: what is added to a class's id (`san_hf.vocabularies.load_class_ids`) in the owner's label maps.
        ignored_ids: ids of pixels without a label.
        ignore_other_ids: whether ids of none of the classes are ignored; otherwise they are an error.
        shorter_side: larger images and their labels are scaled down to this, in pixels, if it is given.
        upright: whether labels lie on the image as its EXIF orientation turns it, or else as it is stored.
    """

    name: str
    title: str
    published_title: str
    splits: dict[str, int]
    ignore_index: int
    source: str
    license: str
    terms: str
    original_names: dict[str, str]
    find_images: Callable[[Path, str, int], list[Source]]
    read_ids: "Callable[[Any, tuple[int, int]], np.ndarray]"
    num_ids: int
    id_offset: int = 0
    ignored_ids: tuple[int, ...] = ()
    ignore_other_ids: bool = False
    shorter_side: int | None = None
    upright: bool = True
    other_splits: dict[str, dict[str, int]] = field(default_factory=dict)

    def release_of(self, split: str, images: int) -> str | None:
        """Which release of the set has so many images in a split: "" for the usual one, None for none of them."""
        if self.splits.get(split) == images:
            return ""
        return next((name for name, splits in self.other_splits.items() if splits.get(split) == images), None)

    def counts_of(self, split: str) -> str:
        """The number of images in a split, of each release, for messages."""
        others = [f"{splits[split]:,} ({name})" for name, splits in self.other_splits.items()]
        return " or ".join([f"{self.splits[split]:,}", *others])

    @property
    def class_names(self) -> list[str]:
        """Label i is the i-th."""
        return load_vocabulary(self.name)

    def label_table(self) -> "np.ndarray":
        """
        The label of each id: (`num_ids` + 1,) int32, the ignore index for what is unlabelled or of none of the classes,
        and UNKNOWN for what is no id; the last entry stands for all ids beyond.
        """
        import numpy as np

        ids = np.array(load_class_ids(self.name)) + self.id_offset
        table = np.full(self.num_ids + 1, self.ignore_index if self.ignore_other_ids else UNKNOWN, dtype=np.int32)
        table[list(self.ignored_ids)] = self.ignore_index
        table[ids] = range(len(ids))
        table[-1] = UNKNOWN
        return table


def find_folder(source: Path, candidates: Iterable[str], what: str) -> Path:
    """The first of these folders that exists."""
    candidates = list(candidates)
    found = next((source / name for name in candidates if (source / name).is_dir()), None)
    if found is None:
        raise DataError(f"There is no folder of {what} in '{source}': looked for {', '.join(candidates)}.")
    return found


def stems(folder: Path, ending: str) -> set[str]:
    """Names, without their ending, of a folder's files of this ending."""
    return {path.stem for path in folder.iterdir() if path.suffix == ending and not path.name.startswith(".")}


def pair_files(images: Path, labels: Path) -> list[Source]:
    """All images (.jpg) and label maps (.png) of two folders; a file that lacks its counterpart is found missing."""
    names = sorted(stems(images, ".jpg") | stems(labels, ".png"))
    return [Source(f"{name}.jpg", images / f"{name}.jpg", labels / f"{name}.png") for name in names]


def read_list(source: Path, candidates: Sequence[str], expected: int) -> list[str]:
    """
    Names without ending, from the first list of the expected length, else from the first that exists. Lines hold a
    name, or the paths of an image and its label map.
    """
    lists = {}
    for name in candidates:
        if (source / name).is_file():
            lines = read_text(source / name, LARGEST_LIST).splitlines()
            lists[name] = sorted({PurePosixPath(line.split()[0]).stem for line in lines if line.strip()})
    if not lists:
        raise DataError(f"There is no list of the images in '{source}': looked for {', '.join(candidates)}.")
    return next((names for names in lists.values() if len(names) == expected), next(iter(lists.values())))


def find_devkit(source: Path, year: str) -> Path:
    """The folder of a Pascal VOC release."""
    return find_folder(source, [f"{top}JPEGImages" for top in ("", f"{year}/", f"VOCdevkit/{year}/")], "images").parent


def check_size(image: Any, size: tuple[int, int]) -> None:
    """
    Before a label map is decoded.

    Raises:
        ValueError: it hasn't the (height, width) of its image.
    """
    if image.size != size[::-1]:
        raise ValueError(f"they are {image.width} x {image.height} pixels, their image {size[1]} x {size[0]}")


def read_png(labels: Path, size: tuple[int, int]) -> "np.ndarray":
    """The values of a label map's file."""
    from PIL import Image

    from san_hf.data.label_files import read_label_map
    from san_hf.images import pixel_limit

    with pixel_limit(), Image.open(labels) as image:
        check_size(image, size)
        return read_label_map(image)
