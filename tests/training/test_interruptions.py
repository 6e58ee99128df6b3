"""Runs that are stopped, killed, begun twice, begun wrongly, or damaged: what is resumed, and what is refused."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from san_hf import from_pretrained
from san_hf.data import load_segmentation_dataset
from san_hf.training import loop
from san_hf.training.checkpoint import list_checkpoints
from san_hf.training.config import TrainingConfig
from san_hf.training.loop import train
from san_hf.training.run_log import shown_losses
from san_hf.training.stream import SampleStream
from tests.forks import Run
from tests.training.training_runs import basics, configure, read_log, weights, write_images, write_root


SHORT = ("training.steps=2", "training.batch_size=2", "data.validation_split=null")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny model and a tiny data set."""
    return write_root(tmp_path_factory.mktemp("interruptions"), training=6, validation=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class StopAt(loop.StopRequest):
    """Asks to stop when it is looked at for the `at`-th time: in each step once its batches are there."""

    at = looks = 0

    @property
    def requested(self) -> bool:
        StopAt.looks += 1
        return StopAt.looks == StopAt.at

    @requested.setter
    def requested(self, _: bool) -> None:
        pass


def stopped_in(step: int, config: TrainingConfig) -> Path | None:
    StopAt.at, loop.StopRequest = step, StopAt
    return train(config)


ACCUMULATED = ("training.steps=4", "training.gradient_accumulation=4", "data.validation_split=null")


@pytest.fixture(scope="module")
def accumulated(root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("accumulated") / "run"
    assert Run(train, configure(root, output, *ACCUMULATED)).outcomes() == [output / "final"]
    return output


def test_stopped_between_accumulated_batches(root, accumulated, tmp_path):
    """Catches batches that were waited for, and are left out after resuming: the run would step after other ones."""
    config = configure(root, tmp_path / "run", *ACCUMULATED)
    assert Run(stopped_in, 2, config).outcomes() == [None]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert Run(train, config, True).outcomes() == [tmp_path / "run" / "final"]
    assert read_log(tmp_path / "run") == read_log(accumulated)
    assert weights(tmp_path / "run") == weights(accumulated)


def test_the_best_model_has_its_own_class_embeddings(root, tmp_path):
    """Catches best/ with the class embeddings of a text tower that has been trained since."""
    options = ("model.freeze_clip=false", "model.freeze_text=false", "training.steps=2", "evaluation.every=2")
    config = configure(root, tmp_path / "run", *options, "optimizer.max_grad_norm=1.0", "optimizer.learning_rate=0.01")
    assert Run(train, config).outcomes() == [tmp_path / "run" / "final"]
    model, processor = from_pretrained(tmp_path / "run" / "best")
    start, _ = from_pretrained(root / "model")
    inputs = processor(text=list(model.config.id2label.values()), return_tensors="pt")
    with torch.inference_mode():
        own, before = model.get_class_embeds(**inputs), start.get_class_embeds(**inputs)
    assert torch.equal(model.class_embeds, own)
    assert (own - before).abs().max() > 0.01


# Other data


@pytest.fixture(scope="module")
def started(root, tmp_path_factory) -> Path:
    """A run of three images after one step of two, and what it would be if it went on."""
    folder = tmp_path_factory.mktemp("started")
    write_images(folder / "data", "train", 4)
    config = configure(root, folder / "run", f"data.source={folder / 'data'}", *SHORT, "checkpoints.every=1")
    assert Run(train, config).outcomes() == [folder / "run" / "final"]
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000002")
    return folder


def used_and_unused(folder: Path) -> tuple[str, str]:
    """Names of an image that the run has seen, and of one that it hasn't."""
    files = names(folder / "train" / "images")
    used = SampleStream(load_segmentation_dataset(folder, "train"), 0, 2).drawn(2)
    return files[used[0]], next(name for index, name in enumerate(files) if index not in used)


def rename(folder: Path, used: str, unused: str) -> None:
    for kind in ("images", "labels"):
        (folder / "train" / kind / used).rename(folder / "train" / kind / "zzz.png")


def exchange(folder: Path, used: str, unused: str) -> None:
    one, other = (folder / "train" / "images" / name for name in (used, unused))
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def change_one_label(folder: Path, used: str, unused: str) -> None:
    file = folder / "train" / "labels" / used
    labels = np.array(Image.open(file))
    labels[20, 30] = (labels[20, 30] + 1) % 3
    Image.fromarray(labels).save(file)


def mend_another(folder: Path, used: str, unused: str) -> None:
    file = folder / "train" / "images" / unused
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)


def reorder_classes(folder: Path, used: str, unused: str) -> None:
    (folder / "classes.txt").write_text("road\nsky\ntree\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "file names differ"),
        pytest.param(exchange, "examples used so far differ", marks=pytest.mark.slow),
        (change_one_label, "examples used so far differ"),
        (reorder_classes, "class_names differ, they were ['sky', 'road', 'tree'] and are ['road', 'sky', 'tree']"),
        (mend_another, None),
    ],
)
def test_resuming_with_data_that_changed(root, started, tmp_path, change, message):
    """Catches a run that goes on with other images, and one that a broken image may no longer be mended for."""
    shutil.copytree(started, tmp_path / "copy")
    data, output = tmp_path / "copy" / "data", tmp_path / "copy" / "run"
    change(data, *used_and_unused(data))
    # The data have moved, too, which is no change.
    for file in (output / "config.yaml", *output.glob("checkpoints/*/progress.json")):
        file.write_text(file.read_text().replace(str(started), str(tmp_path / "copy")))
    config = configure(root, output, f"data.source={data}", *SHORT, "checkpoints.every=1")
    (outcome,) = Run(train, config, True).outcomes()
    if message is None:
        assert outcome == output / "final", outcome
    else:
        assert outcome[0] == "ConfigError" and message in outcome[1], outcome


# Starts


@pytest.mark.parametrize(
    ("override", "error"),
    [
        pytest.param("data.split=trane", "DataError", marks=pytest.mark.slow),
        ("model.checkpoint=nowhere", "ConfigError"),
        ("data.class_names=[sky, road]", "DataError"),  # seen in the first step only
        # With a loss that isn't finite.
        pytest.param("logging.trackers=[tensorboard]", "TrainingError", marks=pytest.mark.slow),
    ],
)
def test_a_start_that_fails_leaves_nothing(root, tmp_path, override, error):
    """Catches an output that refuses the corrected command, because of what the failed one has left."""
    output, model = tmp_path / "runs" / "mine", root / "model"
    if error == "TrainingError":
        model = shutil.copytree(model, tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        tensors["no_object_embed"][:] = math.nan
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ((got, _),) = Run(train, configure(root, output, *SHORT, f"model.checkpoint={model}", override)).outcomes()
    assert got == error
    if model.is_relative_to(tmp_path):
        shutil.rmtree(model)
    assert names(tmp_path) == []
    assert Run(train, configure(root, output, *SHORT)).outcomes() == [output / "final"]


def killed_at_change(count: int, config: TrainingConfig) -> None:
    """Trains, and is killed just before the `count`-th time that something in the output folder is opened or moved."""
    seen = 0

    def count_changes(event, arguments):
        nonlocal seen
        written = event in ("os.mkdir", "os.rename", "os.remove") or event == "open"
        if written and any(str(argument).startswith(config.output) for argument in arguments):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_changes)
    train(config)


@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=() if count in (6, 9) else pytest.mark.slow) for count in range(1, 25)]
)
def test_killed_at_one_of_the_first_writes(root, tmp_path, count):
    """Catches a folder that neither --resume nor a new start accepts."""
    config = configure(root, tmp_path / "run", *SHORT)
    assert Run(killed_at_change, count, config).outcomes() == [None]
    outcomes = Run(train, config, True).outcomes()
    assert outcomes == [tmp_path / "run" / "final"]
    assert names(tmp_path / "run") == ["checkpoints", "config.yaml", "final", "log.jsonl"]
    assert [record["step"] for record in read_log(tmp_path / "run")] == [1, 2]


def test_one_training_at_a_time(root, tmp_path):
    """Catches two runs that write the same files, and a lock that stays when its run was killed."""
    config = configure(root, tmp_path / "run", *SHORT, "training.steps=1000", "data.workers=1")
    first = Run(train, config)
    first.wait_for_step(tmp_path / "run", 1)
    ((error, message),) = Run(train, config, True).outcomes()
    assert error == "InUseError"
    assert f"'{tmp_path / 'run'}' is under way already, by process {first.processes[0].pid} on" in message
    assert first.processes[0].is_alive()
    first.kill()
    (outcome,) = Run(stopped_in, 1, config).outcomes()
    assert outcome[0] == "TrainingError" and "is not empty" in outcome[1]


@pytest.mark.slow
def test_ranks_end_with_their_launcher(root, tmp_path):
    """Catches processes that go on training, unseen, after torchrun or accelerate launch was killed."""
    arguments = [*basics(root, tmp_path / "run"), *SHORT, "training.steps=100000"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launcher = subprocess.Popen(
        [*command, "-m", "san_hf", "train", *arguments], env=environment, stderr=subprocess.PIPE
    )
    log = tmp_path / "run" / "log.jsonl"
    try:
        deadline = time.monotonic() + 180
        while not (log.exists() and log.stat().st_size):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        launcher.kill()
    # The ranks have inherited the pipe: it ends with the last of them.
    assert launcher.stderr.read().decode().count("the launcher of this process was killed") >= 1
    before = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == before


# Damage


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = configure(root, output, "training.steps=3", "training.batch_size=2", "data.validation_split=null")
    assert Run(stopped_in, 3, config).outcomes() == [None]
    return output


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    """One bit, of a weight rather than of a header."""
    middle = len(content) * 3 // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "progress.json"]
)
@pytest.mark.parametrize("damage", [cut, flip, None])
def test_a_damaged_checkpoint(root, finished, tmp_path, name, damage):
    """Catches damaged weights or states that pass silently, a stack trace, and torch's advice to trust them."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (checkpoint,) = list_checkpoints(output)
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink()
    if name == "progress.json" and damage is flip:
        file.write_bytes(content.replace(b'"step": 2', b'"step": 3'))
    elif damage is not None:
        file.write_bytes(damage(content))
    config = configure(root, output, "training.steps=3", "training.batch_size=2", "data.validation_split=null")
    error, message = failure_of(config)
    assert error == "CheckpointError"
    assert re.fullmatch(
        rf"'{re.escape(str(file))}' is damaged: [^\n]+\. Delete the folder '{re.escape(str(checkpoint))}' to resume "
        r"from the first step\.",
        message,
    ), message
    assert "weights_only" not in message


def failure_of(config: TrainingConfig) -> tuple[str, str]:
    """Name and message of the error that resuming ends with, in this process: it never comes to load anything."""
    with pytest.raises((OSError, RuntimeError, ValueError)) as raised:
        train(config, resume=True)
    return raised.type.__name__, str(raised.value)


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"", b"[]", b'{"loss": 1}', b'{"step": "1"}'])
def test_a_damaged_log(root, finished, tmp_path, line):
    """Catches a stack trace, and a log that silently loses what follows a damaged line."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    log = output / "log.jsonl"
    first, second, _ = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([first, line, second, b""]))
    config = configure(root, output, "training.steps=3", "training.batch_size=2", "data.validation_split=null")
    ((error, message),) = Run(train, config, True).outcomes()
    assert error == "TrainingError"
    assert f"'{log}' is damaged in line 2: " in message
    assert b"\n".join([first, line, second, b""]) == log.read_bytes()


# What a run shows


def test_the_printed_loss_is_the_sum_of_its_printed_parts():
    """Catches the parts of one supervised layer beside the loss of all of them, and roundings that don't add up."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = {
            f"loss_{kind}{layer}": float(rng.random() * 3)
            for kind in ("cross_entropy", "mask", "dice")
            for layer in ("", "_7")
        }
        record = {"step": 1, "loss": sum(parts.values()), **parts}
        loss, *shown = shown_losses(record)
        assert f"{loss:.3f}" == f"{record['loss']:.3f}"
        assert f"{sum(shown):.3f}" == f"{loss:.3f}"
        assert shown[1] == pytest.approx(parts["loss_mask"] + parts["loss_mask_7"], abs=0.0016)


def without_labels(folder: Path) -> None:
    for file in (folder / "validation" / "labels").iterdir():
        Image.fromarray(np.full((48, 60), 255, np.uint8)).save(file)


def printed_by(config: TrainingConfig, file: Path) -> None:
    with file.open("w") as sys.stdout:
        train(config)


def test_no_best_model_says_why(root, tmp_path):
    """Catches a best/ that never appears, without a word."""
    Run(printed_by, configure(root, tmp_path / "run", *SHORT), tmp_path / "said").outcomes()
    assert "There is no best/: data.validation_split is null" in (tmp_path / "said").read_text()


def tracked(config: TrainingConfig, dies: bool) -> None:
    """Trains with TensorBoard; may be killed when an evaluation was tracked, before a checkpoint knows of it."""
    if dies:
        from san_hf.training import run

        run.note_evaluation = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train(config, resume=not dies)


def test_tensorboard_has_each_evaluation_once(root, tmp_path):
    """Catches an evaluation that is repeated after a kill and then counts twice, or takes its step's losses along."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    options = ("training.steps=4", "training.batch_size=2", "evaluation.every=2", "evaluation.limit=1")
    output = tmp_path / "run"
    config = configure(root, output, *options, "logging.trackers=[tensorboard]", "evaluation.pictures=1")
    assert Run(tracked, config, True).outcomes() == [None]
    assert read_log(output)[-1]["step"] == 2 and "validation" in read_log(output)[-1]
    Run(tracked, config, False).outcomes()
    assert names(output / "san-hf") == [path.name for path in sorted((output / "san-hf").glob("events.*"))]
    log = read_log(output)
    accumulated = events.EventAccumulator(str(output / "san-hf")).Reload()
    evaluated = [(e.step, e.value) for e in accumulated.Scalars("validation/mIoU")]
    assert [step for step, _ in evaluated] == [2, 4]
    assert [value for _, value in evaluated] == pytest.approx(
        [record["validation"]["mIoU"] for record in log if "validation" in record]
    )
    assert [e.step for e in accumulated.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [e.step for e in accumulated.Images("validation")] == [2, 4]
    assert json.loads((list_checkpoints(output)[-1] / "progress.json").read_text())["evaluated"] == 4
