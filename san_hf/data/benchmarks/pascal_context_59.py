"""Pascal Context with 59 classes, the most frequent of the 459."""

import json
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from san_hf.data.errors import DataError

from .base import FLICKR_TERMS, Benchmark, Source, find_devkit
from .pascal_context_459 import find_context, read_ids


DETAIL_FILE = "trainval_merged.json"


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    root = find_devkit(source, "VOC2010")
    for file in (root / DETAIL_FILE, source / DETAIL_FILE):
        if file.is_file():
            return find_detail(file, root / "JPEGImages", split)
    folders = [("59_context_labels", ".png"), ("SegmentationClassContext", ".png"), ("trainval", ".mat")]
    return find_context(source, split, expected, folders)


def find_detail(file: Path, images: Path, split: str) -> list[Source]:
    phase = {"train": "train", "validation": "val"}[split]
    data = read_detail(file)
    regions: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for region in data["annos_segmentation"]:
        regions.setdefault(region["image_id"], []).append((region["category_id"], region["segmentation"]))
    chosen = sorted((image["file_name"], image["image_id"]) for image in data["images"] if image["phase"] == phase)
    return [Source(name, images / PurePosixPath(name).name, regions.get(number, [])) for name, number in chosen]


@lru_cache(maxsize=1)
def read_detail(file: Path) -> dict[str, Any]:
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


PASCAL_CONTEXT_59 = Benchmark(
    name="pascal-context-59",
    title="Pascal Context-59",
    published_title="Pascal Context-59",
    splits={"train": 4_998, "validation": 5_105},
    ignore_index=255,
    source="https://cs.stanford.edu/~roozbeh/pascal-context/",
    license="other",
    terms=f"No licence of its own. {FLICKR_TERMS}",
    original_names={"validation": "pcontext_sem_seg_val"},
    find_images=find_images,
    read_ids=read_ids,
    num_ids=460,
    ignore_other_ids=True,
)
