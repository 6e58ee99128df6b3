"""Results of an evaluation as files: JSON, CSV and Markdown."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError

from san_hf.evaluation.metrics import Results
from san_hf.evaluation.tables import to_csv, to_markdown
from san_hf.files import json_text, write_file
from san_hf.version import __version__


RESULTS_FILE, CLASSES_FILE, TABLE_FILE = "results.json", "per_class.csv", "results.md"


class Report(BaseModel):
    """
    Contents of `results.json`: metrics, in percent, and what was evaluated.

    Attributes:
        model, dataset, split: names.
        images: how many were counted.
        settings: how it was evaluated.
        metrics, per_class: as in [`Results`], with `None` (null) instead of nan, which JSON hasn't.
        versions: of the packages that computed it.
    """

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())

    model: str
    dataset: str
    split: str
    images: int
    settings: dict[str, Any]
    metrics: dict[str, float | None]
    per_class: list[dict[str, Any]]
    versions: dict[str, str] = {}


def write_results(
    folder: str | os.PathLike,
    results: Results,
    *,
    model: str,
    dataset: str,
    split: str,
    settings: Mapping[str, Any],
) -> Report:
    """
    Writes results.json (see [`Report`]), per_class.csv and results.md. Each file is complete or absent, and
    results.json comes last.

    Args:
        folder: made if it isn't there; files of the same names are replaced.
        results: the metrics.
        model, dataset, split: what they are of.
        settings: how it was evaluated: what JSON can hold.

    Raises:
        OSError: the folder can't be written.
    """
    report = Report(
        model=model,
        dataset=dataset,
        split=split,
        images=results.num_images,
        settings=dict(settings),
        metrics={name: _plain(value) for name, value in results.metrics.items()},
        per_class=[{name: _plain(value) for name, value in row.items()} for row in results.per_class],
        versions={"san_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CLASSES_FILE, to_csv(report.per_class))
    write_file(folder / TABLE_FILE, to_markdown(report))
    write_file(folder / RESULTS_FILE, json_text(report.model_dump(), indent=2) + "\n")
    return report


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: str | os.PathLike) -> list[Report]:
    """
    The reports of a results.json, or of all that are in a folder and below it, in the order of their paths.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file that isn't one; the message names it and what is wrong.
    """
    path = Path(path)
    files = sorted(path.rglob(RESULTS_FILE)) if path.is_dir() else [path]
    if not files or not path.exists():
        raise FileNotFoundError(f"There is no {RESULTS_FILE} in '{path}'. `san-hf evaluate` writes it to its --output.")
    return [_read(file) for file in files]


def _read(file: Path) -> Report:
    try:
        return Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        where = f" at {key!r}" if key else ""
        raise ValueError(f"'{file}' is no {RESULTS_FILE} of `san-hf evaluate`{where}: {problem['msg']}.") from error
