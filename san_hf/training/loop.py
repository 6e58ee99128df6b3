"""The training loop: `train` reads from top to bottom as the method does."""

import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, broadcast_object_list, gather_object, set_seed

from san_hf.data import DataError, SegmentationDataset, load_segmentation_dataset
from san_hf.evaluation.evaluator import draw_examples, evaluate
from san_hf.hub import push_to_hub, save_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor

from .augmentation import TrainingTransform
from .checkpoint import (
    atomic_folder,
    list_checkpoints,
    read_progress,
    reason,
    remove_leftovers,
    save_checkpoint,
)
from .collator import SegmentationCollator
from .config import ConfigError, TrainingConfig, changes, save_config
from .model import build_model, set_vocabulary, trains_text
from .optimization import parameter_groups, polynomial_schedule
from .run_log import Clock, RunLog, check_trackers, truncate_log
from .stream import SampleStream, build_loader


CONFIG_FILE = "config.yaml"


class TrainingError(RuntimeError):
    """A training that can't start or go on; the message says why, and what is left."""


class PeerError(TrainingError):
    """Another process has failed, and says why."""


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
        CheckpointError: a checkpoint that can't be written or read.
    """
    output = Path(config.output).expanduser()
    check_trackers(config.logging.trackers)
    try:
        accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision,
            gradient_accumulation_steps=config.training.gradient_accumulation,
            log_with=config.logging.trackers or None,
            project_dir=str(output),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        precision = config.training.mixed_precision
        raise ConfigError(
            f"Accelerate can't begin, with training.mixed_precision={precision}: {reason(error)}."
        ) from error
    _check_launch(accelerator, config)
    progress = _on_main_process(accelerator, lambda: _open_output(config, output, resume))
    set_seed(config.seed)

    data, validation = _load_data(config)
    model, processor = build_model(config.model, data)
    if config.training.gradient_checkpointing:
        # The older name goes once setup.py asks for a transformers that has the newer one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay, config.optimizer.clip_learning_rate),
        lr=config.optimizer.learning_rate,
    )
    scheduler = polynomial_schedule(
        optimizer, config.training.steps, config.optimizer.power, config.optimizer.warmup_steps
    )
    stream = _build_stream(config, data, accelerator, progress)
    transform = TrainingTransform(**config.augmentation.model_dump(), ignore_index=data.ignore_index)
    loader = build_loader(stream, transform, SegmentationCollator(processor, data.ignore_index), config.data.workers)
    # Before preparing, which DeepSpeed does only if it knows this.
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            stream.batch_size // accelerator.num_processes
        )
    plain = model
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    # Again: what DeepSpeed is told of accumulation holds from here on.
    _check_launch(accelerator, config)
    text = processor(text=data.class_names, return_tensors="pt").to(accelerator.device) if trains_text(plain) else {}

    if progress is None:
        progress = {"step": 0, "evaluated": 0, "best": None, "run": uuid.uuid4().hex[:8]}
    else:
        accelerator.load_state(str(list_checkpoints(output)[-1]))
    progress["config"] = config.model_dump()
    progress["data"] = _fingerprint(data)
    saved = progress["step"]

    def save() -> None:
        nonlocal saved
        log.flush()
        progress["epoch_length"] = stream.epoch_length
        save_checkpoint(accelerator, output, progress, config.checkpoints.keep)
        saved = progress["step"]

    steps = config.training.steps
    with (
        StopRequest() as stop,
        RunLog(
            accelerator,
            output,
            config.logging,
            progress["config"],
            progress["run"],
            progress["step"],
            steps,
        ) as log,
    ):
        log.say(_describe(config, data, plain, accelerator, progress["step"]))
        batches = iter(loader)
        clock = Clock(config.training.batch_size, steps - progress["step"])
        model.train()
        while True:
            step = progress["step"]
            evaluates = validation is not None and step > progress["evaluated"]
            evaluates &= step % config.evaluation.every == 0 or step == steps
            if step > saved and (step % config.checkpoints.every == 0 or step == steps or evaluates):
                save()
            if evaluates:
                _evaluate(accelerator, config, output, model, processor, validation, progress, log)
            if step == steps:
                break

            clock.start()
            try:
                figures = _train_step(
                    accelerator, config, model, optimizer, scheduler, batches, text, step, clock, stop
                )
            except (DataError, PeerError, _Stopped) as interruption:
                # Nothing of this step has reached the weights.
                if step > saved:
                    save()
                if not isinstance(interruption, _Stopped):
                    raise
                log.say(f"Stopped at step {step} of {steps}, saved. Continue with --resume.")
                return None
            progress["step"] += 1
            log.step({"step": progress["step"], **figures, **clock.figures()})

        return _finish(accelerator, config, output, model, processor, data, progress, log)


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


class _Stopped(Exception):
    """A process was asked to stop, and all of them know."""


def _train_step(
    accelerator: Accelerator,
    config: TrainingConfig,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    batches: Iterator[Any],
    text: dict[str, torch.Tensor],
    step: int,
    clock: Clock,
    stop: StopRequest,
) -> dict[str, float]:
    """
    One optimiser step, over all processes.

    Returns:
        `loss` and each of its parts, averaged over processes and accumulated batches; `grad_norm` before clipping;
        `learning_rate` of this step.

    Raises:
        DataError, PeerError: an example of this process, or of another, can't be used.
        TrainingError: the loss or the gradient isn't finite.
        _Stopped: a process was asked to stop.
    """
    optimizer.zero_grad()
    learning_rate = scheduler.get_last_lr()[0]
    sums: dict[str, float] = {}
    accumulated = config.training.gradient_accumulation
    for part in range(accumulated):
        batch = clock.wait_for(batches)
        failed = isinstance(batch, DataError)
        # What concerns one process concerns all: they step together or not at all.
        flags = torch.tensor([float(failed), float(stop.requested)], device=accelerator.device)
        any_failed, any_stopped = accelerator.reduce(flags, "sum").tolist()
        if any_failed:
            raise batch if failed else PeerError("Another process had data that can't be used.")
        if any_stopped:
            raise _Stopped
        # The loss draws random points: the same ones in this step, whether or not the run was interrupted.
        entropy = np.random.SeedSequence([config.seed, step, part, accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        with accelerator.accumulate(model):
            outputs = model(
                pixel_values=batch["pixel_values"].to(accelerator.device, non_blocking=True),
                labels=batch["labels"].to(accelerator.device, non_blocking=True),
                **text,
            )
            losses = {"loss": outputs.loss, **outputs.loss_dict}
            values = torch.stack([value.detach().float() for value in losses.values()])
            means = dict(zip(losses, accelerator.reduce(values, "mean").tolist()))
            _check_finite(accelerator, means, bool(values.isfinite().all()), batch["names"], step)
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value / accumulated
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or float("inf"))
                norm = float("nan") if norm is None else float(norm)
                # Half precision overflows now and then: its scaler skips such steps.
                if accelerator.scaler is None and norm in (float("inf"), float("-inf")) or norm != norm:
                    if accelerator.scaler is None and accelerator.distributed_type != DistributedType.DEEPSPEED:
                        raise TrainingError(
                            f"The gradient of step {step + 1} is not finite (norm {norm}), though its loss is. The "
                            "weights are still those of the step before, and earlier checkpoints are kept. Try a "
                            "smaller optimizer.learning_rate, or training.mixed_precision=no."
                        )
            optimizer.step()
    scheduler.step()
    return {**sums, "grad_norm": norm, "learning_rate": learning_rate}


def _check_finite(
    accelerator: Accelerator, means: dict[str, float], own_is_finite: bool, names: list[str], step: int
) -> None:
    if all(np.isfinite(value) for value in means.values()):
        return
    guilty = gather_object([[] if own_is_finite else names])
    listed = ", ".join(name for names_of in guilty for name in names_of)
    parts = ", ".join(f"{name} {value}" for name, value in means.items() if not np.isfinite(value))
    raise TrainingError(
        f"The loss of step {step + 1} is not finite ({parts}) for the batch of: {listed}. The weights are still those "
        "of the step before, and earlier checkpoints are kept. Look at these images; if they are fine, try a smaller "
        "optimizer.learning_rate, or training.mixed_precision=no."
    )


def _check_launch(accelerator: Accelerator, config: TrainingConfig) -> None:
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


def _on_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
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


def _open_output(config: TrainingConfig, output: Path, resume: bool) -> dict[str, Any] | None:
    """Makes the run's folder ready: for a new run, or (its last checkpoint's progress is returned) to go on."""
    progress = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        present = sorted(path.name for path in output.iterdir())
        if present and not resume:
            raise TrainingError(
                f"The output folder '{output}' is not empty: it has {', '.join(present[:5])}"
                f"{' ...' if len(present) > 5 else ''}. Continue its run with --resume, or choose another output."
            )
        if present and CONFIG_FILE not in present:
            raise TrainingError(
                f"'{output}' holds no run to resume: there is no {CONFIG_FILE}, but {', '.join(present[:5])}."
            )
        if checkpoints := list_checkpoints(output):
            progress = read_progress(checkpoints[-1])
            if different := changes(progress["config"], config.model_dump()):
                listed = "".join(f"\n  {key}: was {old!r}, is {new!r}" for key, (old, new) in different.items())
                raise ConfigError(
                    f"The run in '{output}' was started with another configuration:{listed}\nResume it with "
                    f"--config {output / CONFIG_FILE}, or start a new run in another output."
                )
        step, evaluated = (progress["step"], progress["evaluated"]) if progress else (0, 0)
        truncate_log(output, step, evaluated)
        save_config(config, output / CONFIG_FILE)
    except (ConfigError, TrainingError):
        raise
    except OSError as error:
        raise TrainingError(f"The output folder '{output}' can't be used: {reason(error)}.") from error
    return progress


def _load_data(config: TrainingConfig) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    section = config.data
    options = {
        "image_column": section.image_column,
        "label_column": section.label_column,
        "class_names": section.class_names,
        "ignore_index": section.ignore_index,
        "label_shift": section.label_shift,
        "streaming": section.streaming,
    }
    version = {"config_name": section.config_name, "revision": section.revision}
    data = load_segmentation_dataset(section.source, section.split, **options, **version)
    if section.validation_split is None:
        return data, None
    if section.validation_source is None:
        return data, load_segmentation_dataset(section.source, section.validation_split, **options, **version)
    return data, load_segmentation_dataset(section.validation_source, section.validation_split, **options)


def _fingerprint(data: SegmentationDataset) -> dict[str, Any]:
    """What of the data the order of the samples depends on."""
    examples = None if not hasattr(data.dataset, "__len__") else len(data)
    return {"examples": examples, "class_names": data.class_names}


def _build_stream(
    config: TrainingConfig, data: SegmentationDataset, accelerator: Accelerator, progress: dict[str, Any] | None
) -> SampleStream:
    batch_size = config.training.batch_size // config.training.gradient_accumulation
    if batch_size < accelerator.num_processes:
        raise ConfigError(
            f"training.batch_size ({config.training.batch_size}) gives {batch_size} images at a time for "
            f"{accelerator.num_processes} processes: expected at least one for each."
        )
    if progress is not None and progress["data"] != _fingerprint(data):
        raise ConfigError(
            f"The data have changed since the run was started: it had {progress['data']['examples']} examples and the "
            f"classes {progress['data']['class_names']!r:.200}, there are now {_fingerprint(data)['examples']} and "
            f"{data.class_names!r:.200}. Start a new run in another output."
        )
    return SampleStream(
        data,
        config.seed,
        batch_size,
        first=config.training.batch_size * (progress["step"] if progress else 0),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        shuffle_buffer=config.data.shuffle_buffer,
        epoch_length=progress["epoch_length"] if progress else None,
    )


def _whole_model(accelerator: Accelerator, model: torch.nn.Module) -> SANForSemanticSegmentation:
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


def _evaluate(
    accelerator: Accelerator,
    config: TrainingConfig,
    output: Path,
    model: torch.nn.Module,
    processor: SANProcessor,
    validation: SegmentationDataset,
    progress: dict[str, Any],
    log: RunLog,
) -> None:
    """Measures the model, notes the figures, and keeps the model if it is the best so far."""
    started = time.perf_counter()
    step, best = progress["step"], progress["best"]
    whole = _whole_model(accelerator, model)
    bar = "Evaluating" if accelerator.is_main_process and sys.stderr.isatty() else None
    results = evaluate(
        whole, processor, validation, accelerator=accelerator, limit=config.evaluation.limit, progress=bar
    )
    miou = results.metrics["mIoU"]
    # There is none where nothing has a label.
    is_best = not math.isnan(miou) and (best is None or miou > best["mIoU"])
    progress["evaluated"] = step
    if is_best:
        progress["best"] = {"step": step, "mIoU": miou}
        facts = _card_facts(config, validation, results.metrics, step)
        _save_model(accelerator, output / "best", whole, processor, facts)
    log.evaluation(step, results.metrics, time.perf_counter() - started, is_best)
    if config.evaluation.pictures and not config.data.streaming:
        draw = partial(_draw, accelerator, config, output, whole, processor, validation, step, log)
        _on_main_process(accelerator, draw)


def _draw(
    accelerator: Accelerator,
    config: TrainingConfig,
    output: Path,
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    validation: SegmentationDataset,
    step: int,
    log: RunLog,
) -> None:
    """A picture of the same few validation images, evenly spread, after each evaluation."""
    count = min(config.evaluation.pictures, len(validation))
    indices = [number * len(validation) // count for number in range(count)]
    models = {f"step {step}": (model, processor)}
    picture = draw_examples(models, validation, indices, autocast=accelerator.autocast)
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"step-{step:08d}.png")
    log.picture(step, picture)


def _save_model(
    accelerator: Accelerator,
    folder: Path,
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    facts: dict[str, Any],
) -> None:
    """Writes a complete model folder, or nothing."""

    def write() -> None:
        try:
            with atomic_folder(folder) as temporary:
                save_pretrained(model, processor, temporary, facts=facts, model_id=folder.resolve().parent.name)
        # A full disk has many names, see save_checkpoint.
        except Exception as error:
            raise TrainingError(
                f"The model can't be written to '{folder}': {reason(error)}. The checkpoints are kept: make room and "
                "continue with --resume."
            ) from error

    _on_main_process(accelerator, write)


def _finish(
    accelerator: Accelerator,
    config: TrainingConfig,
    output: Path,
    model: torch.nn.Module,
    processor: SANProcessor,
    data: SegmentationDataset,
    progress: dict[str, Any],
    log: RunLog,
) -> Path:
    """Writes the final model, and pushes it."""
    whole = _whole_model(accelerator, model)
    if trains_text(whole):
        set_vocabulary(whole, processor, data.class_names)
    facts = _card_facts(config, data, None, progress["step"])
    folder = output / "final"
    _save_model(accelerator, folder, whole, processor, facts)
    log.say(f"Wrote {folder}.")
    if best := progress["best"]:
        log.say(f"Best on the validation data: step {best['step']}, mIoU {best['mIoU']:.2f}, in {output / 'best'}.")

    def push() -> None:
        try:
            push_to_hub(whole, processor, config.hub.repo, facts=facts, private=config.hub.private)
        except Exception as error:  # networks fail in many ways
            raise TrainingError(
                f"The model could not be pushed to '{config.hub.repo}': {reason(error)}. It is complete in '{folder}': "
                f"hf upload {config.hub.repo} {folder}"
            ) from error

    if config.hub.repo is not None:
        _on_main_process(accelerator, push)
        log.say(f"Pushed to {config.hub.repo}.")
    return folder


def _card_facts(
    config: TrainingConfig, data: SegmentationDataset, metrics: dict[str, float] | None, step: int
) -> dict[str, Any]:
    """What the card of a trained model says."""
    start = config.model.checkpoint or config.model.clip
    training = (
        f"Started from `{start}` and trained for {step} of {config.training.steps} steps of "
        f"{config.training.batch_size} images on `{config.data.source}` ({config.data.split}), {len(data.class_names)} "
        f"classes, with AdamW at a learning rate of {config.optimizer.learning_rate:g}. CLIP was "
        f"{'frozen' if config.model.freeze_clip else 'trained, too'}. Crops of {config.augmentation.crop_size} pixels, "
        f"seed {config.seed}."
    )
    facts: dict[str, Any] = {
        "title": Path(config.output).expanduser().resolve().name,
        "training": training,
        "sample_classes": data.class_names[:3],
    }
    if metrics is not None:
        figures = {name: round(metrics[name], 2) for name in ("mIoU", "fwIoU", "mACC", "pACC")}
        facts["results"] = [{"dataset": f"{data.name} {data.split}", **figures}]
        facts["results_note"] = "In percent, of this run's own evaluation" + (
            f" on {config.evaluation.limit} images." if config.evaluation.limit else "."
        )
    return facts


def _describe(
    config: TrainingConfig,
    data: SegmentationDataset,
    model: SANForSemanticSegmentation,
    accelerator: Accelerator,
    step: int,
) -> str:
    """The first line of a run."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    examples = f"{len(data)} images" if hasattr(data.dataset, "__len__") else "a stream of images"
    processes = f" x {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    return (
        f"{'Continuing after' if step else 'Training: '}{f' step {step}: ' if step else ''}{examples} of {data.name} "
        f"({data.split}), {len(data.class_names)} classes; {trainable:,} trainable parameters; "
        f"{accelerator.device.type}{processes}, precision {accelerator.mixed_precision}; "
        f"{config.training.steps} steps of {config.training.batch_size} images"
    )
