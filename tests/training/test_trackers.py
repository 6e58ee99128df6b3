"""What trackers have of a run that was killed and resumed: everything, once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from san_hf.training import run
from san_hf.training.config import TrainingConfig
from san_hf.training.loop import train
from tests.forks import Run
from tests.training.training_runs import configure, read_log, write_root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_root(tmp_path_factory.mktemp("trackers"), training=6, validation=2)


def tracked(config: TrainingConfig, dies_noting: int | None = None, resume: bool = False) -> Path | None:
    """Trains; the process kills itself once the evaluation of that step is written, and before that is noted."""
    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    note = run.note_evaluation

    def die_noting(checkpoint: Path, progress: dict) -> None:
        if progress["step"] == dies_noting:
            os.kill(os.getpid(), signal.SIGKILL)
        note(checkpoint, progress)

    run.note_evaluation = die_noting
    return train(config, resume)


def wandb_rows(file: Path) -> Iterator[dict[str, str]]:
    """
    What W&B has written of each of a run's steps. Its file is 7 bytes and then records of LevelDB's log format
    (github.com/google/leveldb, doc/log_format.md): pieces with a header of checksum (4 bytes), length (2) and kind (1;
    1 is a whole record, 4 the last piece of one), none over the border of a block of 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, pieces = file.read_bytes(), 7, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        pieces.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(b"".join(pieces))
            pieces = []
            if record.WhichOneof("record_type") == "history":
                yield {item.key or item.nested_key[0]: item.value_json for item in record.history.item}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between evaluations", "in an evaluation", "in the second process's step"])
def test_killed_run_is_tracked_once_and_whole(root, tmp_path, moment):
    """
    W&B's file that a kill leaves without what was not yet written; the steps after the checkpoint, and an evaluation
    that nobody has noted, tracked twice; trackers that exist in the main process only.
    """
    pytest.importorskip("wandb", reason="needs wandb")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    output, processes = tmp_path / "run", 2 if "second process" in moment else 1
    config = configure(
        root,
        output,
        "training.batch_size=2",
        "evaluation.every=2",
        "evaluation.pictures=1",
        "logging.trackers=[wandb, tensorboard]",
    )
    killed = Run(tracked, config, 4 if moment == "in an evaluation" else None, processes=processes)
    if moment == "in an evaluation":
        assert killed.outcomes() == [None]
    else:
        killed.wait_for_step(output, 7)  # lines: steps 1 to 5, evaluations of 2 and 4
        killed.kill()
    assert read_log(output)[-1]["step"] < 8
    outcomes = Run(tracked, config, None, True, processes=processes).outcomes()
    assert outcomes == [output / "final"] * processes, outcomes

    log = read_log(output)
    losses = {record["step"]: record["loss"] for record in log if "loss" in record}
    evaluations = {record["step"]: record["validation"]["mIoU"] for record in log if "validation" in record}
    assert list(losses) == list(range(1, 9)) and list(evaluations) == [2, 4, 6, 8]
    accumulated = events.EventAccumulator(str(output / "san-hf")).Reload()
    for name, expected in {"train/loss": losses, "validation/mIoU": evaluations}.items():
        found = [(event.step, event.value) for event in accumulated.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected.items()], name
    assert [image.step for image in accumulated.Images("validation")] == [2, 4, 6, 8]

    (file,) = (output / "wandb").glob("offline-run-*/run-*.wandb")
    rows = list(wandb_rows(file))
    assert [(int(row["_step"]), float(row["train/loss"])) for row in rows] == list(losses.items())
    found = [(int(row["validation/step"]), float(row["validation/mIoU"])) for row in rows if "validation/step" in row]
    assert found == list(evaluations.items())
    assert [int(row["_step"]) for row in rows if "validation" in row] == [2, 4, 6, 8]
