"""`san-hf results`."""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from san_hf.cli.console import table_console
from san_hf.evaluation.published import PUBLISHED_MODELS, published_images, reasons_not_comparable
from san_hf.files import json_text
from san_hf.messages import escape_markdown, for_terminal


if TYPE_CHECKING:
    from san_hf.evaluation.report import Report


class Format(str, Enum):
    """Ways to print results."""

    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


Published = Enum("Published", {name: name for name in PUBLISHED_MODELS}, type=str)  # type: ignore[misc]  # dynamic


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
    Show what `san-hf evaluate` measured beside the published results of SAN.

    For example: `san-hf results outputs/evaluation`

    mIoU has two definitions, and each result stands beside the published one of its own: the log of the released
    model averages over the classes that occur in the ground truth, the paper's table over those that occur there or in
    the predictions.
    """
    from san_hf.evaluation.report import read_results
    from san_hf.evaluation.tables import compare

    names = [model.value for model in published] if published else list(PUBLISHED_MODELS)
    entries = [
        {
            "report": report,
            "comparison": compare(report, names),
            "images": published_images(report.dataset, report.images),
            "not comparable": reasons_not_comparable(
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


def _heading(report: "Report") -> str:
    return f"{report.model} on {report.dataset}, {report.split}: {report.images:,} images"


def _caution(reasons: Sequence[str]) -> str:
    return f"Not comparable with published results: {'; '.join(reasons)}."


def _print_table(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    from san_hf.evaluation.tables import COMPARISON_HEADER, class_rows, comparison_rows, console_table

    console = table_console()
    for entry in entries:
        console.print(Text(_heading(entry["report"]), style="bold"))
        table = console_table(COMPARISON_HEADER[1:], [row[1:] for row in comparison_rows(entry["comparison"])])
        console.print(table, crop=False)
        if entry["not comparable"]:
            console.print(Text(_caution(entry["not comparable"])))
        elif entry["images"]:
            console.print(Text(entry["images"]))
        if per_class:
            console.print(console_table(*class_rows(entry["report"])), crop=False)
        console.print()


def _print_markdown(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    from san_hf.evaluation.tables import COMPARISON_HEADER, class_rows, comparison_rows, markdown_table

    for entry in entries:
        parts = [
            f"## {escape_markdown(_heading(entry['report']))}",
            markdown_table(COMPARISON_HEADER[1:], [row[1:] for row in comparison_rows(entry["comparison"])]),
        ]
        note = _caution(entry["not comparable"]) if entry["not comparable"] else entry["images"]
        parts += [escape_markdown(note)] if note else []
        parts += [markdown_table(*class_rows(entry["report"]))] if per_class else []
        typer.echo(for_terminal("\n\n".join(parts)) + "\n")


def _print_csv(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    from san_hf.evaluation.tables import to_csv

    rows: list[dict[str, Any]] = []
    for entry in entries:
        facts = {"model": entry["report"].model, "dataset": entry["report"].dataset}
        if per_class:
            rows += [facts | row for row in entry["report"].per_class]
        else:
            rows += [
                facts | row | {"images": entry["images"] or "", "not comparable": "; ".join(entry["not comparable"])}
                for row in entry["comparison"]
            ]
    typer.echo(for_terminal(to_csv(rows)), nl=False)


def _print_json(entries: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    dropped: set[str] = set() if per_class else {"per_class"}
    entries = [{**entry, "report": entry["report"].model_dump(exclude=dropped)} for entry in entries]
    # As JSON escapes them, what a terminal would obey stays what it is.
    text = json_text(entries, indent=2)
    typer.echo("".join(letter if letter == "\n" or letter.isprintable() else escape_json(letter) for letter in text))


def escape_json(letter: str) -> str:
    return json.dumps(letter)[1:-1]


PRINTERS = {"table": _print_table, "markdown": _print_markdown, "csv": _print_csv, "json": _print_json}
