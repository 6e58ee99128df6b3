"""Processes that torchrun or `accelerate launch` has started end with it, also when it is killed."""

import os
import sys
import threading
import time


_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_launcher() -> None:
    """
    Has this process end within a few seconds after its launcher has, as after SIGKILL: a killed launcher can't tell it
    to, and it would keep its GPU and go on writing. Nothing happens where no launcher has started it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="launcher watch").start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    print("Error: the launcher of this process was killed. What is complete is kept.", file=sys.stderr, flush=True)
    os._exit(1)
