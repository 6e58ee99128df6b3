"""Log of a training run: log.jsonl with every step, lines on the console, and trackers."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image

from san_hf.files import write_file
from san_hf.messages import one_line

from .config import ConfigError, LoggingSection


LOG_FILE = "log.jsonl"


class RunLog:
    """
    Writes the log of a run. Only the main process does.

    Args:
        accelerator: with `log_with` for the trackers.
        output: the run's folder.
        logging: what to show, and where.
        config: the run's configuration, for the trackers.
        run_id: names the run, also when it is resumed.
        step: the last step already taken; trackers drop what they have of later ones.
        steps: of the whole run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        logging: LoggingSection,
        config: Mapping[str, Any],
        run_id: str,
        step: int,
        steps: int,
    ):
        self.accelerator, self.logging, self.steps = accelerator, logging, steps
        self.file = None
        if accelerator.is_main_process:
            self.file = (output / LOG_FILE).open("a", encoding="utf-8")
        if logging.trackers:
            options = {
                "tensorboard": {"purge_step": step + 1},
                "wandb": {"id": run_id, "resume": "allow", "name": output.resolve().name, "dir": str(output)},
            }
            try:
                accelerator.init_trackers(
                    logging.project,
                    config=_flat(config),
                    init_kwargs={name: options[name] for name in logging.trackers},
                )
            except Exception as error:  # each tracker has errors of its own
                raise ConfigError(
                    f"logging.trackers: {', '.join(logging.trackers)} can't be started: {one_line(error)}. Leave it "
                    "out, or, for wandb without an account or a network, set WANDB_MODE=offline."
                ) from error

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        # Not accelerator.end_training(): it also destroys the process group, which the model still holds. Freed with
        # the model, gloo's threads and the interpreter lock may then wait for each other for good (torch 2.13).
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self, record: dict[str, Any]) -> None:
        """One step: `step`, the losses, `learning_rate` and so on, all numbers."""
        self._write(record)
        self._track({f"train/{key}": value for key, value in record.items() if key != "step"}, record["step"])
        if record["step"] % self.logging.every == 0 or record["step"] in (1, self.steps):
            self.say(_step_line(record, self.steps))

    def evaluation(self, step: int, metrics: Mapping[str, float], seconds: float, best: bool) -> None:
        """The metrics of an evaluation, in percent."""
        values = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        self._write({"step": step, "validation": values, "seconds": round(seconds, 2), "best": best})
        self._track({f"validation/{key}": value for key, value in values.items() if value is not None}, step)
        shown = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        self.say(f"step {step}/{self.steps}  validation: {shown}" + ("  (best so far)" if best else ""))

    def picture(self, step: int, picture: Image.Image) -> None:
        """A drawing of examples for the trackers."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"validation": [picture]}, step=step)

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def flush(self) -> None:
        """Brings log.jsonl onto the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def _track(self, values: dict[str, Any], step: int) -> None:
        if self.logging.trackers:
            self.accelerator.log(values, step=step)


class Clock:
    """Times steps: images per second, share of time spent waiting for data, seconds left."""

    def __init__(self, batch_size: int, steps_left: int):
        self.batch_size, self.steps_left = batch_size, steps_left
        self.steps, self.total = 0, 0.0
        self.started = self.waited = 0.0

    def start(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0

    def wait_for(self, batches: Any) -> Any:
        """The next batch; the time it takes is noted."""
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def metrics(self) -> dict[str, float]:
        """Of the step that ends now."""
        seconds = time.perf_counter() - self.started
        # The first step compiles, allocates and fills caches: it says nothing about the others.
        if self.steps:
            self.total += seconds
        self.steps += 1
        mean = self.total / (self.steps - 1) if self.steps > 1 else seconds
        return {
            "images_per_second": round(self.batch_size / seconds, 3),
            "waiting_for_data": round(self.waited / seconds, 4),
            "memory_gb": round(memory_in_use(), 3),
            "seconds_left": round(mean * (self.steps_left - self.steps), 1),
        }


def memory_in_use() -> float:
    """Peak memory of this process's GPU in GiB; without a GPU, the main memory it holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a tracker isn't installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"logging.trackers: {name} is not installed. Run: pip install {name}")


def truncate_log(output: Path, step: int, evaluated: int) -> None:
    """Drops from log.jsonl what came after a checkpoint, so that the resumed run can write it again."""
    file = output / LOG_FILE
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            break
        if record["step"] <= (evaluated if "validation" in record else step):
            kept.append(line + "\n")
    write_file(file, "".join(kept))


def _step_line(record: dict[str, Any], steps: int) -> str:
    parts = {"class": "cross_entropy", "mask": "mask", "dice": "dice"}
    losses = ", ".join(f"{name} {record[f'loss_{key}']:.3f}" for name, key in parts.items())
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.3f} ({losses})  lr {record['learning_rate']:.2e}  "
        f"{record['images_per_second']:.1f} images/s  waiting {record['waiting_for_data']:.0%}  "
        f"{record['memory_gb']:.2f} GB  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Sections resolved, and what trackers can't take as text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float) else str(value)
    return flat
