"""Files of JSON, and of text that may be JSON, read within bounds and with one kind of error."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


# Bytes of a file that people write, or that we do. The largest list of class names in use has 17 kB.
LARGEST_JSON = 10_000_000
# Of a list of images: a million of them, with their folders.
LARGEST_LIST = 100_000_000


class JSONError(ValueError):
    """What isn't JSON, or too much of it; the message says where and what to do."""


def read_json(path: str | os.PathLike, limit: int = LARGEST_JSON, hook: Callable[[list], Any] | None = None) -> Any:
    """
    What a file of JSON in UTF-8 holds.

    Args:
        path: the file.
        limit: more bytes are refused before anything is read. Python's objects take up to about 30 times as many.
        hook: makes of an object's pairs what stands for it, in place of a dictionary.

    Raises:
        JSONError: it is too large, no JSON, no UTF-8, nested too deeply, or has numbers of thousands of digits.
        OSError: it can't be read.
    """
    return parse_json(_read_bytes(Path(path), limit), f"'{path}'", hook)


def read_text(path: str | os.PathLike, limit: int = LARGEST_JSON) -> str:
    """
    A small file of text in UTF-8, such as one that may be JSON.

    Raises:
        JSONError: it is too large, or isn't UTF-8.
        OSError: it can't be read.
    """
    return _decode(_read_bytes(Path(path), limit), f"'{path}'")


def parse_json(content: str | bytes, where: str, hook: Callable[[list], Any] | None = None) -> Any:
    """
    [`read_json`] of what was read already; `where` says from where.

    Raises:
        JSONError: as `read_json`.
    """
    try:
        return json.loads(_decode(content, where), object_pairs_hook=hook)
    except JSONError:
        raise
    except RecursionError as error:
        raise JSONError(f"{where} is no JSON of ours: it is nested too deeply. Get or write it again.") from error
    except json.JSONDecodeError as error:
        raise JSONError(
            f"{where} is no JSON, perhaps cut short: {error.msg} in line {error.lineno:,}, column {error.colno:,}. "
            "Get or write it again."
        ) from error
    except ValueError as error:
        if hook is not None and "digits" not in str(error):  # the hook's own
            raise
        raise JSONError(f"{where} is no JSON of ours: it has a number of thousands of digits.") from error


def _read_bytes(path: Path, limit: int) -> bytes:
    if path.exists() and not path.is_file():
        raise JSONError(f"'{path}' is no regular file, expected one of text.")
    if (size := path.stat().st_size) > limit:
        raise JSONError(f"'{path}' has {size:,} bytes, expected at most {limit:,}: is it another file?")
    return path.read_bytes()


def _decode(content: str | bytes, where: str) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JSONError(
            f"{where} isn't text in UTF-8 (byte {error.start:,}). Save it as UTF-8, or get it again."
        ) from error
