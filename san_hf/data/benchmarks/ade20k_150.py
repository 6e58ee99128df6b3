"""ADE20K with the 150 classes of the scene parsing benchmark."""

from pathlib import Path

from .base import Benchmark, Source, find_folder, pair_files, read_png


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    folder = {"train": "training", "validation": "validation"}[split]
    tops = ("", "ADEChallengeData2016/")
    images = find_folder(source, [f"{top}images/{folder}" for top in tops], f"images of {split}")
    return pair_files(images, find_folder(source, [f"{top}annotations/{folder}" for top in tops], f"labels of {split}"))


ADE20K_150 = Benchmark(
    name="ade20k-150",
    title="ADE20K-150",
    published_title="ADE20K-150",
    splits={"train": 20_210, "validation": 2_000},
    ignore_index=255,
    source="http://sceneparsing.csail.mit.edu/",
    license="other",
    terms="See the owner's page: the photographs are for research and education, not for commerce.",
    original_names={"validation": "ade20k_sem_seg_val"},
    find_images=find_images,
    read_ids=read_png,
    num_ids=151,
    ignored_ids=(0,),
)
