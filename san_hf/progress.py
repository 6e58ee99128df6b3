"""The progress bar of everything that takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

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


@contextmanager
def row_progress(name: str, bar: Progress | None) -> Iterator[Callable[[int, int], None]]:
    """
    The rows of one large image, as long as the block lasts.

    Args:
        name: of the image.
        bar: of all images, to which a line is added; `None` for a bar of its own.

    Yields:
        To be called with the number of rows that are done, and that of all.
    """
    with progress_bar() if bar is None else nullcontext(bar) as shown:
        task = shown.add_task(name, total=None, speed="rows")
        try:
            yield lambda done, total: shown.update(task, completed=done, total=total)
        finally:
            shown.remove_task(task)
