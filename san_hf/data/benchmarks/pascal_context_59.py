"""Pascal Context with 59 classes, the most frequent of the 459."""

from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from san_hf.data.errors import DataError
from san_hf.json_files import JSONError, read_json
from san_hf.messages import join_some

from .base import FLICKR_TERMS, Benchmark, Source, find_devkit
from .pascal_context_459 import DETAIL_SPLITS, NUM_IDS, find_context, read_ids


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
    regions: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for region in data["annos_segmentation"]:
        regions.setdefault(region["image_id"], []).append((region["category_id"], region["segmentation"]))
    chosen = sorted((image["file_name"], image["image_id"]) for image in data["images"] if image["phase"] == phase)
    return [Source(name, images / name, regions.get(number, [])) for name, number in chosen]


# Bytes of Pascal in Detail's annotations: they are published as half a billion.
LARGEST_DETAIL = 2_000_000_000


@lru_cache(maxsize=1)
def read_detail(file: Path) -> dict[str, Any]:
    """Pascal in Detail's annotations: what matters of them, for they are large."""
    keep = {"images", "annos_segmentation", "image_id", "file_name", "phase", "category_id", "segmentation"}
    keep |= {"size", "counts"}
    try:
        data = read_json(file, LARGEST_DETAIL, lambda entry: {key: value for key, value in entry if key in keep})
    except JSONError as error:
        raise DataError(str(error)) from error
    expected = {
        "images": {"image_id": int, "file_name": str, "phase": str},
        "annos_segmentation": {"image_id": int, "category_id": int, "segmentation": object},
    }
    for key, fields in expected.items():
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not entries or not all(_has_fields(entry, fields) for entry in entries):
            raise DataError(f"'{file}' has no {key!r} with {', '.join(sorted(fields))}: expected Pascal in Detail's.")
    for key in ("file_name", "image_id"):
        counts = Counter(image[key] for image in data["images"])
        if repeated := [value for value, count in counts.items() if count > 1]:
            raise DataError(f"'{file}' has images of the same {key}: {join_some(repeated)}. Get it again.")
    for image in data["images"]:
        name = image["file_name"]
        if not name or PurePosixPath(name).name != name or name == ".." or set("\\:\0") & set(name):
            raise DataError(f"'{file}' names an image {name!r}, expected a file's name without a folder.")
    for region in data["annos_segmentation"]:
        if not 0 <= region["category_id"] < NUM_IDS:
            raise DataError(
                f"'{file}' has a region of the category_id {region['category_id']} in the image "
                f"{region['image_id']}, expected 0..{NUM_IDS - 1}."
            )
    return data


def _has_fields(entry: Any, fields: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(
        key in entry and isinstance(entry[key], kind) and not isinstance(entry[key], bool)
        for key, kind in fields.items()
    )


PASCAL_CONTEXT_59 = Benchmark(
    name="pascal-context-59",
    title="Pascal Context-59",
    published_title="Pascal Context-59",
    splits={"train": 4_998, "validation": 5_105},
    other_splits={"of the merged JSON file": DETAIL_SPLITS},
    ignore_index=255,
    source="https://cs.stanford.edu/~roozbeh/pascal-context/",
    license="other",
    terms=f"No licence of its own. {FLICKR_TERMS}",
    original_names={"validation": "pcontext_sem_seg_val"},
    find_images=find_images,
    read_ids=read_ids,
    num_ids=NUM_IDS,
    ignore_other_ids=True,
)
