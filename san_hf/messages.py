"""Texts of messages: an error in one line, long lists cut short, names that a terminal can show."""

import os
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """
    An error's message in one line without a full stop: of an `OSError` the reason alone, without number and file; of
    an error without a message its type.
    """
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__


def join_some(items: Iterable[object], limit: int = 8) -> str:
    """The first items of a list, separated by commas, and how many more there are."""
    items = list(items)
    listed = ", ".join(map(str, items[:limit]))
    return listed + (f" and {len(items) - limit} more" if len(items) > limit else "")


def printable(text: str | os.PathLike) -> str:
    """A path or text for people: line breaks, control characters and bytes that are no text are replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in os.fspath(text))
