"""States of a run on disk. A folder with the name of a checkpoint is complete: it was written elsewhere and renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator


# What is being written, or deleted, has this in front of its name.
PARTIAL = ".partial-"
PROGRESS_FILE = "progress.json"


class CheckpointError(OSError):
    """A checkpoint that could not be written or read; the message says why, and what is left."""


def list_checkpoints(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-*"))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: the folder is no checkpoint.
    """
    try:
        return json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint '{checkpoint}' can't be read: {error}. Delete that folder to resume from the one before."
        ) from error


def save_checkpoint(accelerator: Accelerator, output: Path, progress: dict[str, Any], keep: int) -> None:
    """
    Writes all that the run needs to go on, then deletes the oldest checkpoints.

    Args:
        accelerator: its models, optimisers, schedulers and random states are saved. Called by every process.
        output: the run's folder, seen by all processes.
        progress: goes into `progress.json`; `step` names the folder.
        keep: how many checkpoints to leave.

    Raises:
        CheckpointError: it can't be written. Nothing of it is left, and earlier ones are as they were.
    """
    folder = output / "checkpoints" / f"step-{progress['step']:08d}"
    temporary = folder.with_name(PARTIAL + folder.name)
    try:
        if accelerator.is_main_process:
            remove_folder(temporary)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2), encoding="utf-8")
            publish_folder(temporary, folder)
    # A full disk is an OSError, a RuntimeError or a SafetensorError, depending on who was writing.
    except Exception as error:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        last = next(reversed(list_checkpoints(output)), None)
        raise CheckpointError(
            f"The checkpoint of step {progress['step']} can't be written to '{folder}': {reason(error)}. "
            + (f"The last one, '{last}', is complete: make room and continue with --resume." if last else "")
        ) from error
    if accelerator.is_main_process:
        for old in list_checkpoints(output)[:-keep]:
            remove_folder(old)
    accelerator.wait_for_everyone()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when all is written; on an error, nothing changes."""
    temporary = folder.with_name(PARTIAL + folder.name)
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file at once."""
    temporary = file.with_name(PARTIAL + file.name)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, file)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Renames, once everything is on the disk and not only on its way there."""
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    if folder.exists():
        remove_folder(folder)
    os.rename(temporary, folder)
    _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Deletes a folder, if there is one. It loses its name first: half of it is never taken for the whole."""
    if folder.exists():
        doomed = folder
        if not folder.name.startswith(PARTIAL):
            doomed = folder.with_name(f"{PARTIAL}old-{folder.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(output: Path) -> None:
    """Deletes what a killed run was just writing or deleting."""
    for path in [*output.glob(f"{PARTIAL}*"), *output.glob(f"checkpoints/{PARTIAL}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def reason(error: BaseException) -> str:
    """What went wrong, in a line without full stop."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows syncs only what is open for writing, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
