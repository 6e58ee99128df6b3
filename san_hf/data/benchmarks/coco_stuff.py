"""COCO-Stuff 164k."""

from pathlib import Path

from .base import FLICKR_TERMS, Benchmark, Source, find_folder, pair_files, read_png


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    folder = {"train": "train2017", "validation": "val2017"}[split]
    images = find_folder(source, [folder, f"images/{folder}"], f"images of {split}")
    tops = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations")
    return pair_files(images, find_folder(source, [f"{top}/{folder}" for top in tops], f"label maps of {split}"))


COCO_STUFF = Benchmark(
    name="coco-stuff",
    title="COCO-Stuff 164k",
    published_title="COCO-Stuff val2017",
    splits={"train": 118_287, "validation": 5_000},
    ignore_index=255,
    source="https://github.com/nightrome/cocostuff",
    license="cc-by-4.0",
    terms=f"Annotations: CC BY 4.0. {FLICKR_TERMS}",
    original_names={
        "train": "coco_2017_train_stuff_sem_seg",
        "validation": "coco_2017_test_stuff_sem_seg",
    },
    find_images=find_images,
    read_ids=read_png,
    # Its label maps hold id - 1, and 255 where unlabelled.
    num_ids=256,
    id_offset=-1,
    ignore_other_ids=True,
)
