"""The progress bar of everything that takes long."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from san_hf.messages import for_terminal


class PlainConsole(Console):
    """A console that prints no control sequences of texts that come from files, and no passwords."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)


def progress_bar(hidden: bool = False) -> Progress:
    """
    A progress bar on standard error, for `with`. Its tasks may have a field `speed`, a text.

    Args:
        hidden: show nothing.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=PlainConsole(stderr=True),
        disable=hidden,
    )
