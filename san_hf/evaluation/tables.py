"""Results of an evaluation as tables: Markdown, CSV and the console, also beside SAN's published results."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from san_hf.evaluation.metrics import METRICS
from san_hf.evaluation.published import PUBLISHED_MODELS, SOURCES, published_results
from san_hf.messages import escape_markdown, printable


if TYPE_CHECKING:
    from san_hf.evaluation.report import Report

# What the average of each metric is over, where there is more than one definition.
DEFINITIONS = {
    "mIoU": "over classes in the ground truth",
    "mIoU_over_present_or_predicted": "over classes in the ground truth or the predictions",
}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def class_rows(report: "Report") -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of classes, as text."""
    header = list(report.per_class[0]) if report.per_class else []
    cell: dict[str, Callable[[Any], str]] = {
        "index": str,
        "name": str,
        "ground_truth": "{:,}".format,
        "predicted": "{:,}".format,
    }
    return header, [[cell.get(name, percent)(row.get(name)) for name in header] for row in report.per_class]


COMPARISON_HEADER = ("dataset", "metric", "result", "published for", "from", "published", "difference")


def compare(report: "Report", published: Sequence[str] = PUBLISHED_MODELS) -> list[dict[str, Any]]:
    """
    Each metric beside the published result of the same definition.

    Args:
        report: metrics of a model.
        published: names of `PUBLISHED_MODELS`.

    Returns:
        Rows by `COMPARISON_HEADER`: values in percent, the difference (ours minus published) in points; `None` where
        nothing was published. A metric for which there is nothing at all has one row.

    Raises:
        ValueError: no such model.
    """
    known_results = {name: published_results(name, report.dataset) for name in published}
    rows = []
    for metric in METRICS:
        ours = report.metrics.get(metric)
        known: list[tuple[str | None, float | None]] = [
            (name, found[metric]) for name, found in known_results.items() if metric in found
        ]
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
    """Full precision; an empty cell where there is no value."""
    text = io.StringIO()
    # Boundaries aren't in all results.
    header = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(report: "Report") -> str:
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
                f"# {escape_markdown(report.model)} on {escape_markdown(report.dataset)}",
                f"{report.images:,} images of the split {escape_markdown(report.split)}. Results are in percent; "
                'classes that aren\'t in the ground truth have "-".'
                + (f" Settings: {escape_markdown(settings)}." if settings else ""),
                markdown_table(("metric", "percent"), metrics),
                markdown_table(*class_rows(report)),
            ]
        )
        + "\n"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--" if name in LEFT else "--:" for name in header], *rows]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines)


# Columns of words; numbers stand to the right.
LEFT = {"name", "metric", "dataset", "model", "published for", "from"}


def console_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    for index, name in enumerate(header):
        # In a narrow window words are folded, numbers never.
        width = None if name in LEFT else max((len(row[index]) for row in rows), default=0)
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
