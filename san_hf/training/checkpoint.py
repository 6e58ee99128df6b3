"""Checkpoints of a run: all that it needs to go on. A folder with the name of a checkpoint is complete."""

import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from san_hf.files import json_text, remove_folder, write_file
from san_hf.json_files import read_json
from san_hf.messages import one_line
from san_hf.modeling.base_clip_san import clip_name

from .errors import CheckpointError
from .processes import new_shared_folder


PROGRESS_FILE = "progress.json"
# What it holds, beside the sizes and checksums of the other files.
PROGRESS_KEYS: dict[str, Any] = {
    "step": int,
    "evaluated": int,
    "best": dict | None,
    "run": str,
    "config": dict,
    "data": dict,
    "epoch_length": int | None,
}


def folder_name(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-*"))


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """
    What the run knows of itself, of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: the folder is no checkpoint, or a file of it is damaged; the message names the file.
    """
    file = checkpoint / PROGRESS_FILE
    try:
        progress = read_json(file)
        lacking = PROGRESS_KEYS.keys() - progress.keys()
        wrong = [key for key, kind in PROGRESS_KEYS.items() if not isinstance(progress.get(key), kind)]
        if lacking or wrong or folder_name(progress["step"]) != checkpoint.name:
            raise ValueError(f"its {', '.join(sorted({*lacking, *wrong})) or 'step'} can't be right")
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(file, one_line(error)) from error
    for name, (size, checksum) in progress.get("files", {}).items():
        try:
            found = _size_and_checksum(checkpoint / name)
        except OSError as error:
            raise _damaged(checkpoint / name, one_line(error)) from error
        if found[0] != size:
            raise _damaged(checkpoint / name, f"it has {found[0]:,} bytes, expected {size:,}")
        if found[1] != checksum:
            raise _damaged(checkpoint / name, "its checksum isn't that of the file that was written")
    return progress


def leave_out_clip(accelerator: Accelerator) -> None:
    """Has checkpoints hold no frozen tensors of CLIP. Engines that spread a model write theirs whole."""

    def drop_clip(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state_dict in weights:
            for name in [name for name in state_dict if clip_name(name.removeprefix("module.")) is not None]:
                del state_dict[name]

    accelerator.register_save_state_pre_hook(drop_clip)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, has_clip: bool = True) -> None:
    """
    Loads the states into what the accelerator has prepared. Called by every process, after [`read_checkpoint`].

    Args:
        accelerator: see there.
        checkpoint: its folder.
        has_clip: whether it was written without [`leave_out_clip`].

    Raises:
        CheckpointError: they don't fit.
    """
    try:
        accelerator.load_state(str(checkpoint), **({} if has_clip else {"strict": False}))
    # A state of other software or another number of processes makes torch fail in ways of its own.
    except Exception as error:
        reason = "torch can't read it" if "weights_only" in str(error) else one_line(error)
        raise _damaged(checkpoint, reason) from error
    # In the middle of a step's batches, if the run was interrupted there; but steps are always taken as a whole.
    accelerator.step = 0


def note_evaluation(checkpoint: Path, progress: dict[str, Any]) -> None:
    """Has a checkpoint know of the evaluation that followed it, so that no other one does on resuming."""
    write_file(checkpoint / PROGRESS_FILE, json_text(progress, indent=2))


def _damaged(file: Path, reason: str) -> CheckpointError:
    checkpoint = next(folder for folder in (file, *file.parents) if folder.name.startswith("step-"))
    earlier = [other for other in list_checkpoints(checkpoint.parents[1]) if other.name < checkpoint.name]
    advice = f"resume from the one before, '{earlier[-1].name}'" if earlier else "resume from the first step"
    return CheckpointError(f"'{file}' is damaged: {reason}. Delete the folder '{checkpoint}' to {advice}.")


def _size_and_checksum(file: Path) -> list[int]:
    size = checksum = 0
    with open(file, "rb") as opened:
        while part := opened.read(1 << 22):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return [size, checksum]


def save_checkpoint(accelerator: Accelerator, output: Path, progress: dict[str, Any], keep: int) -> None:
    """
    Writes all that the run needs to go on, then deletes the oldest checkpoints.

    Args:
        accelerator: its models, optimisers, schedulers and random states are saved. Called by every process.
        output: the run's folder, seen by all processes.
        progress: goes into `progress.json`, with the files' checksums; `step` names the folder.
        keep: how many checkpoints to leave.

    Raises:
        CheckpointError: it can't be written. Nothing of it is left, and earlier ones are as they were.
    """
    folder = output / "checkpoints" / folder_name(progress["step"])
    try:
        with new_shared_folder(accelerator, folder) as temporary:
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                progress["files"] = {path.relative_to(temporary).as_posix(): _size_and_checksum(path) for path in files}
                write_file(temporary / PROGRESS_FILE, json_text(progress, indent=2))
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
