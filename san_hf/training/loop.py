"""The training loop: `train` reads from top to bottom as the method does."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object

from san_hf.data import DataError
from san_hf.modeling.fast_linear_san import fast_linear

from .config import TrainingConfig
from .errors import PeerError, TrainingError
from .folder import RunFolder
from .processes import Stopped, StopRequest
from .run import Run
from .run_log import Clock


def train(config: TrainingConfig, resume: bool = False) -> Path | None:
    """
    Trains a SAN. Called by every process of `accelerate launch`, or by one alone.

    Writes to `config.output`: `config.yaml`, `log.jsonl` (one line for each step and each evaluation), `checkpoints/`
    (what `resume` needs), `best/` (the model with the highest validation mIoU) and `final/` (the model after the last
    step), both with everything `from_pretrained` needs, and `pictures/`.

    Args:
        config: see [`TrainingConfig`].
        resume: whether to go on with the run in `config.output` from its last checkpoint; from the start if there is
            none yet. On the CPU, the run then continues bit for bit as if it had never stopped.

    Returns:
        The folder `final/`; or None if the run was asked to stop (SIGTERM, Ctrl-C) and has saved a checkpoint.

    Raises:
        ConfigError: the configuration can't be used, or is not that of the run to be resumed.
        DataError: the data can't be used; the message names the example.
        TrainingError: a loss that isn't finite, or an output folder that can't be written.
        CheckpointError: a checkpoint that can't be written, or is damaged.
        san_hf.locks.InUseError: another process trains in that folder.
    """
    with RunFolder(config) as folder, ExitStack() as stack:
        run = Run(config, folder, resume)
        stop, log = stack.enter_context(StopRequest()), stack.enter_context(run.open_log())
        log.say(run.describe())
        stack.enter_context(fast_linear(run.accelerator.device))
        batches = iter(run.loader)
        clock = Clock(config.training.batch_size, run.steps - run.step)
        run.model.train()
        while True:
            if run.saves_now:
                run.save()
            if run.evaluates_now:
                run.evaluate(log)
            if run.step == run.steps:
                break

            clock.start()
            try:
                metrics = train_step(run, batches, clock, stop)
            except (DataError, PeerError, Stopped) as interruption:
                # Nothing of this step has reached the weights.
                if run.step > run.saved:
                    run.save()
                if not isinstance(interruption, Stopped):
                    raise
                kept = f"at step {run.step} of {run.steps}, saved" if run.step else "before the first step"
                log.say(f"Stopped {kept}. Continue with --resume.")
                return None
            run.progress["step"] += 1
            log.step({"step": run.step, **metrics, **clock.metrics()})

        return run.finish(log)


def train_step(run: Run, batches: Iterator[Any], clock: Clock, stop: StopRequest) -> dict[str, float]:
    """
    One optimiser step, over all processes.

    Returns:
        `loss` and each of its parts, averaged over processes and accumulated batches; `grad_norm` before clipping;
        `learning_rate` of this step.

    Raises:
        DataError, PeerError: an example of this process, or of another, can't be used.
        TrainingError: the loss or the gradient isn't finite.
        Stopped: a process was asked to stop.
    """
    accelerator, config, model, step = run.accelerator, run.config, run.model, run.step
    run.optimizer.zero_grad()
    learning_rate = run.scheduler.get_last_lr()[0]
    parts = wait_for_parts(accelerator, batches, clock, stop, config.training.gradient_accumulation)
    # What the losses are divided by is that of the whole step: where it is more than the batch of one forward pass.
    target_counts = None
    if len(parts) > 1:
        labels = [batch["labels"].to(accelerator.device, non_blocking=True) for batch in parts]
        counts = torch.stack([accelerator.unwrap_model(model).count_targets(part) for part in labels]).sum(0)
        target_counts = accelerator.reduce(counts.to(accelerator.device), "sum")
    sums: dict[str, float] = {}
    for part, batch in enumerate(parts):
        # The loss draws random points: the same ones in this step, whether or not the run was interrupted.
        entropy = np.random.SeedSequence([config.seed, step, part, accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        with accelerator.accumulate(model):
            outputs = model(
                pixel_values=batch["pixel_values"].to(accelerator.device, non_blocking=True),
                labels=batch["labels"].to(accelerator.device, non_blocking=True),
                target_counts=target_counts,
                **run.text_inputs,
            )
            losses = {"loss": outputs.loss, **outputs.loss_dict}
            values = torch.stack([value.detach().float() for value in losses.values()])
            means = dict(zip(losses, accelerator.reduce(values, "mean").tolist()))
            check_finite_losses(accelerator, means, bool(values.isfinite().all()), batch["names"], step)
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value / len(parts)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or float("inf"))
                norm = float("nan") if norm is None else float(norm)
                check_finite_gradient(accelerator, norm, step)
            run.optimizer.step()
    run.scheduler.step()
    return {**sums, "grad_norm": norm, "learning_rate": learning_rate}


def wait_for_parts(
    accelerator: Accelerator, batches: Iterator[Any], clock: Clock, stop: StopRequest, number: int
) -> list[dict[str, Any]]:
    """
    The batches that this process accumulates in one step: all there before any of them is computed.

    Raises:
        DataError, PeerError, Stopped: see [`train_step`].
    """
    parts: list[Any] = []
    while len(parts) < number and not (parts and isinstance(parts[-1], DataError)):
        parts.append(clock.wait_for(batches))
    error = parts[-1] if isinstance(parts[-1], DataError) else None
    # What concerns one process concerns all: they step together or not at all.
    flags = torch.tensor([float(error is not None), float(stop.requested)], device=accelerator.device)
    any_failed, any_stopped = accelerator.reduce(flags, "sum").tolist()
    if any_failed:
        raise error or PeerError("Another process had data that can't be used.")
    if any_stopped:
        raise Stopped
    return parts


def check_finite_losses(
    accelerator: Accelerator, means: dict[str, float], own_is_finite: bool, names: list[str], step: int
) -> None:
    """
    Raises:
        TrainingError: a loss that isn't finite; the message names the images of the batch.
    """
    if all(np.isfinite(value) for value in means.values()):
        return
    broken = gather_object([[] if own_is_finite else names])
    listed = ", ".join(name for names_of in broken for name in names_of)
    parts = ", ".join(f"{name} {value}" for name, value in means.items() if not np.isfinite(value))
    raise TrainingError(
        f"The loss of step {step + 1} is not finite ({parts}) for the batch of: {listed}. The weights are still those "
        "of the step before, and earlier checkpoints are kept. Look at these images; if they are fine, try a smaller "
        "optimizer.learning_rate, or training.mixed_precision=no."
    )


def check_finite_gradient(accelerator: Accelerator, norm: float, step: int) -> None:
    """
    Raises:
        TrainingError: a gradient that isn't finite, where nothing skips such steps.
    """
    # Half precision overflows now and then: its scaler skips such steps, as DeepSpeed does.
    if np.isfinite(norm) or accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    raise TrainingError(
        f"The gradient of step {step + 1} is not finite (norm {norm}), though its loss is. The weights are still those "
        "of the step before, and earlier checkpoints are kept. Try a smaller optimizer.learning_rate, or "
        "training.mixed_precision=no."
    )
