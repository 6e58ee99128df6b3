"""Files of JSON and other small texts that hold something else, or far too much."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from san_hf.cli.segment_journal import Journal, JournalError
from san_hf.colors import read_colors
from san_hf.conversion import ConversionError
from san_hf.conversion.convert import read_config
from san_hf.data import DataError, load_segmentation_dataset
from san_hf.data.benchmarks.pascal_context_59 import read_detail
from san_hf.data.class_names import read_class_names
from san_hf.data.palettes import load_palette
from san_hf.data.prepare import prepare_benchmark
from san_hf.loading import foreign_content
from san_hf.training.checkpoint import read_checkpoint
from san_hf.training.config import LoggingSection
from san_hf.training.errors import CheckpointError, TrainingError
from san_hf.training.run_log import RunLog, read_log


def foreign(file: Path) -> None:
    if problem := foreign_content(file):
        raise ValueError(f"'{file}' {problem}")


def checkpoint(file: Path) -> None:
    read_checkpoint(file.parent)


def journal(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")
    Journal(file.parent, (1, 1), {}).resume()


def log(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")
    read_log(file.parent)


# The file's name, what reads it, its kind of error.
READERS = {
    "configuration": ("config.json", read_config, ConversionError),
    "class list": ("list.json", read_class_names, DataError),
    "class list of text": ("list.txt", read_class_names, DataError),
    "palette": ("palette.json", lambda file: load_palette(file, ["sky"], 255), DataError),
    "colours": ("colors.json", read_colors, ValueError),
    "prepared set": ("segmentation.json", lambda file: load_segmentation_dataset(file.parent, "train"), DataError),
    "prepared before": (
        "segmentation.json",
        lambda file: prepare_benchmark("ade20k-150", file.parent, file.parent),
        DataError,
    ),
    "annotations": ("detail.json", read_detail, DataError),
    "file of a model": ("tokenizer.json", foreign, ValueError),
    "checkpoint": ("progress.json", checkpoint, CheckpointError),
    "journal": (".segment.jsonl", journal, JournalError),
    "log": ("log.jsonl", log, TrainingError),
}
CONTENTS = {
    "nested deeply": b"[" * 100_000,
    "nested and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge number": b'{"splits": ' + b"7" * 100_000 + b"}",
    "not UTF-8": b'{"name": "caf\xe9"}',
    "cut short": b'{"name": "sky',
    "another kind": b'"sky"',
    "a list": b"[[1, 2, 3]]",
    "null": b"null",
    "too large": None,
}


# We write the lines of two ourselves, so that their size has no limit, and a list of text takes most texts.
PAIRS = [
    (reader, content)
    for reader in READERS
    for content in CONTENTS
    if not (reader in ("journal", "log") and content == "too large")
    and not (reader == "class list of text" and content not in ("not UTF-8", "too large"))
]


@pytest.mark.parametrize(("reader", "content"), PAIRS)
def test_one_line_whatever_a_file_holds(tmp_path, reader, content):
    """Catches stack traces (RecursionError, UnicodeDecodeError, numbers of 100,000 digits), and reading without end."""
    name, read, kind = READERS[reader]
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    file = folder / name
    if CONTENTS[content] is not None:
        file.write_bytes(CONTENTS[content])
    else:
        file.touch()
        os.truncate(file, 3_000_000_000)  # takes no room, and can't be read in a second
    with pytest.raises(kind) as error:
        read(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    if content == "too large":
        assert f"{file}' has 3,000,000,000 bytes, expected at most" in str(error.value)


def test_a_log_of_json_alone(tmp_path):
    """Catches NaN and Infinity, which no other reader takes, in the log of a run whose loss is gone."""
    accelerator = SimpleNamespace(is_main_process=True, trackers=[])
    section = LoggingSection(trackers=[], every=1000)
    losses = {"loss": float("nan"), "loss_mask": float("inf"), "learning_rate": -float("inf")}
    with RunLog(accelerator, tmp_path, section, {}, "run", 0, 10_000) as log:
        log.step({"step": 7, **losses})
        log.evaluation(7, {"mIoU": float("nan"), "loss": float("inf"), "fwIoU": 1.5}, 1.0, False)

    def refuse(constant: str):
        pytest.fail(f"log.jsonl has {constant}, which is no JSON")

    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step, evaluation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert step == {"step": 7, "loss": None, "loss_mask": None, "learning_rate": None}
    assert evaluation["validation"] == {"mIoU": None, "loss": None, "fwIoU": 1.5}
