"""Locks: what one process may do at a time. A lock vanishes with its process, however that ends."""

import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from san_hf.messages import printable


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # for mypy the name is the module's alone

# Locks of this process: the file, and the thread and the descriptor that hold it.
_held: dict[str, tuple[int, int]] = {}


class InUseError(OSError):
    """What is to be written is being written by another process; the message says by which."""


@contextmanager
def locked(file: str | os.PathLike, task: str, *, wait: bool = False) -> Iterator[None]:
    """
    Holds a lock while the block runs. The thread that holds it already may take it again.

    The file says who holds it, and is removed afterwards; one that a killed process has left is taken over. Where there
    are no locks (Windows, some network file systems), a warning says so, and the block runs without.

    Args:
        file: the lock's, in a folder that exists.
        task: what is done under it, for the message of others, such as "A training in 'runs/mine'".
        wait: wait for the holder, rather than refuse.

    Raises:
        InUseError: another process, or another thread, holds it.
        OSError: the file can't be written.
    """
    path = os.path.join(os.path.realpath(Path(file).parent), Path(file).name)
    thread = threading.get_ident()
    if path in _held and _held[path][0] == thread:
        yield
        return
    descriptor = _take(path, task, wait)
    _held[path] = thread, descriptor
    try:
        yield
    finally:
        if _held.get(path) == (thread, descriptor):  # not in a process that was forked meanwhile
            del _held[path]
            # Before others can have it: what they make under this name is theirs.
            Path(path).unlink(missing_ok=True)
            os.close(descriptor)


def try_lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Whether the lock on an open file or folder is ours now; None where there are none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # not on every file system
        return None
    return True


def _take(path: str, task: str, wait: bool) -> int:
    """The lock file's descriptor, once it is ours."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            ours = try_lock(descriptor, wait=wait)
            if ours is False:
                holder = printable(os.read(descriptor, 300).decode(errors="replace")) or "another process"
                raise InUseError(
                    f"{task} is under way already, by {holder}. Wait for it or end it, or choose another folder."
                )
            # Its last holder may have removed the file just before it became ours.
            if os.name != "nt" and not _is_open_file(path, descriptor):
                os.close(descriptor)
                continue
            if ours is None and not wait:
                warnings.warn(
                    f"'{os.path.dirname(path)}' has no file locks: see to it that no other process writes to it.",
                    stacklevel=4,
                )
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            with suppress(OSError):  # a full disk has room for a lock, but not for more
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _is_open_file(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget_locks() -> None:
    """A forked process inherits open files: a lock would outlive its holder."""
    for _, descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
