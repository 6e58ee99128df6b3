"""Console output of the commands, and their errors."""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.text import Text

from san_hf.messages import Notice, one_line
from san_hf.paths import expand_path
from san_hf.progress import PlainConsole


OUT_OF_MEMORY_ADVICE = "out of memory: scale the image down, or try --dtype bfloat16 or another --device"
_debug = False


def show(text: str | Text = "", *, error: bool = False) -> None:
    """One line on standard output or standard error, as it is: no markup, no wrapping."""
    PlainConsole(stderr=error, soft_wrap=True).print(text, markup=False, emoji=False, highlight=False)


def table_console() -> PlainConsole:
    """A console for tables: where the output goes to a file there is no width to keep."""
    return PlainConsole() if PlainConsole().is_terminal else PlainConsole(width=200)


def fail(message: object) -> NoReturn:
    """Ends the command with a message and the status for "nothing was done"."""
    show(f"Error: {message}", error=True)
    raise typer.Exit(2)


def quiet_libraries() -> None:
    """No progress bars and warnings of Transformers and `datasets`: the command itself says what goes wrong."""
    import huggingface_hub.utils.logging
    from transformers.utils import logging

    # Its warnings name addresses, with whatever password they hold.
    huggingface_hub.utils.logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Not imported for it: most commands need no `datasets`, which takes a second and 50 MB. It reads this when it is.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    show_notices()


def show_notices() -> None:
    """The package's warnings are lines on standard error, each once, and of several processes those of the first."""
    show_others, shown = warnings.showwarning, set()

    def show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if not issubclass(category, Notice):
            show_others(message, category, *args, **kwargs)
        elif str(message) not in shown and os.environ.get("RANK", "0") == "0":
            shown.add(str(message))
            show(Text(f"Warning: {message}", style="yellow"), error=True)

    warnings.simplefilter("always", Notice)
    warnings.showwarning = show_warning


def explain(error: BaseException) -> str:
    """The message of an expected error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY_ADVICE
    # Errors of torch have a stack trace of C++ in their message.
    return one_line(error) if type(error) is RuntimeError else str(error) or type(error).__name__


def show_stack_traces(wanted: bool) -> None:
    """Whether errors show their stack trace: `san-hf --debug COMMAND`."""
    global _debug
    _debug = wanted


def show_error(error: BaseException, message: str) -> None:
    """An error on standard error: one line, or its stack trace if that is wanted."""
    if _debug:
        show("".join(traceback.format_exception(error)).rstrip("\n"), error=True)
    else:
        show(f"Error: {message}", error=True)


def expected_errors(command: Callable[..., None]) -> Callable[..., None]:
    """
    The command, with `~` and environment variables in its paths replaced, whose expected errors (files, values, memory,
    and what torch and others raise at run time) end it with one line and status 2 rather than a stack trace.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **{name: _expand_paths(value) for name, value in kwargs.items()})
        except (typer.Exit, typer.Abort):
            raise
        except (OSError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            show_error(error, explain(error))
            raise typer.Exit(2) from error

    return run


def _expand_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_paths(item) for item in value]
    return Path(expand_path(value)) if isinstance(value, Path) else value


def replace_unprintable() -> None:
    """Names of classes and files may have letters that a terminal hasn't."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # both are text streams here
