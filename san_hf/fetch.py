"""Files that are not on this machine: at addresses, by HTTP and HTTPS alone, or in a pipe; bounded in size and time."""

import math
import os
import time
from collections.abc import Callable
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from san_hf.messages import one_line
from san_hf.version import __version__


MOST_BYTES = 256 << 20
# Seconds: for all of a file, and without any answer.
MOST_SECONDS, PATIENCE = 120.0, 20.0
_AT_ONCE = 1 << 18


class FetchError(OSError):
    """A file that can't be fetched; the message says why."""


def is_address(source: object) -> bool:
    """Whether a source is an http:// or https:// address."""
    return isinstance(source, str | os.PathLike) and str(source).lower().startswith(("http://", "https://"))


def fetch(address: str) -> bytes:
    """
    The file at an address. Redirects are followed as long as they stay with HTTP and HTTPS; proxies are those of the
    environment. Any host will do, also one that only this machine can reach: who passes on addresses of others looks
    at them first.

    Args:
        address: http:// or https://, without a password.

    Raises:
        FetchError: there is none, or it is larger than `MOST_BYTES`, or takes longer than `MOST_SECONDS`.
    """
    parts = urlsplit(address)
    if not is_address(address) or not parts.hostname or "@" in parts.netloc:
        raise FetchError("expected an address of the form https://host/path, without a user's name")
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        UnknownHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPDefaultErrorHandler,
        HTTPRedirectHandler,
        HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    try:
        request = Request(address, headers={"User-Agent": f"san_hf/{__version__}"})
        with opener.open(request, timeout=PATIENCE) as answer:
            return read_bounded(answer.read1, MOST_SECONDS)
    except FetchError:
        raise
    except HTTPError as error:
        raise FetchError(f"it can't be fetched: the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = one_line(reason) if isinstance(reason, BaseException) else str(reason)
        raise FetchError(f"it can't be fetched: {text}") from error


def read_bounded(read: Callable[[int], bytes], seconds: float = math.inf) -> bytes:
    """
    All that a stream has.

    Args:
        read: gives the next bytes, at most so many; none at the end.
        seconds: to read for; any time by default.

    Raises:
        FetchError: more than `MOST_BYTES`, or not within the time.
    """
    content, end = bytearray(), time.monotonic() + seconds
    while block := read(_AT_ONCE):
        content += block
        if len(content) > MOST_BYTES:
            raise FetchError(f"it has more than {MOST_BYTES >> 20} MB")
        if time.monotonic() > end:
            raise FetchError(f"it takes more than {seconds:g} seconds")
    return bytes(content)
