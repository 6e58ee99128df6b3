"""What the tests of training share: a tiny model and data set on disk, configurations of runs, their logs."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from san_hf.hub import save_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.training.config import TrainingConfig
from san_hf.training.config_file import load_config
from tests.tiny import tiny_config, tiny_tokenizer


CLASSES = ["sky", "road", "tree"]
# What depends on the clock rather than on the training.
TIMES = ("images_per_second", "waiting_for_data", "memory_gb", "seconds_left", "seconds")


def write_model(folder: Path) -> None:
    """A tiny SAN, untrained, the same on every machine."""
    torch.manual_seed(0)
    model = SANForSemanticSegmentation(tiny_config())
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    save_pretrained(model, SANProcessor(image_processor, tiny_tokenizer()), folder)


def write_images(folder: Path, split: str, count: int) -> None:
    """Pictures of a horizon and a disk whose colours tell the classes; one in five without labels."""
    for kind in ("images", "labels"):
        (folder / split / kind).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rows, columns = np.mgrid[:48, :60]
    for number in range(count):
        rng = np.random.default_rng([count, number])
        labels = (rows > rng.integers(12, 36)).astype(np.uint8)
        radius, center = rng.integers(6, 12), rng.integers(12, 36, 2)
        labels[(rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2] = 2
        colors = np.array([[120, 170, 240], [110, 100, 100], [40, 140, 50]])
        pixels = colors[labels] + rng.integers(-15, 16, (48, 60, 3))
        if number % 5 == 4:
            labels[:] = 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "images" / f"{number:03}.png")
        Image.fromarray(labels).save(folder / split / "labels" / f"{number:03}.png")


def write_root(folder: Path, training: int, validation: int) -> Path:
    """`folder`, with a tiny model and a tiny data set of so many images."""
    write_model(folder / "model")
    write_images(folder / "data", "train", training)
    write_images(folder / "data", "validation", validation)
    return folder


def configure(root: Path, output: Path, *overrides: str) -> TrainingConfig:
    """A short run on the CPU, on `root`/model and `root`/data."""
    return load_config(None, [*basics(root, output), *overrides])


def basics(root: Path, output: Path) -> list[str]:
    return [
        f"output={output}",
        f"model.checkpoint={root / 'model'}",
        f"data.source={root / 'data'}",
        "data.workers=0",
        "augmentation.crop_size=64",
        "optimizer.learning_rate=1e-3",
        "training.steps=8",
        "training.batch_size=4",
        "evaluation.every=1000",
        "evaluation.pictures=0",
        "checkpoints.every=3",
    ]


def read_log(output: Path) -> list[dict]:
    """The records of a run, without its times."""
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def weights(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()
