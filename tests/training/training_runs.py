"""What the tests of training share: a tiny model and data set on disk, runs in processes of their own, their logs."""

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
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


class Run:
    """A function in forked processes: real ones, which can be killed, without the seconds that importing takes."""

    def __init__(self, function, *args, processes: int = 1):
        # The kernel picks a free port.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.results = context.SimpleQueue()
        self.processes = [
            context.Process(target=self._run, args=(function, args, rank, processes, port)) for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def _run(self, function, args, rank: int, processes: int, port: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        # One process too many would make every collective wait for good.
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        try:
            outcome = function(*args)
        except Exception as error:
            outcome = (type(error).__name__, str(error))
            if "-s" in sys.argv:
                traceback.print_exc()
        self.results.put((rank, outcome))
        # Not what the test runner wants done when it ends.
        sys.stdout.flush()
        os._exit(0)

    def outcomes(self, timeout: float = 120) -> list:
        """What the function returned, or the name and the message of its error, by rank; None where killed."""
        outcomes = [None] * len(self.processes)
        deadline = time.monotonic() + timeout
        running = True
        while running:
            # Asked before the results are: a process that has ended has sent its own. And a long one is read while it
            # is being sent, as a pipe holds little.
            running = any(process.is_alive() for process in self.processes)
            while not self.results.empty():
                rank, outcome = self.results.get()
                outcomes[rank] = outcome
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"A run did not end within {timeout} s.")
            time.sleep(0.005)
        return outcomes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait_for_step(self, output: Path, step: int, timeout: float = 120) -> None:
        """Until log.jsonl has that many lines."""
        deadline = time.monotonic() + timeout
        file = output / "log.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < step:
            if time.monotonic() > deadline or not any(process.is_alive() for process in self.processes):
                self.kill()
                raise TimeoutError(f"The run never came to step {step}.")
            time.sleep(0.005)


def read_log(output: Path) -> list[dict]:
    """The records of a run, without its times."""
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def weights(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()
