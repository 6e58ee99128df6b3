"""The command line: `san-hf COMMAND`, also `python -m san_hf COMMAND`.

Neither this nor the commands' files import torch, Transformers or `datasets`: what a command needs it imports when it
runs, so that help comes at once.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from san_hf.cli.adapters import adapters
from san_hf.cli.app_command import run_app
from san_hf.cli.console import expected_errors, replace_unprintable, show, show_stack_traces
from san_hf.cli.convert import convert
from san_hf.cli.evaluate import evaluate
from san_hf.cli.export import export
from san_hf.cli.help import Command, Group
from san_hf.cli.prepare import prepare
from san_hf.cli.push import push
from san_hf.cli.results import results
from san_hf.cli.segment import segment
from san_hf.cli.train import train
from san_hf.cli.video import video
from san_hf.version import __version__


COMMANDS: dict[str, Callable[..., None]] = {
    "segment": segment,
    "video": video,
    "app": run_app,
    "train": train,
    "evaluate": evaluate,
    "results": results,
    "push": push,
    "adapters": adapters,
    "export": export,
    "prepare": prepare,
    "convert": convert,
}

app = typer.Typer(
    name="san-hf",
    cls=Group,
    help="Open-vocabulary semantic segmentation with SAN: name what to look for, in plain words, and get a label for "
    "every pixel.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        show(f"san-hf {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the stack trace of an error, rather than one line.")
    ] = False,
) -> None:
    replace_unprintable()
    show_stack_traces(debug)


for name, command in COMMANDS.items():
    # The app alone has something to do without being told more.
    app.command(name, cls=Command, no_args_is_help=command is not run_app)(expected_errors(command))
