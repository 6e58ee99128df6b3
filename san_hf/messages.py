"""Texts of messages: an error in one line, long lists cut short, names that a terminal can show; and warnings."""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterable


# Joiners of letters and of emoji: what they do stays within a word.
_JOINERS = "\u200c\u200d"
_PASSWORD = re.compile(r"(?<=://)[^\s/?#'\"]*@")


class Notice(UserWarning):
    """What a user should know and that is no error. The commands show it in one line."""


def notify(text: str) -> None:
    """Warns by a [`Notice`]."""
    warnings.warn(text, Notice, stacklevel=3)


def one_line(error: BaseException) -> str:
    """
    An error's message in one line without a full stop: the first line, and the following ones as long as a colon
    announces them; of an `OSError` the reason alone, without number and file; of an error without a message its type.
    """
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    announced = next((number for number, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return without_passwords(" ".join(lines[: announced + 1])).rstrip(".") or type(error).__name__


def join_some(items: Iterable[object], limit: int = 8) -> str:
    """The first items of a list, separated by commas, and how many more there are."""
    items = list(items)
    listed = ", ".join(map(str, items[:limit]))
    return listed + (f" and {len(items) - limit} more" if len(items) > limit else "")


def printable(text: str | os.PathLike) -> str:
    """
    A path or text for people: line breaks, control characters, marks that turn the direction of writing, and bytes that
    are no text are replaced.
    """
    return "".join(letter if _is_visible(letter) else "\N{REPLACEMENT CHARACTER}" for letter in os.fspath(text))


def escape_markdown(text: str) -> str:
    """A text in one line that Markdown shows as it is: no HTML, emphasis, code, link or cell of a table."""
    text = re.sub(r"([\\`*\[\]<>|~&$])", r"\\\1", " ".join(printable(" ".join(text.split())).split()))
    # Within a word, underscores are no emphasis.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def for_terminal(text: str) -> str:
    """A text of one or several lines: each [`printable`], and no passwords in addresses."""
    return "\n".join(map(printable, without_passwords(text).split("\n")))


def without_passwords(text: str) -> str:
    """A text whose addresses have lost user and password: "https://me:secret@host/" becomes "https://***@host/"."""
    return _PASSWORD.sub("***@", text)


def _is_visible(letter: str) -> bool:
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"
