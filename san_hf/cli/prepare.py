"""`san-hf prepare`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from san_hf.cli.console import fail, show
from san_hf.data.benchmarks import BENCHMARKS
from san_hf.messages import one_line
from san_hf.progress import progress_bar


BenchmarkName = Enum("BenchmarkName", {name: name for name in BENCHMARKS}, type=str)  # type: ignore[misc]  # dynamic


class Split(str, Enum):
    """Splits of the benchmarks."""

    train = "train"
    validation = "validation"


def prepare(
    name: Annotated[
        BenchmarkName, typer.Argument(metavar="SET", show_default=False, help=f"One of {', '.join(BENCHMARKS)}.")
    ],
    source: Annotated[
        Path, typer.Option("--source", "-s", metavar="DIR", help="The folder with the files as their owner ships them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write: a new or an empty one.")
    ],
    splits: Annotated[
        list[Split] | None, typer.Option("--split", help="Only this split; may be repeated.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes to work with; by default as many as there are processors."),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option("--push", metavar="REPO", help="Upload the set, too, to a repository on the Hub, private if new."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public: mind the terms of the images.")
    ] = False,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Take what is there, however many images: for trying.")
    ] = False,
) -> None:
    """
    Bring a benchmark's files into the form that training and evaluation take.

    For example: `san-hf prepare voc --source VOCdevkit/VOC2012 --output data/voc`

    A run that was interrupted is taken up by the same command; a finished set is left as it is.
    """
    from san_hf.data import prepare_benchmark, push_dataset

    with progress_bar() as bar:
        task = bar.add_task(f"Preparing {name.value}", total=None, speed="")
        metadata = prepare_benchmark(
            name.value,
            source,
            output,
            splits=[split.value for split in splits or []],
            workers=workers,
            allow_incomplete=allow_incomplete,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        total = sum(metadata["splits"].values())
        bar.update(task, completed=total, total=total)
    counts = ", ".join(f"{count:,} {split}" for split, count in metadata["splits"].items())
    show(f"{output}: {metadata['title']}, {len(metadata['class_names'])} classes, {counts}")
    if repository is not None:
        try:
            show(f"Uploaded: {push_dataset(output, repository, private=not public)}")
        except Exception as error:  # networks fail in many ways, and not all of their errors are OSErrors
            fail(f"'{output}' is complete, but could not be uploaded to '{repository}': {one_line(error)}")
