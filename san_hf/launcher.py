"""What a process of torchrun or `accelerate launch` knows of it: that it is killed, or started too few."""

import os
import sys
import threading
import time


_SECONDS_BETWEEN_LOOKS = 1.0
ONE_FOR_SEVERAL = (
    "accelerate launch was asked for several processes on CPUs, but starts a single one for itself on each machine. "
    "Start them by torchrun: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m san_hf {command} ... (or, for a "
    "single process, leave --num_processes and --num_machines out)."
)


def end_with_launcher() -> None:
    """
    Has this process end within a few seconds after its launcher has, as after SIGKILL: a killed launcher can't tell it
    to, and it would keep its GPU and go on writing. Nothing happens where no launcher has started it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="launcher watch").start()


def one_for_several() -> bool:
    """Whether this is the single process that `accelerate launch` starts where it is asked for several on CPUs."""
    # Then it sets all that several processes need but their number.
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    print("Error: the launcher of this process was killed. What is complete is kept.", file=sys.stderr, flush=True)
    os._exit(1)
