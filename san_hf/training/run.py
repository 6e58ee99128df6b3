"""One training run: its folder, its parts, and all that happens between the steps."""

import math
import sys
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from san_hf.colors import parse_color, read_colors
from san_hf.data import SegmentationDataset
from san_hf.data.fingerprint import Fingerprint
from san_hf.devices import warn_of_threads
from san_hf.evaluation.evaluator import Evaluation, evaluate
from san_hf.evaluation.pictures import draw_kept
from san_hf.files import new_file
from san_hf.hub import push_folder, save_pretrained
from san_hf.hub.push import RUN_PICTURE, name_for_others
from san_hf.inference import Vocabulary
from san_hf.launcher import end_with_launcher
from san_hf.messages import one_line
from san_hf.modeling import SANForSemanticSegmentation
from san_hf.paths import expand_path

from .augmentation import TrainingTransform
from .checkpoint import leave_out_clip, list_checkpoints, load_checkpoint, note_evaluation, save_checkpoint
from .collator import SegmentationCollator
from .config import ConfigError, EvaluationSection, TrainingConfig
from .data import load_training_data
from .errors import TrainingError
from .folder import RunFolder
from .model import build_model, check_base, check_start, set_vocabulary, trains_text
from .optimization import parameter_groups, polynomial_schedule
from .processes import check_launch, check_shared, new_shared_folder, on_main_process
from .run_card import card_facts, measured
from .run_log import RunLog, check_trackers
from .sharding import check_engine, is_spread, keep_loading_whole, prepare_for_engine, whole_model
from .stream import SampleStream, build_loader


class Run:
    """
    A run, ready to train: new, or as its last checkpoint left it. Called by every process.

    Args:
        config: see [`TrainingConfig`].
        folder: of the run, not opened yet.
        resume: whether to go on with the run in it.

    Attributes:
        accelerator, config, output: what trains, how, and where to.
        progress: what a checkpoint knows beside the states: "step", "evaluated" (the step of the last evaluation),
            "best" (step and mIoU), "run" (the run's id), "config", "data", "epoch_length".
        saved: the step of the last checkpoint.
        data, validation: what to train and to evaluate on.
        model: as Accelerate wraps it; `processor`: the model's.
        optimizer, scheduler, loader: the optimiser, its learning rate, endless batches.
        text_inputs: token ids of the class names, where the text tower is trained; else nothing.

    Raises:
        ConfigError, DataError, TrainingError, CheckpointError: see [`san_hf.training.loop.train`].
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder, resume: bool):
        self.config = config
        self.output = folder.path
        check_trackers(config.logging.trackers)
        end_with_launcher()
        self.accelerator = self._start_accelerator()
        check_engine(self.accelerator)
        check_launch(self.accelerator, config)
        keep_loading_whole(self.accelerator)
        progress = on_main_process(self.accelerator, lambda: folder.open(resume))
        check_shared(self.accelerator, self.output)
        set_seed(config.seed)

        check_start(config.model)
        self.colors = read_own_colors(config.evaluation)
        self.data, self.validation = load_training_data(config.data, config.seed)
        model, self.processor = build_model(config.model, self.data)
        if config.checkpoints.adapter_only:
            check_base(model, config.model, config.hub.repo)
            leave_out_clip(self.accelerator)
        if config.training.gradient_checkpointing:
            # The older name goes once setup.py asks for a transformers that has the newer one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.stream = self._build_stream(progress)
        prepare_for_engine(
            self.accelerator,
            model,
            self.stream.batch_size // self.accelerator.num_processes,
            config.optimizer.max_grad_norm,
        )
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay, config.optimizer.clip_learning_rate),
            lr=config.optimizer.learning_rate,
        )
        scheduler = polynomial_schedule(
            optimizer, config.training.steps, config.optimizer.power, config.optimizer.warmup_steps
        )
        transform = TrainingTransform(**config.augmentation.model_dump(), ignore_index=self.data.ignore_index)
        collator = SegmentationCollator(self.processor, self.data.ignore_index)
        self.loader = build_loader(self.stream, transform, collator, config.data.workers)
        self.trains_text = trains_text(model)
        self.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        # Again: what DeepSpeed is told of accumulation holds from here on.
        check_launch(self.accelerator, config)
        self.text_inputs: dict[str, torch.Tensor] = {}
        if self.trains_text:
            text = self.processor(text=self.data.class_names, return_tensors="pt")
            self.text_inputs = dict(text.to(self.accelerator.device))
        self._vocabulary: Vocabulary | None = None

        if progress is None:
            self.progress: dict[str, Any] = {"step": 0, "evaluated": 0, "best": None, "run": uuid.uuid4().hex[:8]}
        else:
            self.progress = progress
            on_main_process(self.accelerator, self._check_data)
            has_clip = is_spread(self.accelerator) or not config.checkpoints.adapter_only
            load_checkpoint(self.accelerator, list_checkpoints(self.output)[-1], has_clip=has_clip)
        self.progress["config"] = config.model_dump()
        self.saved = self.step
        self._lost_steps = on_main_process(self.accelerator, lambda: folder.begin(progress))

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(self.data)

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.progress["step"]

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.config.training.steps

    @property
    def evaluates_now(self) -> bool:
        """Whether an evaluation follows the last step."""
        due = self.step % self.config.evaluation.every == 0 or self.step == self.steps
        return due and self.validation is not None and self.step > self.progress["evaluated"]

    @property
    def saves_now(self) -> bool:
        """Whether a checkpoint follows the last step."""
        due = self.step % self.config.checkpoints.every == 0 or self.step == self.steps or self.evaluates_now
        return due and self.step > self.saved

    def open_log(self) -> RunLog:
        """The run's log, for `with`."""
        self.log = RunLog(
            self.accelerator,
            self.output,
            self.config.logging,
            self.progress["config"],
            self.progress["run"],
            self.step,
            self.steps,
            evaluates_again=self.evaluates_now,
        )
        return self.log

    def describe(self) -> str:
        """The first line of a run."""
        data, config, accelerator = self.data, self.config, self.accelerator
        examples = f"{len(data)} images" if hasattr(data.dataset, "__len__") else "a stream of images"
        processes = f" x {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
        return (
            f"{f'Continuing after step {self.step}: ' if self.step else 'Training: '}{examples} of {data.name} "
            f"({data.split}), {len(data.class_names)} classes; {self.trainable:,} trainable parameters; "
            f"{accelerator.device.type}{processes}, precision {accelerator.mixed_precision}; "
            f"{self.steps} steps of {config.training.batch_size} images"
            + (f". The log lacks {self._lost_steps} of the steps taken before" if self._lost_steps else "")
            + f"\n{warn_of_threads(accelerator.device)}".rstrip()
        )

    def save(self) -> None:
        """Writes a checkpoint."""
        self.log.flush()
        self.progress["epoch_length"] = self.stream.epoch_length
        if self.accelerator.is_main_process:
            self.progress["data"] = self._data_facts(self.step)
        save_checkpoint(self.accelerator, self.output, self.progress, self.config.checkpoints.keep)
        self.saved = self.step

    def evaluate(self, log: RunLog) -> None:
        """Measures the model, notes the metrics, and keeps the model if it is the best so far."""
        validation, config = self.validation, self.config
        if validation is None:
            return
        started = time.perf_counter()
        best = self.progress["best"]
        model = whole_model(self.accelerator, self.model)
        drawn = self._examples_to_draw(validation)
        bar = "Evaluating" if self.accelerator.is_main_process and sys.stderr.isatty() else None
        results = evaluate(
            model,
            self.processor,
            validation,
            accelerator=self.accelerator,
            vocabulary=self._vocabulary_for(model, validation),
            limit=config.evaluation.limit,
            keep=drawn,
            progress=bar,
        )
        miou = results.metrics["mIoU"]
        # There is none where nothing has a label.
        is_best = not math.isnan(miou) and (best is None or miou > best["mIoU"])
        self.progress["evaluated"] = self.step
        self.progress["results"] = measured(config, validation, results.metrics, results.num_images)
        if is_best:
            self.progress["best"] = {"step": self.step, "mIoU": miou}
            if self.trains_text:
                set_vocabulary(model, self.processor, self.data.class_names)
            self._save_model(self.output / "best", model, self._card_facts(model))
        log.evaluation(self.step, results.metrics, time.perf_counter() - started, is_best)
        if drawn:
            on_main_process(self.accelerator, lambda: self._draw(results, drawn, validation, log, is_best))
        # Everything that tells of it is written: a resumed run makes no second one.
        log.flush()
        on_main_process(self.accelerator, lambda: note_evaluation(list_checkpoints(self.output)[-1], self.progress))

    def finish(self, log: RunLog) -> Path:
        """Writes the final model, and pushes it."""
        model = whole_model(self.accelerator, self.model)
        if self.trains_text:
            set_vocabulary(model, self.processor, self.data.class_names)
        folder, repository = self.output / "final", self.config.hub.repo
        self._save_model(folder, model, self._card_facts(model))
        log.say(f"Wrote {folder}.")
        log.say(self._describe_best())
        if repository is not None:
            log.say(f"Pushed to {on_main_process(self.accelerator, lambda: self._push(repository))}.")
        return folder

    def _start_accelerator(self) -> Accelerator:
        config = self.config
        try:
            return Accelerator(
                mixed_precision=config.training.mixed_precision,
                gradient_accumulation_steps=config.training.gradient_accumulation,
                log_with=config.logging.trackers or None,
                project_dir=str(self.output),
                step_scheduler_with_optimizer=False,
            )
        except (ValueError, ImportError, RuntimeError) as error:
            precision = config.training.mixed_precision
            raise ConfigError(
                f"Accelerate can't begin, with training.mixed_precision={precision}: {one_line(error)}."
            ) from error

    def _describe_best(self) -> str:
        if best := self.progress["best"]:
            return (
                f"Best on the validation data: step {best['step']}, mIoU {best['mIoU']:.2f}, in {self.output / 'best'}."
            )
        if self.validation is None:
            return "There is no best/: data.validation_split is null, so that nothing was evaluated."
        return (
            "There is no best/: no pixel of the images evaluated, those of "
            f"{self.validation.name} ({self.validation.split}), has a label, so that there is no mIoU."
        )

    def _data_facts(self, step: int) -> dict[str, Any]:
        """What tells the data from others: of all examples their names, of those used in so many steps all."""
        drawn = self.stream.drawn(self.config.training.batch_size * step)
        facts = {**self._fingerprint.facts, "examples used so far": self._fingerprint.of_examples(drawn)}
        if self.validation is not None and self.progress["evaluated"]:
            facts["validation data"] = Fingerprint(self.validation).facts
        return facts

    def _check_data(self) -> None:
        """
        Raises:
            ConfigError: the data aren't those that the run was started with.
        """
        now = self._data_facts(self.step)
        # What an earlier version of this package did not note can't be compared.
        for name, was in self.progress["data"].items():
            if name in now and now[name] != was:
                raise ConfigError(
                    f"The data have changed since the run was started: {name} differ"
                    # Checksums tell nobody anything.
                    + (
                        f", they were {was!r:.200} and are {now[name]!r:.200} now"
                        if isinstance(was, int | list)
                        else ""
                    )
                    + ". Bring back the data as they were, or start a new run in another output."
                )

    def _build_stream(self, progress: dict[str, Any] | None) -> SampleStream:
        config, data, accelerator = self.config, self.data, self.accelerator
        batch_size = config.training.batch_size // config.training.gradient_accumulation
        if batch_size < accelerator.num_processes:
            raise ConfigError(
                f"training.batch_size ({config.training.batch_size}) gives {batch_size} images at a time for "
                f"{accelerator.num_processes} processes: expected at least one for each."
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

    def _vocabulary_for(self, model: SANForSemanticSegmentation, data: SegmentationDataset) -> Vocabulary | None:
        """The validation data's class names, encoded once in the run; None while the text tower changes."""
        if self.trains_text:
            return None
        if self._vocabulary is None:
            if data.class_names == self.data.class_names:
                self._vocabulary = Vocabulary.of_model(model)
            else:
                self._vocabulary = Vocabulary.encode(
                    model, self.processor, data.class_names, autocast=self.accelerator.autocast
                )
        return self._vocabulary

    def _examples_to_draw(self, validation: SegmentationDataset) -> list[int]:
        """The same few validation images after each evaluation, evenly spread over those that are evaluated."""
        if not self.config.evaluation.pictures or self.config.data.streaming:
            return []
        total = min(len(validation), self.config.evaluation.limit or len(validation))
        count = min(self.config.evaluation.pictures, total)
        return [number * total // count for number in range(count)]

    def _draw(
        self, results: Evaluation, drawn: list[int], validation: SegmentationDataset, log: RunLog, best: bool
    ) -> None:
        titles = {index: results.examples[index].name for index in drawn}
        columns = {f"step {self.step}": results.examples}
        picture = draw_kept(columns, titles, validation.class_names, validation.ignore_index, self.colors)
        folder = self.output / "pictures"
        folder.mkdir(exist_ok=True)
        for path in (folder / f"step-{self.step:08d}.png", *([self.output / RUN_PICTURE] if best else [])):
            with new_file(path) as file:
                picture.save(file, format="png")
        log.picture(self.step, picture)

    def _save_model(self, folder: Path, model: SANForSemanticSegmentation, facts: dict[str, Any]) -> None:
        """Writes a complete model folder, or nothing."""
        try:
            with new_shared_folder(self.accelerator, folder) as temporary:
                if self.accelerator.is_main_process:
                    name = name_for_others(folder)
                    adapter_only = self.config.checkpoints.adapter_only
                    save_pretrained(
                        model, self.processor, temporary, facts=facts, model_id=name, adapter_only=adapter_only
                    )
        # A full disk has many names, see save_checkpoint.
        except Exception as error:
            raise TrainingError(
                f"The model can't be written to '{folder}': {one_line(error)}. The checkpoints are kept: make room and "
                "continue with --resume."
            ) from error

    def _push(self, repository: str) -> str:
        """Pushes what `san-hf push` does; returns its address."""
        hub = self.config.hub
        picture = self.output / RUN_PICTURE if hub.picture and (self.output / RUN_PICTURE).is_file() else None
        try:
            commit = push_folder(self.output, repository, private=hub.private, picture=picture)
        except Exception as error:  # networks fail in many ways
            raise TrainingError(
                f"{one_line(error)}. The model is complete in '{self.output}': san-hf push {self.output} {repository}"
            ) from error
        return commit.commit_url

    def _card_facts(self, model: SANForSemanticSegmentation) -> dict[str, Any]:
        # Results of these very weights; checkpoints of earlier versions have none.
        results = self.progress.get("results") if self.progress["evaluated"] == self.step else None
        title = self.output.resolve().name
        return card_facts(self.config, model.config, title, self.step, self.data, results)


def read_own_colors(section: EvaluationSection) -> dict[str, tuple[int, int, int]]:
    """
    Colours by class name, for drawings.

    Raises:
        ConfigError: a colour that is none, or a file that can't be read.
    """
    given = section.colors or {}
    try:
        if isinstance(given, str):
            return read_colors(expand_path(given))
        return {name: parse_color(color, name) for name, color in given.items()}
    except ValueError as error:
        raise ConfigError(f"evaluation.colors can't be used: {error}") from error
