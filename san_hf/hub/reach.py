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

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from san_hf.messages import join_some, one_line, without_passwords


ADVICE = {
    401: "No access: log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "This account, or this token, may not write there: check the owner's name and the token's permissions.",
    404: "There is no such owner, repository or branch, or the token doesn't show it: check the name.",
    409: "Something else was pushed at the same time: run the same again.",
    413: "It is too large for this account.",
    429: "Too many requests: wait a while, then run the same again.",
}
PATIENCE = 1.5  # seconds to wait for a connection before it is left to huggingface_hub, which waits longer


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'picture-book'?" for a name like one that is known or like a folder there; "" if none is,
    or if it is one of the known, which is spelt right and fails for another reason."""
    known = list(known)
    if name in known:
        return ""
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


def describe_failure(error: Exception, token: str | bool | None = None) -> tuple[str, int | None]:
    """
    What went wrong with the Hub or the network, in one line without tokens and full stop; and the status of the answer,
    if there was one, for [`ADVICE`].
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    root = next((each for each in chain if isinstance(each, HfHubHTTPError)), chain[-1])
    status = root.response.status_code if isinstance(root, HfHubHTTPError) and root.response is not None else None
    reason = without_passwords(one_line(root))
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            reason = reason.replace(secret, "***")
    return re.sub(r"\s*\(Request ID: [^)]*\)", "", reason), status
