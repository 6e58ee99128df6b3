"""Times training as it is documented: the real command, on generated photographs of COCO's size, with random weights.

    python scripts/benchmarks/training.py --steps 200 --batch-size 32 --workers 8 --mixed-precision bf16

Neither data nor weights change the time, so none are needed. The last line is JSON: images per second and the share of
time spent waiting for data (both without the first steps, which warm up), peak memory of a process, device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from photos import draw_photo
from transformers import CLIPModel

from san_hf.conversion import RELEASES, clip_tokenizer
from san_hf.vocabularies import load_vocabulary


ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"san-vit-b-16": "coco_stuff_vit_b16.yaml", "san-vit-large-14": "coco_stuff_vit_l14.yaml"}
NUM_IMAGES, SIZE = 64, (480, 640)  # height, width


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=sorted(RELEASES), default="san-vit-b-16")
    parser.add_argument(
        "--tiny", action="store_true", help="on a small CLIP and crops of 128 x 128, to try it without a GPU"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20, help="of these steps, how many are not counted")
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    parser.add_argument("--workers", type=int, default=4, help="that prepare data, for each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="anything else of the configuration")
    return parser.parse_args()


def make_data(folder: Path) -> None:
    """Pairs of images and labels with the classes of COCO-Stuff."""
    names = load_vocabulary("coco-stuff")
    for kind in ("images", "labels"):
        (folder / "train" / kind).mkdir(parents=True)
    for i in range(NUM_IMAGES):
        image, labels = draw_photo(np.random.default_rng(i), len(names), SIZE)
        image.save(folder / "train" / "images" / f"{i:03}.jpg", quality=90)
        labels.save(folder / "train" / "labels" / f"{i:03}.png")
    (folder / "classes.txt").write_text("\n".join(names) + "\n")


def make_clip(release: str, tiny: bool, folder: Path) -> None:
    """The release's CLIP, or a small one, with random weights."""
    torch.manual_seed(0)
    config = RELEASES[release].config().clip_config
    if tiny:
        for tower in (config.vision_config, config.text_config):
            tower.update(
                {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
            )
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


def train(options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Runs the command to the end: what it has logged of each step."""
    settings = {
        "output": folder / "run",
        "model.clip": folder / "clip",
        "data.source": folder / "data",
        "data.validation_split": "null",
        "data.workers": options.workers,
        "training.steps": options.steps,
        "training.batch_size": options.batch_size,
        "training.mixed_precision": options.mixed_precision,
        "checkpoints.every": options.steps,
    }
    if options.tiny:
        settings["augmentation.crop_size"] = 128
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={options.processes}"]
    command += ["--num_machines=1", "--dynamo_backend=no", f"--mixed_precision={options.mixed_precision}"]
    command += [
        str(ROOT / "scripts" / "train.py"),
        "--config",
        str(ROOT / "san_hf" / "training" / "recipes" / RECIPES[options.release]),
    ]
    command += [f"{key}={value}" for key, value in settings.items()] + options.overrides
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Its lines go where they don't mix with the result.
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    records = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [record for record in records if "images_per_second" in record]


def main() -> None:
    options = parse_arguments()
    if not 0 <= options.warmup < options.steps:
        sys.exit(f"Error: --warmup {options.warmup} leaves none of --steps {options.steps} to count.")
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data")
        make_clip(options.release, options.tiny, Path(folder) / "clip")
        try:
            records = train(options, Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"Error: the training failed with exit status {error.returncode}; it says why above.")
    counted = records[options.warmup :]
    images = options.batch_size * len(counted)
    seconds = [options.batch_size / record["images_per_second"] for record in counted]
    waited = sum(time * record["waiting_for_data"] for time, record in zip(seconds, counted))
    cuda = torch.cuda.is_available()
    result = vars(options) | {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "images_per_second": round(images / sum(seconds), 2),
        "waiting_for_data": round(waited / sum(seconds), 4),
        # Of a GPU the peak, without one what the process holds
        "memory_gib": max(record["memory_gb"] for record in counted),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
