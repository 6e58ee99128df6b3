"""The training loop: what it writes, that it stops and resumes exactly, and what it says when something is wrong."""

import errno
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from san_hf import from_pretrained
from san_hf.cli import app
from san_hf.data import DataError, load_segmentation_dataset
from san_hf.training import TrainingTransform, folder, processes
from san_hf.training.checkpoint import list_checkpoints
from san_hf.training.config import ConfigError, TrainingConfig, fields
from san_hf.training.config_file import load_config, table
from san_hf.training.errors import TrainingError
from san_hf.training.loop import train
from san_hf.training.model import build_model
from san_hf.training.stream import AugmentedSamples, SampleStream
from tests.forks import Run, printing
from tests.training.training_runs import CLASSES, basics, configure, read_log, weights, write_root


ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "san_hf" / "training" / "recipes"
CURVE = ROOT / "tests" / "fixtures" / "training" / "loss_curve.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny model and a tiny data set."""
    return write_root(tmp_path_factory.mktemp("training"), training=10, validation=3)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Path:
    """A run that nothing interrupted, with workers' batches, two parts to a step, and evaluations."""
    output = tmp_path_factory.mktemp("whole") / "run"
    (outcome,) = Run(train, configure(root, output, *BUSY)).outcomes()
    assert outcome == output / "final", outcome
    return output


BUSY = ("data.workers=1", "training.gradient_accumulation=2", "evaluation.every=4")


# Configuration


def test_recipe_is_the_published_one():
    """REFERENCE's figures, and defaults that say the same: a changed default or recipe shows here."""
    recipe = load_config(RECIPES / "coco_stuff_vit_b16.yaml")
    assert recipe.model.clip == "openai/clip-vit-base-patch16"
    assert recipe.augmentation.scales == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.power) == (1e-4, 1e-4, 0.9)
    assert (optimizer.warmup_steps, optimizer.max_grad_norm) == (0, 0.01)
    assert (recipe.training.steps, recipe.training.batch_size, recipe.evaluation.every) == (60_000, 32, 5000)
    defaults = TrainingConfig(output="x", model={"clip": "x"}, data={"source": "x"})
    for section in ("augmentation", "optimizer", "evaluation", "checkpoints"):
        assert getattr(recipe, section) == getattr(defaults, section)

    large = load_config(RECIPES / "coco_stuff_vit_l14.yaml")
    assert large.model.clip == "openai/clip-vit-large-patch14-336"
    assert large.model.san_config == {"clip_image_scale": 0.7}
    assert large.model_dump(exclude={"output", "model"}) == recipe.model_dump(exclude={"output", "model"})


def test_overrides():
    """Values are YAML, with 1e-5 a number; sections are merged; lists are replaced."""
    config = load_config(
        RECIPES / "coco_stuff_vit_l14.yaml",
        ["optimizer.learning_rate=5e-5", "model.san_config={num_queries: 50}", "augmentation.scales=[1.0]"]
        + ["data.validation_split=null", "training.mixed_precision=no"],
    )
    assert config.optimizer.learning_rate == 5e-5
    assert config.model.san_config == {"clip_image_scale": 0.7, "num_queries": 50}
    assert config.augmentation.scales == [1.0]
    assert config.data.validation_split is None
    assert config.training.mixed_precision == "no"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key; did you mean learning_rate?"),
        ("steps=5", "steps: unknown key; did you mean training.steps?"),
        ("training.steps=many", "training.steps: should be a valid integer, got 'many'"),
        ("training.steps=2.5", "training.steps: should be a valid integer, got 2.5"),
        ("data.streaming=1", "data.streaming: should be a valid boolean, got 1"),
        ("training.batch_size=0", "training.batch_size: should be greater than or equal to 1, got 0"),
        ("training.gradient_accumulation=3", "batch_size (32) must be a multiple of gradient_accumulation (3)"),
        ("model.clip=x", "either checkpoint"),
        ("model.san_config={num_querys: 3}", "'num_querys', which is no field of SANConfig; did you mean num_queries?"),
        ("model.san_config={freeze_clip: false}", "'freeze_clip', which is set by other keys"),
        ("training", "expected key=value such as"),
        ("training.steps=[", "is no YAML"),
        ("training=5", "training: should be a valid dictionary or instance of TrainingSection, got 5"),
        ("logging.trackers=[tensorbord]", "logging.trackers.0"),
        ("augmentation.scales=[0.5, -1]", "augmentation.scales.1: should be greater than 0, got -1"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: should be a finite number, got inf"),
        ("data.class_names=[no, 1e3]", "1: should be a valid string: in YAML, text that looks like a number, a date,"),
        ("data.class_names=[2024-01-01]", "goes in quotes; got '2024-01-01'"),
        ("data.class_names=[sky, true, null]", "goes in quotes; got True"),
        ("data.split=2024", "data.split: should be a valid string: in YAML, text that looks like a number"),
        ("hub.repo=me/my/san", "hub: repo is 'me/my/san', expected owner/name"),
    ],
)
def test_wrong_overrides(override, message):
    """Each names its key: a default used in place of a misspelt value would train wrongly without a word."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, ["output=x", "model.checkpoint=x", "data.source=x", override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\noutput: y\n", "the key 'output' occurs twice in line 1"),
        ("- a\n", "holds list, expected keys with values"),
        ("a: [\n", "is no YAML"),
        ("output: x\n", "model: missing: give model.checkpoint (a SAN to go on with) or model.clip"),
        ("base: recipe.yaml\n", "is its own base"),
        ("base: none.yaml\n", "none.yaml' can't be read: No such file"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "recipe.yaml")


def test_documentation_has_every_key():
    """The table in the README is made of the fields: a key or default changed without it shows here."""
    text = (ROOT / "san_hf" / "training" / "README.md").read_text(encoding="utf-8")
    assert table() in text
    assert all(field.description for _, field in fields())


# Order of the data


def test_stream(root):
    """
    Every image once in each pass, in another order each time; and sample n is the same, pixel for pixel, whichever
    process gets it and wherever the stream starts.
    """
    data = load_segmentation_dataset(root / "data", "train")
    samples = AugmentedSamples(data, TrainingTransform(crop_size=32), seed=3)

    def take(count, **options):
        stream = iter(SampleStream(data, 3, 4, **options))
        return [sample for _ in range(count) for sample in next(stream)]

    alone = take(10)
    assert [number for number, _, _ in alone] == list(range(40))
    orders = [[index for _, index, _ in alone[start : start + 10]] for start in (0, 10, 20, 30)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert take(3, first=28) == alone[28:]
    shared = [take(10, process_index=rank, num_processes=3) for rank in range(3)]
    assert sorted(sum(shared, [])) == alone
    for sample in alone[:3]:
        first, second = samples[sample], samples[sample]
        assert (first["image"] == second["image"]).all()
    # The same image, ten samples later, is augmented anew.
    again = next(sample for sample in alone[10:20] if sample[1] == alone[0][1])
    assert (samples[alone[0]]["image"] != samples[again]["image"]).any()


def test_streamed_data(root):
    """Streamed data start anywhere, too, in the first pass (whose end is not known yet) and in later ones."""
    data = load_segmentation_dataset(root / "data", "train", streaming=True)
    assert isinstance(data.dataset, datasets.IterableDataset)

    def take(count, **options):
        stream = iter(SampleStream(data, 3, 4, shuffle_buffer=6, **options))
        return [(number, row["file_name"]) for _ in range(count) for number, _, row in next(stream)]

    whole = take(8)
    passes = [[name for _, name in whole[start : start + 10]] for start in (0, 10, 20)]
    assert all(len(set(names)) == 10 for names in passes)
    assert passes[0] != passes[1]
    assert take(3, first=4) == whole[4:16]
    assert take(4, first=16, epoch_length=10) == whole[16:]
    shared = [take(8, process_index=rank, num_processes=3) for rank in range(3)]
    assert sorted(sum(shared, [])) == whole


# A run


def run_script(*arguments: str) -> None:
    """What `accelerate launch scripts/train.py` runs in each process; it ends with the status of the command."""
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code


def test_loss_curve(root, tmp_path):
    """
    50 steps by the script give the committed losses: the curve changes with the augmentation, the loss, the optimiser,
    the schedule or the order of the data.
    """
    recipe = tmp_path / "recipe.yaml"
    values = load_config(None, [*basics(root, tmp_path / "run"), "training.steps=50", "data.validation_split=null"])
    recipe.write_text(yaml.safe_dump(values.model_dump()))
    said = tmp_path / "said.txt"
    arguments = ["--config", str(recipe), "optimizer.learning_rate=1e-2"]
    assert Run(printing, said, run_script, *arguments).outcomes(280) == [None], said.read_text()
    log = read_log(tmp_path / "run")
    assert [record["step"] for record in log] == list(range(1, 51))
    losses = [record["loss"] for record in log]
    if os.environ.get("UPDATE_LOSS_CURVE"):
        CURVE.parent.mkdir(parents=True, exist_ok=True)
        CURVE.write_text(json.dumps([round(loss, 4) for loss in losses]) + "\n")
    expected = json.loads(CURVE.read_text())
    # To the digit at first; later, other CPUs' rounding may have matched a query to another mask.
    assert losses[:5] == pytest.approx(expected[:5], rel=1e-3)
    assert np.reshape(losses, (5, 10)).mean(1) == pytest.approx(np.reshape(expected, (5, 10)).mean(1), rel=0.03)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    # The published schedule: (1 - step / steps) ** 0.9.
    rates = [record["learning_rate"] for record in log]
    assert rates == pytest.approx([1e-2 * (1 - step / 50) ** 0.9 for step in range(50)])
    assert f"Wrote {tmp_path / 'run' / 'final'}" in said.read_text()
    assert "step 20/50  loss" in said.read_text()


def test_what_a_run_writes(root, whole):
    """Folders that load, figures that fit each other, the latest checkpoints only."""
    log = read_log(whole)
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    for record in steps:
        parts = [value for name, value in record.items() if name.startswith("loss_")]
        assert len(parts) == 6
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
    evaluations = {record["step"]: record["validation"]["mIoU"] for record in log if "validation" in record}
    assert list(evaluations) == [4, 8]
    assert [path.name for path in list_checkpoints(whole)] == ["step-00000006", "step-00000008"]
    best = max(evaluations, key=evaluations.get)
    assert f"trained for {best} of 8 steps" in (whole / "best" / "README.md").read_text()
    model, processor = from_pretrained(whole / "final")
    assert list(model.config.id2label.values()) == CLASSES
    assert model.class_embeds.shape[0] == 3
    start, _ = from_pretrained(load_config(whole / "config.yaml").model.checkpoint)
    moved = {name for name, value in start.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert any("side_adapter" in name for name in moved)
    assert not any(name.startswith("text_model") for name in moved)


def test_killed_while_training(root, whole, tmp_path):
    """SIGKILL between checkpoints: the steps since are taken again, and log and weights are those of a whole run."""
    config = configure(root, tmp_path / "run", *BUSY)
    run = Run(train, config)
    run.wait_for_step(tmp_path / "run", 5)
    run.kill()
    assert not (tmp_path / "run" / "final").exists()
    (outcome,) = Run(train, config, True).outcomes()
    assert outcome == tmp_path / "run" / "final", outcome
    assert read_log(tmp_path / "run") == read_log(whole)
    assert weights(tmp_path / "run") == weights(whole)


def killed_at(count: int, config: TrainingConfig) -> None:
    """Trains, and is killed before the `count`-th time that a file or folder gets another name."""
    rename, calls = os.rename, []

    def last_call(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)

    os.rename = last_call
    train(config)


# The first checkpoint of `whole` is at step 3, the second at 4, for the evaluation, and there "best" is written; later
# ones rename the oldest checkpoint to remove it.
@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_killed_while_saving(root, whole, tmp_path, count):
    """SIGKILL in the midst of writing a checkpoint or a model: no half of it counts, and nothing is lost."""
    config = configure(root, tmp_path / "run", *BUSY)
    (outcome,) = Run(killed_at, count, config).outcomes()
    assert outcome is None
    (outcome,) = Run(train, config, True).outcomes()
    assert outcome == tmp_path / "run" / "final", outcome
    assert read_log(tmp_path / "run") == read_log(whole)
    assert weights(tmp_path / "run") == weights(whole)
    assert not [*(tmp_path / "run").rglob("*.partial"), *(tmp_path / "run").rglob("*.replaced")]


def test_two_processes_resume_and_stop(root, tmp_path):
    """
    Two processes with an odd batch: SIGTERM to one of them stops both after the same step, saved; then SIGKILL; and
    the resumed run is the whole one, bit for bit.
    """
    options = ("training.batch_size=3", "data.workers=1")
    (first, second) = Run(train, configure(root, tmp_path / "whole", *options), processes=2).outcomes()
    assert first == second == tmp_path / "whole" / "final", (first, second)

    config = configure(root, tmp_path / "run", *options)
    run = Run(train, config, processes=2)
    run.wait_for_step(tmp_path / "run", 1)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.outcomes() == [None, None]
    stopped = list_checkpoints(tmp_path / "run")[-1]
    assert stopped.name == f"step-{len(read_log(tmp_path / 'run')):08}"
    assert not (tmp_path / "run" / "final").exists()
    run = Run(train, config, True, processes=2)
    run.wait_for_step(tmp_path / "run", 5)
    run.kill()
    assert Run(train, config, True, processes=2).outcomes() == [tmp_path / "run" / "final"] * 2
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_resume_matrix(root, tmp_path, workers, accumulation, processes, streaming):
    """Killed again and again, at moments of no meaning, with every kind of loader: the run is always the same."""
    options = (
        f"data.workers={workers}",
        f"training.gradient_accumulation={accumulation}",
        f"data.streaming={streaming}",
        "data.shuffle_buffer=5",
        "training.steps=12",
        "evaluation.every=5",
    )
    Run(train, configure(root, tmp_path / "whole", *options), processes=processes).outcomes()
    config = configure(root, tmp_path / "run", *options)
    for number, step in enumerate((2, 5, 8, 11)):
        run = Run(train, config, number > 0, processes=processes)
        run.wait_for_step(tmp_path / "run", step)
        run.kill()
    assert Run(train, config, True, processes=processes).outcomes() == [tmp_path / "run" / "final"] * processes
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


# What goes wrong


def without_the_flag_for_cpus(config: TrainingConfig) -> None:
    del os.environ["ACCELERATE_USE_CPU"]
    train(config)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "WORLD_SIZE",
            "2",
            "2 processes were started, .*but for Accelerate there are 1.*ACCELERATE_USE_CPU=true|MASTER_ADDR",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "gradient_accumulation is 2, but Accelerate was told 4.*training.gradient_accumulation=4",
        ),
    ],
)
def test_launched_otherwise_than_configured(root, tmp_path, monkeypatch, variable, value, message):
    """Catches processes that each write the whole run, and steps of more batches than the configuration says."""
    monkeypatch.setenv(variable, value)
    config = configure(root, tmp_path / "run", "training.gradient_accumulation=2")
    ((error, text),) = Run(without_the_flag_for_cpus, config).outcomes()
    assert error == "ConfigError"
    assert re.search(message, text), text
    assert not (tmp_path / "run").exists()


def test_second_ctrl_c(monkeypatch):
    """Catches a launcher's copy of a Ctrl-C that is taken for a second one, and a second one that is passed over."""
    with processes.StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        later = time.monotonic() + 3
        monkeypatch.setattr(processes.time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_gradient_checkpointing(root, tmp_path):
    """Catches a way to ask for it that transformers is about to remove, and other losses than without it."""
    for value in ("true", "false"):
        options = (f"training.gradient_checkpointing={value}", "training.steps=2", "data.validation_split=null")
        config = configure(root, tmp_path / value, *options)
        assert Run(train, config).outcomes() == [tmp_path / value / "final"]
    assert read_log(tmp_path / "true") == read_log(tmp_path / "false")


def test_validation_source(root, tmp_path):
    """
    Catches other classes or labels for the validation set than for the training set, where they are given; and
    a model that is the best for a mIoU that there isn't.
    """
    shutil.copytree(root / "data" / "validation", tmp_path / "other" / "validation")
    labels = Image.open(tmp_path / "other" / "validation" / "labels" / "000.png")
    Image.fromarray(np.full((labels.height, labels.width), 7, dtype=np.uint8)).save(labels.filename)
    options = (
        f"data.validation_source={tmp_path / 'other'}",
        "data.class_names=[sky, road, tree]",  # the folder itself says none
        "data.ignore_index=7",
        f"data.source={tmp_path / 'data'}",
        "training.steps=1",
        "evaluation.limit=1",
    )
    shutil.copytree(root / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "labels").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 7, labels).astype(np.uint8)).save(path)
    outcomes = Run(train, configure(root, tmp_path / "run", *options)).outcomes()
    assert outcomes == [tmp_path / "run" / "final"]
    _, evaluation = read_log(tmp_path / "run")
    assert evaluation["validation"]["mIoU"] is None
    assert evaluation["best"] is False
    assert not (tmp_path / "run" / "best").exists()


def run_command(*arguments: str):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_output_in_use(root, whole, tmp_path):
    """A new run never mixes with, or deletes, what is there."""
    before = sorted(whole.rglob("*"))
    with pytest.raises(TrainingError, match="is not empty.*--resume"):
        train(configure(root, whole))
    with pytest.raises(ConfigError, match=r"another configuration:\n  seed: was 0, is 1"):
        train(configure(root, whole, *BUSY, "seed=1"), resume=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear")
    with pytest.raises(TrainingError, match="holds no run to resume"):
        train(configure(root, tmp_path / "letters"), resume=True)
    assert sorted(whole.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="can't be used: File exists"):
        train(configure(root, tmp_path / "file"))
    with pytest.raises(TrainingError, match="can't be used: Not a directory"):
        train(configure(root, tmp_path / "file" / "run"))


def test_read_only_output(root, tmp_path, monkeypatch):
    """Said before anything is loaded. (Permissions don't stop a root user, so the refusal is made up.)"""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folder, "locked", refuse)
    with pytest.raises(TrainingError, match="run' can't be used: Read-only file system"):
        train(configure(root, tmp_path / "run"))


def test_resuming_with_other_data(root, tmp_path):
    """Another number of images would be another order: refused rather than trained on something else."""
    shutil.copytree(root / "data", tmp_path / "data")
    options = (f"data.source={tmp_path / 'data'}", "training.steps=2", "data.validation_split=null")
    config = configure(root, tmp_path / "run", *options)
    Run(train, config).outcomes()
    for kind in ("images", "labels"):
        (tmp_path / "data" / "train" / kind / "009.png").unlink()
    ((error, message),) = Run(train, config, True).outcomes()
    assert error == "ConfigError"
    assert "examples differ, they were 10 and are 9 now" in message


def test_broken_image(root, tmp_path):
    """The run stops with the file's name and a checkpoint; with the file mended it goes on as if nothing had been."""
    shutil.copytree(root / "data", tmp_path / "data")
    options = (f"data.source={tmp_path / 'data'}", "data.workers=1", "training.steps=6", "data.validation_split=null")
    Run(train, configure(root, tmp_path / "whole", *options)).outcomes()

    config = configure(root, tmp_path / "run", *options)
    data = load_segmentation_dataset(tmp_path / "data", "train")
    stream = iter(SampleStream(data, 0, 4))
    next(stream)
    broken = data[next(stream)[0][1]][2]  # in step 2
    sound = (tmp_path / "data" / "train" / "images" / broken).read_bytes()
    (tmp_path / "data" / "train" / "images" / broken).write_bytes(sound[:200])
    first, second = Run(train, config, processes=2).outcomes()
    assert {first[0], second[0]} == {"DataError", "PeerError"}
    message = next(message for error, message in (first, second) if error == "DataError")
    assert broken in message
    assert "Traceback" not in message
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]
    shutil.rmtree(tmp_path / "run")
    Run(train, config).outcomes()
    (tmp_path / "data" / "train" / "images" / broken).write_bytes(sound)
    assert Run(train, config, True).outcomes() == [tmp_path / "run" / "final"]
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_loss_that_is_not_finite(root, tmp_path):
    """The batch is named, and the checkpoint before it is there and loads."""
    config = configure(root, tmp_path / "run", "optimizer.learning_rate=1e30", "checkpoints.every=1")
    ((error, message),) = Run(train, config).outcomes()
    assert error == "TrainingError"
    data = load_segmentation_dataset(root / "data", "train")
    stream = iter(SampleStream(data, 0, 4))
    next(stream)
    names = ", ".join(data[index][2] for _, index, _ in next(stream))
    assert "The loss of step 2 is not finite (loss nan" in message
    assert f"for the batch of: {names}." in message
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert len(read_log(tmp_path / "run")) == 1


def on_a_full_disk(config: TrainingConfig, size: int) -> None:
    """Trains where no file may become larger than `size`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(config, resume=True)


def test_full_disk(root, tmp_path):
    """What can't be written leaves no half, and what was complete stays and resumes."""
    config = configure(root, tmp_path / "run", "data.validation_split=null", "training.steps=3")
    ((error, message),) = Run(on_a_full_disk, config, 100_000).outcomes()
    assert error == "CheckpointError"
    assert "The checkpoint of step 3 can't be written" in message
    assert not list_checkpoints(tmp_path / "run")
    assert not [*(tmp_path / "run").rglob("*.partial"), *(tmp_path / "run").rglob("*.replaced")]
    assert Run(train, config, True).outcomes() == [tmp_path / "run" / "final"]


def test_data_that_cannot_be_used(root, tmp_path):
    for split, message in [("nowhere", "has no split 'nowhere'"), ("empty", "no image in")]:
        (root / "data" / "empty" / "images").mkdir(parents=True, exist_ok=True)
        (root / "data" / "empty" / "labels").mkdir(parents=True, exist_ok=True)
        with pytest.raises(DataError, match=message):
            train(configure(root, tmp_path / split, f"data.split={split}"))


MODELS_THAT_CANNOT_BE_HAD = [
    ("model.checkpoint=/none", "model.checkpoint=/none can't be used: .*no folder of that name"),
    ("model.san_config={num_queries: 7}", "num_queries can't be changed: .*has weights for num_queries=5, got 7"),
    ("model.san_config={num_queries: few}", "num_queries"),
    ("model.san_config={num_queries: -3}", "with model.san_config={'num_queries': -3} can't be used: "),
    ("model.san_config={num_attention_heads: 7}", r"must be a multiple of num_attention_heads \(7\)"),
    ("model.san_config={recognition_layer: 50}", r"recognition_layer \(50\) must leave at least one"),
    ("model.san_config={fusion_layers: [[99, 0]]}", r"fusion_layers has \[99, 0\], outside"),
    ("model.san_config={bias_pooling: foo}", "bias_pooling must be one of .*'foo'"),
    ("model.prompt_templates=[a photo]", "with one {} for the name"),
]


@pytest.mark.parametrize(("override", "message"), MODELS_THAT_CANNOT_BE_HAD)
def test_model_that_cannot_be_had(root, override, message):
    """Catches fields that contradict each other, with which a model would train to the end, and stack traces."""
    data = load_segmentation_dataset(root / "data", "train")
    with pytest.raises(ConfigError, match=message):
        build_model(configure(root, root / "run", override).model, data)


def test_command(root, tmp_path):
    """Errors are a line and status 2; --show trains nothing; help says how to begin."""
    result = run_command("training.stps=3", "output=x")
    assert result.exit_code == 2
    assert "training.stps: unknown key; did you mean steps?" in result.stderr
    assert "Traceback" not in result.output
    result = run_command("--show", *basics(root, tmp_path / "run"))
    assert result.exit_code == 0
    assert "optimizer.learning_rate=0.001\n" in result.output
    assert not (tmp_path / "run").exists()
    result = run_command("--config", "finetune", "--show")
    assert result.exit_code == 0
    assert "data.source=REQUIRED\n" in result.output and "model.checkpoint=san-vit-b-16\n" in result.output
    result = run_command("--show", "training.steps=3")
    assert "model.checkpoint=REQUIRED\n" in result.output and "training.steps=3\n" in result.output
    result = run_command("--help")
    assert "data.source=FOLDER" in result.output
    assert "--resume" in result.output


def with_trackers(config: TrainingConfig) -> Path:
    os.environ["WANDB_MODE"] = "offline"
    return train(config)


def test_tensorboard(root, tmp_path):
    """The figures of the log arrive at their steps, and example pictures with the evaluations."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    options = ("logging.trackers=[tensorboard]", "training.steps=4", "evaluation.every=2", "evaluation.pictures=2")
    config = configure(root, tmp_path / "run", *options)
    (outcome,) = Run(with_trackers, config).outcomes()
    assert outcome == tmp_path / "run" / "final", outcome
    (folder,) = {path.parent for path in (tmp_path / "run" / "san-hf").glob("events.*")}
    found = events.EventAccumulator(str(folder), {"images": 0}).Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    log = read_log(tmp_path / "run")
    assert losses == pytest.approx({record["step"]: record["loss"] for record in log if "loss" in record})
    figures = {event.step: event.value for event in found.Scalars("validation/mIoU")}
    expected = {record["step"]: record["validation"]["mIoU"] for record in log if "validation" in record}
    assert figures == pytest.approx(expected)
    assert [image.step for image in found.Images("validation")] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir()) == [
        "best.png",
        "step-00000002.png",
        "step-00000004.png",
    ]


@pytest.mark.slow
def test_wandb_offline(root, tmp_path):
    """Runs without network and account, and leaves a run that can be synced."""
    pytest.importorskip("wandb", reason="needs wandb")
    options = ("logging.trackers=[wandb]", "training.steps=4", "evaluation.every=2", "evaluation.pictures=1")
    (outcome,) = Run(with_trackers, configure(root, tmp_path / "run", *options)).outcomes()
    assert outcome == tmp_path / "run" / "final", outcome
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_unfrozen_clip(root, tmp_path):
    """`freeze_clip: false` moves CLIP's vision tower and leaves its text tower; `freeze_text: false` moves both."""
    start, _ = from_pretrained(root / "model")
    for freeze_text, parts in (("true", {"model"}), ("false", {"model", "text_model", "text_projection"})):
        options = ["model.freeze_clip=false", f"model.freeze_text={freeze_text}", "training.steps=1"]
        config = configure(root, tmp_path / freeze_text, *options, "data.validation_split=null")
        # Two processes: a parameter without gradient would be an error there.
        outcomes = Run(train, config, processes=2).outcomes()
        assert outcomes == [tmp_path / freeze_text / "final"] * 2, outcomes
        model, processor = from_pretrained(tmp_path / freeze_text / "final")
        moved = {name for name, value in start.named_parameters() if not torch.equal(value, model.get_parameter(name))}
        assert "model.vision_model.encoder.layers.0.mlp.fc1.weight" in moved
        assert {name.split(".")[0] for name in moved} - {"no_object_embed", "logit_scale"} == parts
        # What the model carries is what its own text tower says.
        embeds = model.get_class_embeds(**processor(text=CLASSES))
        assert torch.allclose(embeds, model.class_embeds, atol=1e-6)


def test_recipes_by_name(tmp_path, monkeypatch):
    """Catches recipes that are found in a checkout only, and a file of one's own that a recipe's name hides."""
    monkeypatch.chdir(tmp_path)
    for file in RECIPES.glob("*.yaml"):
        needed = ["model.checkpoint=x"] if "coco" not in file.stem else []
        assert load_config(file.stem, ["data.source=x", *needed]) == load_config(file, ["data.source=x", *needed])
    with pytest.raises(
        ConfigError, match="none of the package's recipes has that name: coco_stuff_vit_b16, .*finetune"
    ):
        load_config("fine")
    Path("finetune").write_text("training: {steps: 3}")
    assert load_config("finetune", ["output=a", "model.clip=b", "data.source=c"]).training.steps == 3


def counted(config: TrainingConfig) -> tuple[int, int, int]:
    """Trains; how many prompts the text tower saw, images the vision tower while evaluating, and examples decoded."""
    from san_hf.data import SegmentationDataset
    from san_hf.modeling import SANForSemanticSegmentation, SANModel

    encode_text, see, decode = (
        SANForSemanticSegmentation.get_class_embeds,
        SANModel.forward,
        SegmentationDataset.example,
    )
    prompts, images, examples = [], [], []

    def count_prompts(self, input_ids, *args, **kwargs):
        prompts.append(input_ids.shape[0] * input_ids.shape[1])
        return encode_text(self, input_ids, *args, **kwargs)

    def count_images(self, pixel_values, *args, **kwargs):
        images.append(0 if self.training else len(pixel_values))
        return see(self, pixel_values, *args, **kwargs)

    def count_examples(self, row, index):
        examples.append(self.split == "validation")
        return decode(self, row, index)

    SANForSemanticSegmentation.get_class_embeds, SANModel.forward = count_prompts, count_images
    SegmentationDataset.example = count_examples
    train(config)
    return sum(prompts), sum(images), sum(examples)


def test_nothing_is_computed_twice(root, tmp_path):
    """
    Catches class names that are encoded for each evaluation, validation images that go through the model again to be
    drawn, and examples that are decoded again for that.
    """
    options = ["evaluation.every=2", "evaluation.pictures=2", "training.steps=6"]
    config = configure(root, tmp_path / "run", *options)
    ((prompts, images, examples),) = Run(counted, config).outcomes()
    assert prompts == len(CLASSES) * 14
    assert images == 3 * 3  # evaluations x validation images
    assert examples == 3 * 3 + 1  # and one, when the data set is opened, to see whether it has labels
    assert len(list((tmp_path / "run" / "pictures").glob("step-*.png"))) == 3


def test_own_colors(root, tmp_path):
    """Catches drawings in other colours than those that were given, and a wrong one that is found after hours."""
    (tmp_path / "colors.txt").write_text("sky=#010203\ntree=#040506\n")
    for name, given in (("mapping", "{sky: '#010203', tree: [4, 5, 6]}"), ("file", str(tmp_path / "colors.txt"))):
        output = tmp_path / name
        options = ["training.steps=1", "evaluation.pictures=3", f"evaluation.colors={given}"]
        assert Run(train, configure(root, output, *options)).outcomes() == [output / "final"]
        (picture,) = (output / "pictures").glob("step-*.png")
        colors = {color for _, color in Image.open(picture).convert("RGB").getcolors(1 << 24)}
        assert {(1, 2, 3), (4, 5, 6)} <= colors, name
    wrong = (("{sky: blu}", "'blu' as the colour of 'sky'"), ("nowhere.txt", "nowhere.txt' can't be read"))
    for given, message in wrong:
        with pytest.raises(ConfigError, match=f"evaluation.colors can't be used: .*{message}"):
            train(configure(root, tmp_path / "wrong", f"evaluation.colors={given}"))
        assert not (tmp_path / "wrong").exists()
