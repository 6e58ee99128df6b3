"""Files and folders that appear whole or not at all.

Whatever is written gets a temporary, unpredictable name beside its target, is brought onto the disk, and takes the
target's name only then. A reader, or a run after a power cut, finds the old contents or the new ones, never a part.

A temporary file is locked while its process lives. What a killed process left behind is therefore told apart from what
another one is writing, and is removed by the next process that writes to the same folder.
"""

import ctypes
import errno
import fnmatch
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from san_hf.locks import try_lock


# ".model.safetensors.3f9a1c0b7d2e4a58.partial"; a folder that is being replaced ends in ".replaced".
_TEMPORARY_NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.(?P<kind>partial|replaced)", re.DOTALL)
# Where there are no locks, what is older than this was left behind.
_SECONDS_TO_WRITE = 24 * 3600
_SURROGATE = re.compile("[\ud800-\udfff]")
# What a disk that can't take more, or anything, says.
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
# Linux's renameat2 (2): both names exist at every moment.
RENAME_EXCHANGE = 2
renameat2: Any
try:
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
except (AttributeError, OSError, TypeError):  # other systems, and C libraries older than 2018
    renameat2 = None
# Folders that this process has cleared of leftovers already.
_cleared: set[tuple[int, str]] = set()


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """
    Writes a file at once: [`new_file`] for contents that are there already.

    Args:
        path: the file; one that exists is replaced.
        content: text is written as UTF-8, line ends as they are.

    Raises:
        OSError: it can't be written. What was there before is unchanged.
    """
    with new_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def json_text(value: Any, indent: int | None = None) -> str:
    """
    A value as JSON that any reader takes: JSON has no nan and no infinity, which become null, and no half of a
    surrogate pair (a byte of a file's name that is no text), which becomes U+FFFD.

    Args:
        value: of dictionaries, lists, texts, numbers, booleans and None.
        indent: spaces a level; everything is in one line by default.

    Raises:
        TypeError: it holds anything else.
    """
    text = json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """
    A file to write to that takes the place of `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the file; one that exists is replaced, a symbolic link is not followed. Its folder must exist.

    Yields:
        The open file, binary.

    Raises:
        OSError: it can't be written. What was there before is unchanged.
    """
    path = Path(path)
    temporary, descriptor = _create_file(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Still locked, so that nobody takes it for a leftover.
            if os.name != "nt":
                os.replace(temporary, path)
        if os.name == "nt":  # where an open file can't be renamed
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_error := _disk_error(error, path):
            raise disk_error from error
        raise


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write to that takes the place of `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the folder; one that exists is replaced as a whole. The folders above it are made if need be.

    Yields:
        The temporary folder, empty, beside `path`.

    Raises:
        OSError: it can't be written. What was there before is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _create_folder(path)
    try:
        yield temporary
        honour_umask(temporary)
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        _replace_folder(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if disk_error := _disk_error(error, path):
            raise disk_error from error
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def new_files(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write several files to, by libraries that take paths, which take their places in `folder` when the block
    ends well: each whole, one after the other. It vanishes then, and so do its hidden files, which begin with a dot.

    Args:
        folder: for the files; those that exist are replaced. It and the folders above are made if need be.

    Yields:
        The temporary folder, empty, in `folder`.

    Raises:
        OSError: a file can't be written. What was there before is unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _create_folder(folder / "files")
    try:
        yield temporary
        files = sorted(file for file in temporary.iterdir() if not file.name.startswith("."))
        for file in files:
            _sync(file)
        for file in files:
            os.replace(file, folder / file.name)
        _sync(folder)
    except BaseException as error:
        if disk_error := _disk_error(error, folder):
            raise disk_error from error
        raise
    finally:
        _remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def check_replaceable(folder: Path, overwrite: bool, mark: str, kind: str) -> None:
    """
    Before anything is computed: whether a folder may be written where something is already.

    Args:
        folder: to write.
        overwrite: whether it may replace one of its kind.
        mark: a file that such a folder has.
        kind: what it is called, with its article.

    Raises:
        FileExistsError: something is there that is not to be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"'{folder}' exists already. Choose another folder, or allow overwriting.")
    if not (folder / mark).is_file():
        raise FileExistsError(f"'{folder}' isn't {kind} (no {mark}): it is not overwritten.")


def honour_umask(folder: str | os.PathLike) -> None:
    """
    Lets those read and write a folder's files who may read and write the folder: some libraries make files that only
    their owner can read, whatever the umask.
    """
    folder = Path(folder)
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | allowed)


def remove_files(folder: str | os.PathLike, patterns: Iterable[str]) -> None:
    """
    Removes the files in a folder that a run of ours has written, and the folder if nothing else is in it. Whatever
    else is there stays.

    Args:
        folder: not searched below, not followed if it is a link; it need not exist.
        patterns: of the files' names, as `fnmatch` takes them.

    Raises:
        OSError: they can't be removed.
    """
    folder = Path(folder)
    if folder.is_symlink() or not folder.is_dir():
        return
    remove_leftovers(folder)
    patterns = list(patterns)
    for path in list(folder.iterdir()):
        if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


def remove_folder(path: str | os.PathLike) -> None:
    """
    Removes a folder, if it exists. It loses its name first: what is left when this is interrupted is not taken for it.

    Raises:
        OSError: it can't be removed.
    """
    path = Path(path)
    if path.exists():
        renamed = _temporary_name(path, "partial")
        os.rename(path, renamed)
        shutil.rmtree(renamed)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """
    Removes from a folder what killed processes were writing there; what others are writing now stays.

    Where two folders can't be exchanged at once, a process that was killed just while it replaced one has left the old
    one under another name: it gets its own name back.

    Args:
        folder: not searched below; it need not exist.
    """
    folder = Path(folder)
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return
    for name in names:
        match, leftover = _TEMPORARY_NAME.fullmatch(name), folder / name
        if match is None:
            continue
        # Held until it is gone: who has made it just now and finds it locked takes another name.
        with _abandoned(leftover) as abandoned:
            if not abandoned:
                continue
            target = folder / match["target"]
            if match["kind"] == "replaced" and not os.path.lexists(target):
                os.rename(leftover, target)
            else:
                _remove(leftover)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _temporary_name(path: Path, kind: str) -> Path:
    # File systems allow names of 255 bytes; what is added takes 27 of them.
    target = os.fsdecode(os.fsencode(path.name)[:220])
    return path.with_name(f".{target}.{secrets.token_hex(8)}.{kind}")


def _create_file(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, and its open, locked descriptor."""
    _clear_once(path.parent)
    while True:
        temporary = _temporary_name(path, "partial")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        # Another process or thread may take it for a leftover before it is locked: it holds the lock then, or held it.
        if try_lock(descriptor) is not False and os.path.lexists(temporary):
            return temporary, descriptor
        os.close(descriptor)


def _create_folder(path: Path) -> tuple[Path, int | None]:
    """A new temporary folder beside `path`, and its open, locked descriptor; `None` where folders can't be opened."""
    _clear_once(path.parent)
    while True:
        temporary = _temporary_name(path, "partial")
        os.mkdir(temporary)
        if os.name == "nt":
            return temporary, None
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another process has taken it for a leftover
            continue
        if try_lock(descriptor) is not False and os.path.lexists(temporary):
            return temporary, descriptor
        os.close(descriptor)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Gives a folder its name. What had it before, if anything, is removed."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
        _sync(path.parent)
    elif _exchange(temporary, path):
        _sync(path.parent)
        _remove(temporary)
    else:
        _rename_twice(temporary, path)


def _exchange(first: Path, second: Path) -> bool:
    """Two files or folders get each other's name at one moment. False where the system or the file system can't."""
    if renameat2 is None:
        return False
    here = -100  # AT_FDCWD: relative names are relative to the working directory
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), RENAME_EXCHANGE) == 0


def _rename_twice(temporary: Path, path: Path) -> None:
    """What had the name before is locked while it is neither here nor there; see [`remove_leftovers`]."""
    replaced = _temporary_name(path, "replaced")
    descriptor = None if os.name == "nt" or path.is_symlink() else os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None:
            try_lock(descriptor)
        os.rename(path, replaced)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(replaced, path)
            raise
        _sync(path.parent)
        _remove(replaced)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _disk_error(error: BaseException, path: Path) -> OSError | None:
    """A full disk's error with the file's name, which writing knows nothing of; torch and safetensors hide the rest."""
    hidden: BaseException | None = error
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's
        hidden = OSError(int(match[1]), os.strerror(int(match[1])))
    elif type(error) is RuntimeError:
        hidden = error.__context__
    if isinstance(hidden, OSError) and hidden.errno in DISK_ERRORS and hidden.filename is None:
        return OSError(hidden.errno, hidden.strerror, str(path))
    return None


def _clear_once(folder: Path) -> None:
    """Removes leftovers when this process writes to a folder for the first time."""
    name = os.path.realpath(folder)
    # A forked process inherits the set, but has cleared nothing itself.
    if (os.getpid(), name) not in _cleared:
        remove_leftovers(name)
        _cleared.add((os.getpid(), name))


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody is writing a temporary file or folder, which is locked during the block then."""
    try:
        modified = path.lstat().st_mtime
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # gone meanwhile, a link, or not ours to read
        yield False
        return
    try:
        if (locked := try_lock(descriptor)) is not None:
            yield locked
    finally:
        os.close(descriptor)
    if locked is None:
        yield time.time() - modified > _SECONDS_TO_WRITE


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, onto the disk."""
    if os.name == "nt" or path.is_symlink():  # Windows syncs only what is open for writing, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
