"""Log of a training run: log.jsonl with every step, lines on the console, and trackers."""

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

from san_hf.files import json_text, remove_folder, write_file
from san_hf.json_files import parse_json
from san_hf.messages import for_terminal, one_line

from .config import ConfigError, LoggingSection
from .errors import TrainingError


LOG_FILE = "log.jsonl"
# What the console calls a part of the loss, and how its keys in the log begin: each supervised layer has one.
LOSS_KINDS = {"class": "cross_entropy", "mask": "mask", "dice": "dice"}


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
        evaluates_again: whether an evaluation follows that step that trackers may have already: it is dropped, too.

    Raises:
        ConfigError: a tracker can't be started.
        OSError: the file can't be written.
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
        *,
        evaluates_again: bool = False,
    ):
        self.accelerator, self.logging, self.steps = accelerator, logging, steps
        self.file = None
        if accelerator.is_main_process:
            self.file = (output / LOG_FILE).open("a", encoding="utf-8")
        # Of the main process alone: elsewhere, Accelerate's trackers are empty shells.
        self.trackers: list[Any] = []
        if logging.trackers:
            options = {
                "tensorboard": {"purge_step": step + (0 if evaluates_again else 1)},
                "wandb": {"id": run_id, "resume": "allow", "name": output.resolve().name, "dir": str(output)},
            }
            try:
                accelerator.init_trackers(
                    logging.project, init_kwargs={name: options[name] for name in logging.trackers}
                )
                self.trackers = accelerator.trackers if accelerator.is_main_process else []
                self._describe_run(_flat(config), step)
            except Exception as error:  # each tracker has errors of its own
                raise ConfigError(
                    f"logging.trackers: {', '.join(logging.trackers)} can't be started: {one_line(error)}. Leave it "
                    "out, or, for wandb without an account or a network, set WANDB_MODE=offline."
                ) from error
        for tracker in self.trackers:
            if tracker.name == "wandb" and tracker.tracker.offline:
                self._begin_offline_again(tracker, output)
            elif evaluates_again:  # what was dropped with the evaluation
                for record in read_log(output):
                    if record["step"] == step and "validation" not in record:
                        self._track(record, [tracker])

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        # Not accelerator.end_training(): it also destroys the process group, which the model still holds. Freed with
        # the model, gloo's threads and the interpreter lock may then wait for each other for good (torch 2.13).
        for tracker in self.trackers:
            tracker.finish()

    def step(self, record: dict[str, Any]) -> None:
        """One step: `step`, the losses, `learning_rate` and so on, all numbers."""
        self._write(record)
        self._track(record, self.trackers)
        if record["step"] % self.logging.every == 0 or record["step"] in (1, self.steps):
            self.say(_step_line(record, self.steps))

    def evaluation(self, step: int, metrics: Mapping[str, float], seconds: float, best: bool) -> None:
        """The metrics of an evaluation, in percent."""
        values = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        record = {"step": step, "validation": values, "seconds": round(seconds, 2), "best": best}
        self._write(record)
        self._track(record, self.trackers)
        shown = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        self.say(f"step {step}/{self.steps}  validation: {shown}" + ("  (best so far)" if best else ""))

    def picture(self, step: int, picture: Image.Image) -> None:
        """A drawing of examples for the trackers."""
        for tracker in self.trackers:
            self._track_picture(step, picture, tracker)

    def say(self, text: str) -> None:
        """A line on the console."""
        if self.accelerator.is_main_process:
            print(for_terminal(text), flush=True)

    def flush(self) -> None:
        """Brings log.jsonl onto the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def _describe_run(self, config: dict[str, Any], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "wandb":
                tracker.store_init_configuration(config)
                # An evaluation belongs to its step, whatever W&B has counted when a resumed run makes it.
                for name in ("validation/*", "validation"):
                    tracker.tracker.define_metric(name, step_metric="validation/step")
            elif step == 0:
                # Not store_init_configuration, which makes two more folders without any metric in them.
                from torch.utils.tensorboard.summary import hparams

                for summary in hparams(config, {}):
                    tracker.tracker.file_writer.add_summary(summary)

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            try:
                self.file.write(json_text(record) + "\n")
                self.file.flush()
            except OSError as error:
                raise TrainingError(
                    f"'{self.file.name}' can't be written: {one_line(error)}. Complete checkpoints are kept: remove "
                    "the cause and continue with --resume."
                ) from error

    def _track(self, record: dict[str, Any], trackers: Sequence[Any]) -> None:
        """Has trackers know of a line of log.jsonl."""
        step = record["step"]
        if "validation" in record:
            values = {f"validation/{key}": value for key, value in record["validation"].items() if value is not None}
            values["validation/step"] = step
        else:
            values = {f"train/{key}": value for key, value in record.items() if key != "step"}
        for tracker in trackers:
            # W&B drops what comes for an earlier step than the last one.
            tracker.log(values, step=max(step, tracker.tracker.step) if tracker.name == "wandb" else step)

    def _track_picture(self, step: int, picture: Image.Image, tracker: Any) -> None:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({"validation": [picture]}, step=max(step, tracker.tracker.step))

    def _begin_offline_again(self, tracker: Any, output: Path) -> None:
        """
        Has W&B's folder of a run without a network hold all of the run, and be the only one. A killed process leaves
        one that lacks what W&B (0.31) had not yet written, and has what came after the checkpoint.
        """
        current = Path(tracker.tracker.dir).parent
        for folder in (output / "wandb").glob("offline-run-*"):
            if folder.name != current.name:
                remove_folder(folder)
        for record in read_log(output):
            self._track(record, [tracker])
            picture = output / "pictures" / f"step-{record['step']:08d}.png"
            if "validation" in record and picture.is_file():
                with Image.open(picture) as opened:
                    self._track_picture(record["step"], opened, tracker)


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


def read_log(output: Path) -> list[dict[str, Any]]:
    """
    The records of a run's log.jsonl. The last line of a killed run, if it is cut short, is left out.

    Raises:
        TrainingError: a line is no record; the message names it.
        OSError: the file can't be read.
    """
    file = output / LOG_FILE
    if not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, "the line")
            record["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(
                f"'{file}' is damaged in line {number}: expected a JSON object with a step. Delete that line, or the "
                "whole file, and resume again: only the log loses by it."
            ) from error
        records.append(record)
    return records


def truncate_log(output: Path, step: int, evaluated: int) -> list[dict[str, Any]]:
    """
    Drops from log.jsonl what came after a checkpoint, so that the resumed run can write it again.

    Returns:
        What is kept.

    Raises:
        TrainingError, OSError: see [`read_log`].
    """
    kept = [record for record in read_log(output) if record["step"] <= (evaluated if "validation" in record else step)]
    write_file(output / LOG_FILE, "".join(json_text(record) + "\n" for record in kept))
    return kept


def _step_line(record: dict[str, Any], steps: int) -> str:
    loss, *parts = shown_losses(record)
    losses = ", ".join(f"{name} {value:.3f}" for name, value in zip(LOSS_KINDS, parts))
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    return (
        f"step {record['step']}/{steps}  loss {loss:.3f} ({losses})  lr {record['learning_rate']:.2e}  "
        f"{record['images_per_second']:.1f} images/s  waiting {record['waiting_for_data']:.0%}  "
        f"{record['memory_gb']:.2f} GB  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    )


def shown_losses(record: Mapping[str, Any]) -> list[float]:
    """
    The loss, and its parts by kind, each over all supervised layers; rounded to three digits so that the parts still
    sum up to the loss.
    """
    parts = [
        round(sum(value for key, value in record.items() if key.startswith(f"loss_{kind}")), 3)
        for kind in LOSS_KINDS.values()
    ]
    loss = round(record["loss"], 3)
    largest = parts.index(max(parts))
    parts[largest] = round(parts[largest] + loss - sum(parts), 3)
    return [loss, *parts]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Sections resolved, and what trackers can't take as text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float) else str(value)
    return flat
