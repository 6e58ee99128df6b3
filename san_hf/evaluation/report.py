"""Results as files and tables, and beside SAN's published figures: `san-hf results`."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from san_hf.evaluation.metrics import METRICS, Results
from san_hf.evaluation.published import PUBLISHED_MODELS, SOURCES, obstacles, published_figures
from san_hf.version import __version__


RESULTS_FILE, CLASSES_FILE, TABLE_FILE = "results.json", "per_class.csv", "results.md"
# What the average of each metric is over, where there is more than one custom.
DEFINITIONS = {
    "mIoU": "over classes in the ground truth",
    "mIoU_over_present_or_predicted": "over classes in the ground truth or the predictions",
}


class Report(BaseModel):
    """
    What `results.json` holds: figures, in percent, and what they are of.

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
        results: the figures.
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
    _write(folder / CLASSES_FILE, to_csv(report.per_class))
    _write(folder / TABLE_FILE, to_markdown(report))
    _write(folder / RESULTS_FILE, json.dumps(report.model_dump(), indent=2, ensure_ascii=False) + "\n")
    return report


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def class_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of classes, as text."""
    header = list(report.per_class[0]) if report.per_class else []
    cell = {"index": str, "name": str, "ground_truth": "{:,}".format, "predicted": "{:,}".format}
    return header, [[cell.get(name, percent)(row.get(name)) for name in header] for row in report.per_class]


COMPARISON_HEADER = ("dataset", "metric", "result", "published for", "from", "published", "difference")


def compare(report: Report, published: Sequence[str] = PUBLISHED_MODELS) -> list[dict[str, Any]]:
    """
    Each figure beside the published one of the same definition.

    Args:
        report: a model's figures.
        published: names of `PUBLISHED_MODELS`.

    Returns:
        Rows by `COMPARISON_HEADER`: figures in percent, the difference (ours minus published) in points; `None` where
        nothing was published. A metric for which there is nothing at all has one row.

    Raises:
        ValueError: no such model.
    """
    figures = {name: published_figures(name, report.dataset) for name in published}
    rows = []
    for metric in METRICS:
        ours = report.metrics.get(metric)
        known = [(name, found[metric]) for name, found in figures.items() if metric in found]
        for name, theirs in known or [(None, None)]:
            difference = None if ours is None or theirs is None else ours - theirs
            source = SOURCES[metric][1] if name else None
            rows.append(dict(zip(COMPARISON_HEADER, (report.dataset, metric, ours, name, source, theirs, difference))))
    return rows


def comparison_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The same as text."""
    cell = {
        "result": percent,
        "published": percent,
        "difference": lambda value: "-" if value is None else f"{value:+.2f}",
    }
    return [[cell.get(name, lambda text: text or "-")(row[name]) for name in COMPARISON_HEADER] for row in rows]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Full precision; an empty cell where there is no figure."""
    text = io.StringIO()
    # Boundaries aren't in all results.
    header = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(report: Report) -> str:
    """The averages, with what they mean, and a table of the classes."""
    metrics = [
        [f"{name} ({DEFINITIONS[name]})" if name in DEFINITIONS else name, percent(value)]
        for name, value in report.metrics.items()
    ]
    settings = ", ".join(
        f"{name}: {value}" for name, value in report.settings.items() if value is not None and value is not False
    )
    return (
        "\n\n".join(
            [
                f"# {_escape(report.model)} on {_escape(report.dataset)}",
                f"{report.images:,} images of the split {_escape(report.split)}. Figures are in percent; classes that "
                'aren\'t in the ground truth have "-".' + (f" Settings: {_escape(settings)}." if settings else ""),
                _markdown_table(("metric", "percent"), metrics),
                _markdown_table(*class_rows(report)),
            ]
        )
        + "\n"
    )


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--" if name in LEFT else "--:" for name in header], *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


# Columns of words; numbers stand to the right.
LEFT = {"name", "metric", "dataset", "published for", "from"}


def console_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in header:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


Format = Enum("Format", {name: name for name in ("table", "markdown", "csv", "json")}, type=str)
Published = Enum("Published", {name: name for name in PUBLISHED_MODELS}, type=str)


def results(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", show_default=False, help="results.json files, or folders with some below them."),
    ],
    published: Annotated[
        list[Published] | None,
        typer.Option(metavar="MODEL", help=f"Compare with this model: {' or '.join(PUBLISHED_MODELS)}. Default: both."),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Tables of the classes, too.")] = False,
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.table,
) -> None:
    """
    Show what `san-hf evaluate` measured beside the published figures of SAN.

    For example: `san-hf results outputs/evaluation`

    There are two customs for mIoU, and each figure stands beside the published one of its own: the log of the released
    model averages over the classes that occur in the ground truth, the paper's table over those that occur there or in
    the predictions.
    """
    names = [model.value for model in published] if published else list(PUBLISHED_MODELS)
    entries = [
        {
            "report": report,
            "comparison": compare(report, names),
            "not comparable": obstacles(
                report.dataset,
                report.split,
                report.images,
                [row["name"] for row in report.per_class],
                report.settings,
            ),
        }
        for path in paths
        for report in read_results(path)
    ]
    PRINTERS[format.value](entries, per_class)


def _heading(report: Report) -> str:
    return f"{report.model} on {report.dataset}, {report.split}: {report.images:,} images"


def _caution(reasons: Sequence[str]) -> str:
    return f"Not comparable with published figures: {'; '.join(reasons)}."


def _print_table(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    console = Console(soft_wrap=False)
    # Where the output goes to a file there is no width to keep.
    if not console.is_terminal:
        console = Console(width=200)
    for entry in entries:
        console.print(Text(_heading(entry["report"]), style="bold"))
        console.print(console_table(COMPARISON_HEADER[1:], [row[1:] for row in comparison_rows(entry["comparison"])]))
        if entry["not comparable"]:
            console.print(Text(_caution(entry["not comparable"])))
        if per_class:
            console.print(console_table(*class_rows(entry["report"])))
        console.print()


def _print_markdown(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    for entry in entries:
        parts = [
            f"## {_escape(_heading(entry['report']))}",
            _markdown_table(COMPARISON_HEADER[1:], [row[1:] for row in comparison_rows(entry["comparison"])]),
        ]
        parts += [_escape(_caution(entry["not comparable"]))] if entry["not comparable"] else []
        parts += [_markdown_table(*class_rows(entry["report"]))] if per_class else []
        typer.echo("\n\n".join(parts) + "\n")


def _print_csv(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    rows = []
    for entry in entries:
        facts = {"model": entry["report"].model, "dataset": entry["report"].dataset}
        if per_class:
            rows += [facts | row for row in entry["report"].per_class]
        else:
            rows += [
                facts | row | {"not comparable": "; ".join(entry["not comparable"])} for row in entry["comparison"]
            ]
    typer.echo(to_csv(rows), nl=False)


def _print_json(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    dropped = set() if per_class else {"per_class"}
    entries = [entry | {"report": entry["report"].model_dump(exclude=dropped)} for entry in entries]
    typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))


PRINTERS = {"table": _print_table, "markdown": _print_markdown, "csv": _print_csv, "json": _print_json}
