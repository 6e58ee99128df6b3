"""Checkpoints of a run: all that it needs to go on. A folder with the name of a checkpoint is complete."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from san_hf.files import remove_folder
from san_hf.messages import one_line

from .errors import CheckpointError
from .processes import new_shared_folder


PROGRESS_FILE = "progress.json"


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
    try:
        with new_shared_folder(accelerator, folder) as temporary:
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2), encoding="utf-8")
    # A full disk is an OSError, a RuntimeError or a SafetensorError, depending on who was writing.
    except Exception as error:
        last = next(reversed(list_checkpoints(output)), None)
        raise CheckpointError(
            f"The checkpoint of step {progress['step']} can't be written to '{folder}': {one_line(error)}. "
            + (f"The last one, '{last}', is complete: make room and continue with --resume." if last else "")
        ) from error
    if accelerator.is_main_process:
        for old in list_checkpoints(output)[:-keep]:
            remove_folder(old)
    accelerator.wait_for_everyone()
