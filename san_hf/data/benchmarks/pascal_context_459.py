"""Pascal Context with 459 classes; also what the 59 classes share with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from san_hf.vocabularies import load_class_ids

from .base import FLICKR_TERMS, Benchmark, Source, find_devkit, find_folder, read_list, read_png


if TYPE_CHECKING:
    import numpy as np


def find_context(source: Path, split: str, expected: int, folders: Sequence[tuple[str, str]]) -> list[Source]:
    """The images of Pascal Context, with labels from the first of these folders that exists."""
    root = find_devkit(source, "VOC2010")
    name = {"train": "train", "validation": "val"}[split]
    # VOC 2010's own lists of all its images are those of Pascal Context.
    lists = [
        f"ImageSets/SegmentationContext/{name}.txt",
        f"pascalcontext_{name}.txt",
        f"{name}.txt",
        f"ImageSets/Main/{name}.txt",
    ]
    names = read_list(root, lists, expected)
    labels = find_folder(root, [folder for folder, _ in folders], f"labels of {split}")
    ending = dict(folders)[labels.name]
    return [Source(f"{name}.jpg", root / "JPEGImages" / f"{name}.jpg", labels / f"{name}{ending}") for name in names]


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    return find_context(source, split, expected, [("trainval", ".mat")])


def read_ids(labels: Path | list, size: tuple[int, int]) -> "np.ndarray":
    """Ids among the 459 classes."""
    import numpy as np
    from pycocotools import mask as rle
    from scipy.io import loadmat

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
        numbers = read_png(labels, size)
        if numbers.max(initial=0) >= len(table):
            raise ValueError(f"has the label {numbers.max()}, expected 0..{len(table) - 1}")
        return table[numbers]
    variables = loadmat(labels, variable_names=["LabelMap"])
    if "LabelMap" not in variables:
        raise ValueError("has no variable LabelMap")
    return variables["LabelMap"].astype(np.int32)


PASCAL_CONTEXT_459 = Benchmark(
    name="pascal-context-459",
    title="Pascal Context-459",
    published_title="Pascal Context-459",
    splits={"train": 4_998, "validation": 5_105},
    ignore_index=65535,
    source="https://cs.stanford.edu/~roozbeh/pascal-context/",
    license="other",
    terms=f"No licence of its own. {FLICKR_TERMS}",
    original_names={"validation": "pcontext_full_sem_seg_val"},
    find_images=find_images,
    read_ids=read_ids,
    num_ids=460,
    ignored_ids=(0,),
)
