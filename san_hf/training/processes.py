"""A run's processes: how they were launched, what one does for all, and how they are asked to stop."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, broadcast_object_list

from san_hf.files import new_folder
from san_hf.modeling import SANForSemanticSegmentation

from .config import ConfigError, TrainingConfig


T = TypeVar("T")


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


def check_launch(accelerator: Accelerator, config: TrainingConfig) -> None:
    """
    Raises:
        ConfigError: what started the processes, and what Accelerate or the configuration makes of it, differ.
    """
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:
        # Each would be the main process, and write to the same folder.
        raise ConfigError(
            f"WORLD_SIZE says that {started} processes were started, but for Accelerate there are "
            f"{accelerator.num_processes}. On CPUs set the variable ACCELERATE_USE_CPU=true; otherwise start them by "
            "accelerate launch or torchrun."
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


def whole_model(accelerator: Accelerator, model: torch.nn.Module) -> SANForSemanticSegmentation:
    """The model without what training wraps around it; a copy where its weights are spread over processes."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    state = accelerator.get_state_dict(model)  # of the main process
    whole = SANForSemanticSegmentation(accelerator.unwrap_model(model).config).to(accelerator.device)
    for name, tensor in whole.state_dict().items():
        if accelerator.is_main_process:
            tensor.copy_(state[name])
        tensor.copy_(broadcast(tensor))
    return whole
