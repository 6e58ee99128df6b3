"""Pascal VOC 2012."""

from pathlib import Path

from .base import FLICKR_TERMS, Benchmark, Source, find_devkit, read_list, read_png, stems


def find_images(source: Path, split: str, expected: int) -> list[Source]:
    root = find_devkit(source, "VOC2012")
    augmented, own = root / "SegmentationClassAug", root / "SegmentationClass"
    validation = read_list(
        root, ["ImageSets/SegmentationAug/val.txt", "ImageSets/Segmentation/val.txt", "val.txt"], expected
    )
    if split == "validation":
        names = validation
    else:
        # The owners' list of 1,464 images is without the Berkeley annotations. SegmentationClassAug holds the label
        # maps of all images that have any: what isn't for validation is for training.
        tops = ("ImageSets/SegmentationAug", "ImageSets/Segmentation", ".")
        lists = [f"{top}/{name}.txt" for top in tops for name in ("train_aug", "trainaug", "train")]
        names = read_list(root, lists, expected)
        if len(names) != expected and augmented.is_dir():
            rest = sorted(stems(augmented, ".png") - set(validation))
            names = rest if len(rest) == expected else names

    def labels(name: str) -> Path:
        file = augmented / f"{name}.png"
        return own / file.name if split == "validation" and not file.is_file() else file

    return [Source(f"{name}.jpg", root / "JPEGImages" / f"{name}.jpg", labels(name)) for name in names]


VOC = Benchmark(
    name="voc",
    title="Pascal VOC 2012",
    published_title="Pascal VOC-20",
    splits={"train": 10_582, "validation": 1_449},
    ignore_index=255,
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    license="other",
    terms=f"No licence of its own. {FLICKR_TERMS}",
    original_names={"validation": "voc_sem_seg_val"},
    find_images=find_images,
    read_ids=read_png,
    num_ids=256,
    # The border of objects, and what lies behind them.
    ignored_ids=(0, 255),
)
