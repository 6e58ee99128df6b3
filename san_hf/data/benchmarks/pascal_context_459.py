"""Pascal Context with 459 classes; also what the 59 classes share with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from san_hf.vocabularies import load_class_ids

from .annotations import decode_rle, read_mat, to_ids
from .base import FLICKR_TERMS, Benchmark, Source, find_devkit, find_folder, read_list, read_png


if TYPE_CHECKING:
    import numpy as np


# 0 stands for pixels without a label.
NUM_IDS = 460
# Pascal in Detail's JSON file has fewer images than the owners' release; SAN's published results are of these.
DETAIL_SPLITS = {"train": 4_996, "validation": 5_104}


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

    if isinstance(labels, list):
        ids = np.zeros(size, np.int32)
        for number, region in labels:
            ids[decode_rle(region, size)] = number
        return ids
    if labels.suffix == ".png":
        # 0 is unlabelled, 1..59 are the 59 classes in the order of their ids.
        table = np.array([0, *load_class_ids("pascal-context-59")])
        return table[to_ids(read_png(labels, size), len(table))]
    return to_ids(read_mat(labels, "LabelMap", size), NUM_IDS)


PASCAL_CONTEXT_459 = Benchmark(
    name="pascal-context-459",
    title="Pascal Context-459",
    published_title="Pascal Context-459",
    splits={"train": 4_998, "validation": 5_105},
    other_splits={"of the merged JSON file": DETAIL_SPLITS},
    ignore_index=65535,
    source="https://cs.stanford.edu/~roozbeh/pascal-context/",
    license="other",
    terms=f"No licence of its own. {FLICKR_TERMS}",
    original_names={"validation": "pcontext_full_sem_seg_val"},
    find_images=find_images,
    read_ids=read_ids,
    num_ids=NUM_IDS,
    ignored_ids=(0,),
)
