"""Devices of torch by name, and what to do when their memory is too small."""

import os

import torch


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


def pick_device(name: str) -> torch.device:
    """
    A torch device by name; "auto" is the accelerator, if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # Which error it is depends on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"]
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            available += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
        raise ValueError(f"There is no device {name!r} here; there is {', '.join(available)}.") from error
    return device


def warn_of_threads(device: torch.device, cores: int | None = None) -> str:
    """What to say where the processes of this machine have more threads than it has cores; else nothing."""
    processes, threads = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.get_num_threads()
    cores = cores or os.cpu_count() or 1
    if device.type != "cpu" or processes == 1 or processes * threads <= cores:
        return ""
    return (
        f"{processes} processes with {threads} threads each wait for each other on {cores} cores, up to 20 times as "
        f"long: set OMP_NUM_THREADS={max(cores // processes, 1)}."
    )
