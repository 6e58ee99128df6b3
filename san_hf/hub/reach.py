"""Which model a name stands for where it isn't known, and whether the Hub can be reached at all."""

import difflib
import os
import re
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

from san_hf.messages import join_some


PATIENCE = 1.5  # seconds to wait for a connection before it is left to huggingface_hub, which waits longer


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'picture-book'?" for a name like one that is known or like a folder there; "" if none is."""
    parent = Path(name).parent
    try:
        folders = [str(parent / entry.name) for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        folders = []
    candidates = {candidate.lower(): candidate for candidate in (*folders, *known)}
    written = str(Path(name)).lower()
    near = difflib.get_close_matches(written, candidates, n=3, cutoff=0.75)
    near = near or difflib.get_close_matches(written.rsplit("/", 1)[-1], candidates, n=3, cutoff=0.85)
    return f" Did you mean {join_some(repr(candidates[match]) for match in near)}?" if near else ""


def is_repository(name: str) -> bool:
    """Whether a name has the form of the Hub's: owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None and not Path(name).exists()


def is_unreachable() -> bool:
    """Whether there is no way to the Hub: known at once without a network, rather than after several attempts."""
    if constants.HF_HUB_OFFLINE:
        return True
    url = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or (443 if url.scheme == "https" else 80)
    failures: list[OSError] = []

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=PATIENCE).close()
        except TimeoutError:
            pass  # slow, perhaps
        except OSError as error:
            failures.append(error)

    # Looking up a name can't be given a time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(failures)
