"""Commands in several processes, started by `accelerate launch` or torchrun."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from san_hf.cli.console import show
from san_hf.launcher import ONE_FOR_SEVERAL, end_with_launcher, one_for_several


if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
# Processes meet at the end, after shares of the work that may take days and differ by hours.
LONGEST_WAIT = timedelta(days=30)


def join_processes(device: str, command: str) -> "Accelerator | None":
    """
    The accelerator of a run of several processes; `None` for a single one.

    Raises:
        ValueError: a device is named for all of them, or a launcher started one where several were asked for.
    """
    if one_for_several():
        raise ValueError(ONE_FOR_SEVERAL.format(command=command))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    from san_hf.devices import pick_device, warn_of_threads

    end_with_launcher()
    if device not in ("auto", "cpu"):
        raise ValueError(f"Got --device {device} for several processes: each has its own, leave the option out.")
    # Accelerate joins processes without a GPU only if it is told that CPUs are meant. The precision is --dtype's,
    # whatever was set for Accelerate.
    accelerator = Accelerator(
        cpu=pick_device(device).type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    if accelerator.is_local_main_process and (warning := warn_of_threads(accelerator.device)):
        show(warning, error=True)
    return accelerator


def on_main_process(accelerator: "Accelerator | None", function: Callable[[], T]) -> T:
    """What a function returns in the main process, for all; where it ends the command, the launcher ends the others."""
    if accelerator is None:
        return function()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([function() if accelerator.is_main_process else None])[0]


def part_of_process(part: tuple[int, int], accelerator: "Accelerator | None") -> tuple[int, int]:
    """Of the I-th of N parts, (I, N), this process's part: the J-th of M."""
    if accelerator is None:
        return part
    (number, count), processes = part, accelerator.num_processes
    return (number - 1) * processes + accelerator.process_index + 1, count * processes


def add_up(accelerator: "Accelerator | None", *counts: int) -> list[int]:
    """Counts of all processes, summed; each waits for the last of them."""
    if accelerator is None:
        return list(counts)
    import torch

    return accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()


def leave_processes(accelerator: "Accelerator | None") -> None:
    """Waits for all, as a launcher ends them when the first ends with another status than 0."""
    if accelerator is not None:
        accelerator.wait_for_everyone()
        accelerator.end_training()
        accelerator.state.destroy_process_group()
