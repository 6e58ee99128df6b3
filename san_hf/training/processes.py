"""A run's processes: how they were launched, what one does for all, and how they are asked to stop."""

import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env

from san_hf.files import new_folder
from san_hf.launcher import ONE_FOR_SEVERAL, one_for_several
from san_hf.messages import join_some

from .config import ConfigError, TrainingConfig


T = TypeVar("T")

# Where torchrun and the launchers of MPI say how many processes they have started.
WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
# Seconds that a network file system may take to show one machine what another has written.
SECONDS_TO_BE_SEEN = 10.0


class Stopped(Exception):
    """A process was asked to stop, and all of them know."""


class StopRequest:
    """
    Notes SIGTERM and Ctrl-C, for the step to be finished first. A second Ctrl-C interrupts at once, unless it comes
    within `SAME_CTRL_C` seconds: a launcher passes on the one that the terminal has sent to everyone already.
    """

    SAME_CTRL_C = 2.0

    def __init__(self) -> None:
        self.requested = False
        self.since = math.inf
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread
                pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self.since + self.SAME_CTRL_C:
            raise KeyboardInterrupt
        self.requested, self.since = True, min(self.since, now)


def processes_started() -> int | None:
    """The number of processes that a launcher has started; None if there was none."""
    return get_int_from_env(WORLD_SIZES, 0) or None


def check_launch(accelerator: Accelerator, config: TrainingConfig) -> None:
    """
    Raises:
        ConfigError: what started the processes, and what Accelerate or the configuration makes of it, differ.
    """
    started = processes_started()
    if started not in (None, accelerator.num_processes):
        # Each would be the main process, and write to the same folder.
        raise ConfigError(
            f"{started} processes were started, says the environment, but for Accelerate there are "
            f"{accelerator.num_processes}. On CPUs set the variable ACCELERATE_USE_CPU=true; otherwise start them by "
            "accelerate launch or torchrun."
        )
    if started is None and one_for_several():
        raise ConfigError(ONE_FOR_SEVERAL.format(command="train"))
    precision = config.training.mixed_precision
    if precision not in (None, accelerator.mixed_precision):
        raise ConfigError(
            f"training.mixed_precision is {precision}, but DeepSpeed's configuration makes it "
            f"{accelerator.mixed_precision}: change one of them."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate (1.15) would quietly train in float32.
        raise ConfigError(
            "training.mixed_precision is fp16 (by itself or Accelerate's configuration), which a CPU doesn't train in: "
            "set training.mixed_precision=bf16, or no."
        )
    accumulation = config.training.gradient_accumulation
    if accumulation != accelerator.gradient_accumulation_steps:
        raise ConfigError(
            f"training.gradient_accumulation is {accumulation}, but Accelerate was told "
            f"{accelerator.gradient_accumulation_steps}, by the variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS or the "
            f"configuration of DeepSpeed. Set training.gradient_accumulation={accelerator.gradient_accumulation_steps},"
            " or change it there."
        )


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Runs something in the main process alone; its result, or its failure, is everyone's."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, ValueError, RuntimeError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def new_shared_folder(accelerator: Accelerator, path: Path) -> Iterator[Path]:
    """[`new_folder`] for all processes to write to: the main one makes it, and publishes it when all are done."""
    with ExitStack() as stack:
        yield on_main_process(accelerator, lambda: stack.enter_context(new_folder(path)))
        accelerator.wait_for_everyone()


def check_shared(accelerator: Accelerator, folder: Path) -> None:
    """
    Raises:
        ConfigError: not every process sees what the main one writes to the folder. All of them raise it.
    """
    if accelerator.num_processes == 1:
        return
    blind: list[str] = []
    try:
        with new_shared_folder(accelerator, folder / "shared") as written:
            deadline = time.monotonic() + SECONDS_TO_BE_SEEN
            while not (seen := written.is_dir()) and time.monotonic() < deadline:
                time.sleep(0.1)
            blind = [machine for machine in gather_object([None if seen else platform.node()]) if machine is not None]
            raise Stopped  # the folder vanishes again
    except Stopped:
        if blind:
            raise ConfigError(
                f"The output folder '{folder}' is not shared: what the main process writes to it isn't seen on "
                f"{join_some(sorted(set(blind)))} ({len(blind)} of {accelerator.num_processes} processes). Choose an "
                "output on a file system that all machines share."
            ) from None
