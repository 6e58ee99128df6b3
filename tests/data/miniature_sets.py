"""The benchmarks in miniature, in the layouts of their owners, and what must become of their labels."""

import json
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from scipy.io import savemat

from san_hf.data import BENCHMARKS, prepare_benchmark, shards


SIZE = (30, 20)  # width, height
# file name: label map
Expected = dict[str, np.ndarray]


def bands(values: list[int], dtype=np.uint8, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(height, width): upright bands of one value each."""
    width, height = size
    columns = np.array(values)[np.arange(width) * len(values) // width]
    return np.tile(columns, (height, 1)).astype(dtype)


def write_photograph(file: Path, seed: int, size: tuple[int, int] = SIZE, mode: str = "RGB", **save) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, **save)


def write_png(file: Path, values: np.ndarray, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        # Colours that are nobody's label.
        image.putpalette([value for label in range(256) for value in (255 - label, label, 77)])
    image.save(file)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def build_coco(root: Path) -> dict[str, Expected]:
    # Ids are one more than the pixels: 0 person, 12 stop sign (label 11), 181 wood wall (the last); 11 (street sign)
    # and 182 are no classes.
    raw, labels = [0, 12, 181, 11, 182, 255], [0, 11, 170, 255, 255, 255]
    expected = {"train": {}, "validation": {}}
    for split, folder, names in (("train", "train2017", (9, 25, 30)), ("validation", "val2017", (139, 285))):
        for name in names:
            size, save = (SIZE, {})
            if name == 25:  # stored on its side
                write_photograph(root / folder / f"{name:012d}.jpg", name, SIZE[::-1], exif=orientation(6))
            else:
                mode = "L" if name == 30 else "RGB"
                write_photograph(root / folder / f"{name:012d}.jpg", name, size, mode, **save)
            turn = name % len(raw)
            values = raw[turn:] + raw[:turn]
            write_png(root / "stuffthingmaps_trainval2017" / folder / f"{name:012d}.png", bands(values))
            expected[split][f"{name:012d}.jpg"] = bands(labels[turn:] + labels[:turn])
    return expected


def build_voc(root: Path) -> dict[str, Expected]:
    raw, labels = [0, 1, 20, 255, 7], [255, 0, 19, 255, 6]
    names = {"train": ["2007_000032", "2008_000008", "2011_003276"], "validation": ["2007_000033", "2007_000042"]}
    for name in sum(names.values(), []):
        write_photograph(root / "JPEGImages" / f"{name}.jpg", int(name[-3:]))
        write_png(root / "SegmentationClassAug" / f"{name}.png", bands(raw))
    # One only where the owners have it: with a palette.
    (root / "SegmentationClassAug" / "2007_000042.png").unlink()
    write_png(root / "SegmentationClass" / "2007_000042.png", bands(raw), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")  # without the Berkeley annotations
    (lists / "val.txt").write_text("\n".join(names["validation"]) + "\n")
    return {split: {f"{name}.jpg": bands(labels) for name in some} for split, some in names.items()}


CONTEXT_NAMES = {"train": ["2008_000002", "2008_000008"], "validation": ["2008_000021", "2008_000026", "2008_000027"]}
# Ids among the 459: 2 aeroplane and 458 wood are the first and the last of the 59; 1 and 459 are none of them.
CONTEXT_IDS, CONTEXT_59, CONTEXT_459 = [0, 2, 458, 9, 1, 459], [255, 0, 58, 1, 255, 255], [65535, 1, 457, 8, 0, 458]


def _build_context(root: Path) -> None:
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "val")):
        (lists / f"{name}.txt").write_text("\n".join(CONTEXT_NAMES[split]) + "\n")
        for number, image in enumerate(CONTEXT_NAMES[split]):
            write_photograph(root / "JPEGImages" / f"{image}.jpg", number)
    write_photograph(root / "JPEGImages" / "2010_000001.jpg", 99)  # an image of VOC 2010 that isn't in the set


def _context(values: list[int], dtype) -> dict[str, Expected]:
    return {split: {f"{name}.jpg": bands(values, dtype) for name in some} for split, some in CONTEXT_NAMES.items()}


def build_context_mat(root: Path, labels: list[int] = CONTEXT_59, dtype=np.uint8) -> dict[str, Expected]:
    _build_context(root)
    (root / "trainval").mkdir()
    for name in sum(CONTEXT_NAMES.values(), []):
        savemat(root / "trainval" / f"{name}.mat", {"LabelMap": bands(CONTEXT_IDS, np.uint16)}, do_compression=True)
    return _context(labels, dtype)


def build_context_459(root: Path) -> dict[str, Expected]:
    return build_context_mat(root, CONTEXT_459, np.uint16)


def build_context_png(root: Path) -> dict[str, Expected]:
    _build_context(root)
    for name in sum(CONTEXT_NAMES.values(), []):
        write_png(root / "59_context_labels" / f"{name}.png", bands([0, 1, 59, 2, 0, 0]))
    return _context(CONTEXT_59, np.uint8)


def build_context_detail(root: Path) -> dict[str, Expected]:
    _build_context(root)
    ids = bands(CONTEXT_IDS, np.uint16)
    images, regions = [], []
    for phase, split in (("train", "train"), ("val", "validation"), ("test", None)):
        for name in CONTEXT_NAMES.get(split, ["2010_000001"]):
            number = int(name.replace("_", ""))
            images.append({"image_id": number, "file_name": f"{name}.jpg", "phase": phase, "height": 20, "width": 30})
            # A region below all, which later ones hide where they lie.
            for value in (9, 2, 458, 0):
                mask = np.ones_like(ids, bool) if value == 9 else ids == value
                if value == 0:
                    value, mask = 1, (ids != 2) & (ids != 458) & (ids != 9)
                code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
                code["counts"] = code["counts"].decode()
                regions.append(
                    {
                        "id": len(regions),
                        "image_id": number,
                        "category_id": value,
                        "segmentation": code,
                        "iscrowd": 0,
                        "parts": [{"part_id": 100, "segmentation": code}],
                    }
                )
    data = {"info": {}, "images": images, "annos_segmentation": regions, "parts": [{"part_id": 100, "name": "head"}]}
    (root / "trainval_merged.json").write_text(json.dumps(data))
    return _context(CONTEXT_59, np.uint8)


def build_ade_150(root: Path) -> dict[str, Expected]:
    expected = {"train": {}, "validation": {}}
    for split, folder, kind in (("train", "training", "train"), ("validation", "validation", "val")):
        for number in (1, 2):
            name = f"ADE_{kind}_{number:08d}"
            write_photograph(root / "images" / folder / f"{name}.jpg", number)
            write_png(root / "annotations" / folder / f"{name}.png", bands([0, 1, 150, 40]))
            expected[split][f"{name}.jpg"] = bands([255, 0, 149, 39])
    return expected


ADE_IDS = {2978: 0, 312: 1, 6: 65535, 3156: 65535, 1: 65535, 0: 65535}


def build_ade_847(root: Path) -> dict[str, Expected]:
    """With a training image from another source ("frame"), a large validation image, and one that is stored turned."""
    from san_hf.vocabularies import load_class_ids

    classes = load_class_ids("ade20k-847")
    ids = [2978, 312, max(classes), 1, 0]
    labels = [classes.index(number) if number in classes else 65535 for number in ids]
    expected = {"train": {}, "validation": {}}
    index = {"folder": [], "filename": []}
    for name, place, size in (
        ("ADE_train_00000001", "training/urban/street", SIZE),
        ("ADE_frame_00000007", "training/urban/street", SIZE),
        ("ADE_val_00000001", "validation/home_or_hotel/attic", (1100, 700)),
        ("ADE_val_00000002", "validation/work_place/val_shop", SIZE),
    ):
        folder = root / "images" / "ADE" / place
        # The labels lie on the picture as it is stored.
        exif = {"exif": orientation(6)} if name.endswith("val_00000002") else {}
        write_photograph(folder / f"{name}.jpg", len(index["folder"]), size, quality=90, **exif)
        values = bands(ids, np.int32, size)
        colours = np.stack([values // 256 * 10 + 3, values % 256, np.full_like(values, 200)], -1)
        write_png(folder / f"{name}_seg.png", colours.astype(np.uint8))
        index["folder"].append(f"ADE20K_2021_17_01/images/ADE/{place}")
        index["filename"].append(f"{name}.jpg")
        label_map = bands(labels, np.uint16, size)
        if size != SIZE:  # 512 x round(1100 / 700 * 512)
            label_map = label_map[[y * 700 // 512 for y in range(512)]][:, [x * 1100 // 805 for x in range(805)]]
        expected["validation" if "_val_" in name else "train"][f"{name}.jpg"] = label_map
    index["objectPresence"] = np.eye(4, dtype=np.uint16)
    index["objectnames"] = ["wall", "building, edifice"]
    index["scene"] = ["/urban/street"] * 4
    with open(root / "index_ade20k.pkl", "wb") as stream:
        pickle.dump(index, stream)
    return expected


BUILDERS = {
    "coco-stuff": ("coco-stuff", build_coco),
    "voc": ("voc", build_voc),
    "pascal-context-59": ("pascal-context-59", build_context_mat),
    "pascal-context-59 (PNG)": ("pascal-context-59", build_context_png),
    "pascal-context-59 (Detail)": ("pascal-context-59", build_context_detail),
    "pascal-context-459": ("pascal-context-459", build_context_459),
    "ade20k-150": ("ade20k-150", build_ade_150),
    "ade20k-847": ("ade20k-847", build_ade_847),
}


def count_as_complete(monkeypatch, name: str, expected: dict[str, Expected]) -> None:
    """Has `san_hf` expect as many images as the miniature has."""
    splits = {split: len(images) for split, images in expected.items()}
    monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], splits=splits))


def prepare_until_killed(source: str, output: str, moment: int, arguments: dict) -> None:
    """Prepares ADE20K-150, and ends by SIGKILL at a moment: 1, 2, ... of writing to the disk."""
    BENCHMARKS["ade20k-150"] = replace(BENCHMARKS["ade20k-150"], splits={"train": 2, "validation": 2})
    shards.IMAGES_PER_SHARD = 1

    def kill(*_):
        nonlocal moment
        moment -= 1
        if moment == 0:
            children = [child.pid for child in multiprocessing.active_children()]
            Path(source, "children").write_text(json.dumps(children))
            os.kill(os.getpid(), signal.SIGKILL)

    if arguments["workers"] > 1:
        prepare_benchmark("ade20k-150", source, output, progress=kill, **arguments)
        return
    replace_file, encode = os.replace, shards.encode_labels

    def replace_or_die(old, new):
        kill()
        replace_file(old, new)
        kill()

    def encode_or_die(*arguments):
        kill()
        return encode(*arguments)

    os.replace, shards.encode_labels = replace_or_die, encode_or_die
    prepare_benchmark("ade20k-150", source, output, **arguments)
