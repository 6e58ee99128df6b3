"""`san-hf adapters`."""

import dataclasses
from enum import Enum
from typing import Annotated

import typer

from san_hf.cli.console import quiet_libraries, show
from san_hf.files import json_text
from san_hf.messages import for_terminal, join_some, notify, printable


class Format(str, Enum):
    """Ways to print the list."""

    table = "table"
    json = "json"


def adapters(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER_OR_REPOSITORY",
            show_default=False,
            help="Folders, which are searched with all below them, or repositories on the Hub.",
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(show_default=False, help="Branch, tag or commit of the repositories.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print it; JSON has whole digests and all classes.")] = (
        Format.table
    ),
) -> None:
    """
    List side adapters: base, digest of the base, size, classes and results.

    For example: `san-hf adapters runs/`
    """
    from san_hf.hub.adapters import NoSideAdapter, list_side_adapters

    quiet_libraries()
    found, failures = [], []
    for name in names:
        try:
            found += list_side_adapters(name, revision=revision)
        except NoSideAdapter as error:  # a whole model among others: runs/*
            failures.append(error)
    if not found:
        raise failures[0]
    for failure in failures:
        notify(str(failure))
    if format is Format.json:
        typer.echo(for_terminal(json_text([dataclasses.asdict(info) for info in found], indent=2)))
        return
    for info in found:
        show(printable(info.name))
        for key, value in (
            ("base", f"{info.base or 'not named'}{f' at {info.revision}' if info.revision else ''}"),
            ("SHA-256", info.sha256 or "none"),
            ("size", f"{info.size / 1e6:.1f} MB{', with LoRA of CLIP' if info.lora else ''}"),
            (
                "classes",
                f"{len(info.classes)}: {join_some(info.classes, 8)}" if info.classes else "those it is asked for",
            ),
            ("results", "; ".join(info.results) or "none in its card"),
        ):
            show(f"  {key:8} {printable(value)}")
