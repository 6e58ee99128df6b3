"""Evaluation of a model on a data set: image by image, over any number of processes, and resumable."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import IterableDataset

from san_hf.data import DataError, SegmentationDataset
from san_hf.data.fingerprint import Fingerprint
from san_hf.devices import OUT_OF_MEMORY
from san_hf.evaluation.batches import BrokenExample, Example, ShapeBatches, computed_ahead, rows
from san_hf.evaluation.metrics import ConfusionMatrixMetrics, Results
from san_hf.evaluation.pictures import KeptExample, KeptExamples, draw_examples
from san_hf.evaluation.predictions import PredictionWriter, category_ids, encode_predictions, merge_predictions
from san_hf.evaluation.resume import (
    EvaluationError,
    EvaluationState,
    StateFile,
    evaluation_lock,
    model_checksum,
    writing_to,
)
from san_hf.files import json_text, remove_files
from san_hf.inference import Predictor, Vocabulary
from san_hf.inference.predictor import evaluation_mode
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.progress import progress_bar


PREDICTIONS_FILE = "predictions.json"
# In the folder of the state: a state and predictions for each process.
PROGRESS_FILES = ("[0-9]*.pt", "[0-9]*.jsonl")
PROGRESS_FOLDER = "progress"
_VOCABULARY_OPTIONS = ("expand", "synonyms", "average_synonyms", "threshold", "templates")


@dataclass(frozen=True)
class Evaluation(Results):
    """
    The metrics of a data set, and what else was found.

    Attributes:
        worst: (index, mIoU of the image alone in percent) of the images with the lowest, lowest first; as many as
            were asked for.
        random: indices of random images that aren't among the worst, as many as there are to draw.
        broken: what is wrong with each example that was left out, in the order of the examples.
        colors: those that the vocabulary has of its own, by class name.
        examples: those to draw, with their predictions, by index: see [`san_hf.evaluation.pictures.draw_kept`].
    """

    worst: list[tuple[int, float]] = field(default_factory=list)
    random: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    examples: dict[int, KeptExample] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationOptions:
    """
    Options of an evaluation.

    Attributes:
        batch_size: images at a time, of the same shape only, as padding would change what the model sees. The default,
            1, gives the same metrics to the last digit however the images are spread; with larger ones a pixel may
            differ, as sums of floats depend on how many are computed at once.
        workers: threads that read and resize images ahead; 0 for none.
        limit: only the first so many images.
        expand, synonyms, average_synonyms, threshold, templates: see [`Vocabulary.encode`].
        augment: see [`Predictor`].
        boundary: whether to measure boundaries, too: see [`ConfusionMatrixMetrics`].
        worst: how many of the worst images to name.
        pictures: how many of the worst and of random images to keep, with their predictions, for drawing.
        seed: of the random images.
        keep: indices of more examples to keep for drawing.
        skip_broken: go on without examples that can't be read, and list them, rather than stop at the first.
        output: a folder for "progress/", what `resume` needs, and the predictions.
        save_every: how many images of a process to lose at most when it is killed.
        resume: go on where an evaluation with the same `output`, the same settings, and as many processes was
            interrupted. Where there is nothing to go on from, it starts from the first image, as it does otherwise.
        predictions: whether to write `output`/predictions.json: see [`encode_predictions`] and [`merge_predictions`].
        progress: what to call the progress bar on standard error; `None` for no bar.

    Raises:
        ValueError: options that can't be.
    """

    batch_size: int = 1
    workers: int = 2
    limit: int | None = None
    expand: str | Sequence[str] | None = None
    synonyms: bool = False
    average_synonyms: bool = False
    threshold: float | None = None
    templates: str | Sequence[str] | None = None
    augment: bool = False
    boundary: bool = False
    worst: int = 0
    pictures: int = 0
    seed: int = 0
    keep: Sequence[int] = ()
    skip_broken: bool = False
    output: str | os.PathLike | None = None
    save_every: int = 100
    resume: bool = False
    predictions: bool = False
    progress: str | None = None

    def __post_init__(self) -> None:
        if self.predictions and self.output is None:
            raise ValueError("Predictions need an output folder: pass output.")
        too_low = min(self.batch_size, self.save_every) < 1 or min(self.workers, self.worst, self.pictures) < 0
        if too_low or (self.limit is not None and self.limit < 1):
            raise ValueError(
                "batch_size, save_every and limit must be at least 1, workers, worst and pictures at least 0."
            )


def evaluate(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    data: SegmentationDataset,
    *,
    accelerator: Accelerator | None = None,
    vocabulary: Vocabulary | str | os.PathLike | None = None,
    **options: Any,
) -> Evaluation:
    """
    Segments every image of a data set by the names of its classes, and compares with its label maps.

    Each process takes every n-th image; no image is counted twice, and counts of pixels are added up at the end: the
    number of processes changes no metric. Label maps and scores are never kept, but for the examples to draw.

    Args:
        model: unwrapped, on its device. Which of its parts are in training mode is as before afterwards.
        processor: the model's.
        data: a split of a data set; its class names are looked for, whatever vocabulary the model carries.
        accelerator: of a run of several processes, all of which call this; the model runs under its mixed precision.
        vocabulary: the data's class names, if they were encoded before, by this model as it is; or the file that
            [`Vocabulary.save`] wrote of them.
        **options: see [`EvaluationOptions`].

    Returns:
        The same in all processes.

    Raises:
        DataError: an example that can't be used, unless those are skipped. The state is saved before.
        EvaluationError: nothing to go on from that fits, no image at all, a model whose outputs aren't finite, too
            little memory, or a folder that can't be written.
        san_hf.locks.InUseError: another evaluation writes to that folder.
    """
    settings = EvaluationOptions(**options)
    with evaluation_mode(model):
        autocast = accelerator.autocast if accelerator else nullcontext
        predictor = Predictor(model, processor, augment=settings.augment, autocast=autocast)
        own = {name: value for name in _VOCABULARY_OPTIONS if (value := getattr(settings, name))}
        if not isinstance(vocabulary, Vocabulary) or own:
            vocabulary = predictor.vocabulary(data.class_names if vocabulary is None else vocabulary, **own)
        looked_for = vocabulary.class_names[: vocabulary.num_labels]
        if len(looked_for) != len(data.class_names):
            raise ValueError(
                f"The vocabulary has {len(looked_for)} classes, {data.name} has {len(data.class_names)}: "
                "expected the vocabulary of the data's class names."
            )
        for label, names in enumerate(zip(looked_for, data.class_names)):
            if names[0] != names[1]:
                raise ValueError(
                    f"The vocabulary's label {label} is {names[0]!r:.80}, that of {data.name} {names[1]!r:.80}: "
                    "expected the vocabulary of the data's class names, in their order."
                )
        return _Process(predictor, vocabulary, data, settings, accelerator).run()


class _Process:
    """The part of an evaluation that this process does: every n-th image."""

    def __init__(
        self,
        predictor: Predictor,
        vocabulary: Vocabulary,
        data: SegmentationDataset,
        options: EvaluationOptions,
        accelerator: Accelerator | None,
    ):
        self.predictor, self.vocabulary, self.data = predictor, vocabulary, data
        self.options, self.accelerator = options, accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.streamed = isinstance(data.dataset, IterableDataset)
        self.total = options.limit if self.streamed else min(len(data), options.limit or len(data))
        self.stop = 2**62 if self.total is None else self.total
        self.ids = category_ids(data.class_names)
        self.folder = None if options.output is None else Path(options.output)
        if self.folder is not None:
            self.fingerprint = Fingerprint(data)
        self.state = EvaluationState(self._new_metrics(options.boundary), self._new_kept())
        self.file: StateFile | None = None
        self.writer: PredictionWriter | None = None

    def run(self) -> Evaluation:
        with ExitStack() as stack:
            if self.folder is not None:
                self._open(self.folder, stack)
            try:
                self._count_images()
                self._save()
            except BaseException:
                self._forget_start()
                raise
            finally:
                if self.writer is not None:
                    self.writer.close()
            self._wait()
            if self.folder is not None and self.writer is not None:
                self._merge_predictions(self.folder)
            return self._collect()

    def _new_metrics(self, boundary: bool) -> ConfusionMatrixMetrics:
        device = self.predictor.model.device
        return ConfusionMatrixMetrics(len(self.data.class_names), self.data.ignore_index, boundary, device)

    def _new_kept(self) -> KeptExamples:
        options = self.options
        if options.pictures and self.streamed:
            raise ValueError("Random images can't be chosen from streamed data: leave pictures out.")
        order = np.random.default_rng(options.seed).permutation(self.stop).tolist() if options.pictures else []
        return KeptExamples(max(options.worst, options.pictures), options.pictures, order, options.keep)

    def _open(self, folder: Path, stack: ExitStack) -> None:
        """Makes the output ready, for a new evaluation or to go on with one; locked while `stack` is open."""
        with writing_to(folder):
            progress = folder / PROGRESS_FOLDER
            if self.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(evaluation_lock(folder))
                if not self.options.resume:
                    remove_files(progress, PROGRESS_FILES)
                progress.mkdir(parents=True, exist_ok=True)
                # Predictions that no state has led to are of another evaluation.
                if not all((progress / f"{other}.pt").exists() for other in range(self.world)):
                    (folder / PREDICTIONS_FILE).unlink(missing_ok=True)
            self._wait()
            self.file = StateFile(progress / f"{self.rank}.pt", self._settings())
            self.file.load(self.state)
            if self.state.examples != self._fingerprint_of_done():
                raise EvaluationError(
                    f"'{folder}' is of other images: of those that were counted already, some have changed. Evaluate "
                    "from the start, without resuming."
                )
            if self.options.predictions and not (folder / PREDICTIONS_FILE).exists():
                state = self.state
                self.writer = PredictionWriter(
                    progress / f"{self.rank}.jsonl", state.predictions_size, state.predictions_checksum
                )

    def _fingerprint_of_done(self) -> str | None:
        done = range(self.rank, self.rank + self.state.done * self.world, self.world)
        return self.fingerprint.of_examples(done) if self.state.done else None

    def _forget_start(self) -> None:
        """Where nothing was counted yet, nothing refuses another attempt."""
        if self.folder is not None and not self.state.done:
            progress = self.folder / PROGRESS_FOLDER
            for name in (f"{self.rank}.pt", f"{self.rank}.jsonl"):
                (progress / name).unlink(missing_ok=True)
            with suppress(OSError):  # other processes have counted something
                progress.rmdir()

    def _settings(self) -> dict[str, Any]:
        """All that the state depends on."""
        data, options, model = self.data, self.options, self.predictor.model
        templates = options.templates
        return {
            "processes": self.world,
            "batch size": options.batch_size,
            "data set": [data.name, data.split, self.total, list(data.class_names), data.ignore_index],
            "label shift": data.label_shift,
            "fingerprint of the data set": self.fingerprint.facts,
            "model": model_checksum(model, self.predictor.processor),
            "dtype": str(model.dtype),
            "expansion": options.expand,
            "synonyms": options.synonyms,
            "averaged synonyms": options.average_synonyms,
            "threshold": options.threshold,
            "words, templates and text tower": self._vocabulary_digest(),
            "templates": templates if templates is None or isinstance(templates, str) else list(templates),
            "augmentation": options.augment,
            "boundaries": options.boundary,
            "predictions": options.predictions,
            "worst images": options.worst,
            "images to draw": [options.pictures, options.seed, sorted(options.keep)],
        }

    def _vocabulary_digest(self) -> str:
        facts = {name: value for name, value in self.vocabulary.facts().items() if name != "colors"}
        return hashlib.sha256(json_text(facts).encode("utf-8", "surrogatepass")).hexdigest()

    def _count_images(self) -> None:
        state, options = self.state, self.options
        batches = ShapeBatches(options.batch_size, self._segment)
        remaining = rows(self.data, range(self.rank + state.done * self.world, self.stop, self.world))
        bar = progress_bar(hidden=options.progress is None or self.rank > 0)
        with bar, computed_ahead(self._prepare, remaining, options.workers) as examples:
            task = bar.add_task(
                options.progress or "", total=self.total, completed=min(state.done * self.world, self.stop), speed=""
            )
            started, before = bar.get_time(), state.done
            for example in examples:
                if isinstance(example, Example):
                    batches.add(example)
                elif options.skip_broken:
                    state.broken.append((example.index, str(example.error)))
                else:
                    batches.finish()
                    self._save()
                    raise example.error
                state.done += 1
                if state.done % options.save_every == 0:
                    batches.finish()
                    self._save()
                speed = (state.done - before) * self.world / max(bar.get_time() - started, 1e-9)
                bar.update(task, completed=min(state.done * self.world, self.stop), speed=f"{speed:.2f} images/s")
            batches.finish()

    def _prepare(self, index: int, row: dict[str, Any]) -> Example | BrokenExample:
        try:
            image, label_map, name = self.data.example(row, index)
        except DataError as error:
            return BrokenExample(index, error)
        return Example(index, name, image, label_map, self.predictor.prepare(image))

    def _segment(self, examples: list[Example]) -> None:
        try:
            label_maps = self.predictor([example.inputs for example in examples], self.vocabulary)
        except (ValueError, *OUT_OF_MEMORY) as error:
            names = ", ".join(example.name for example in examples)
            advice = "out of memory: try a batch size of 1, bfloat16, or another device."
            reason = f"{error}" if isinstance(error, ValueError) else advice
            raise EvaluationError(f"{self.data.name}: {names}: {reason}") from error
        for example, prediction in zip(examples, label_maps):
            self._count(example, prediction)

    def _count(self, example: Example, prediction: torch.Tensor) -> None:
        state = self.state
        if not state.kept.needs_scores:
            state.metrics.update(prediction, example.label_map)
        else:
            own = self._new_metrics(self.options.boundary)
            own.update(prediction, example.label_map)
            state.metrics.merge(own)
            score = own.compute().metrics["mIoU"]
            if state.kept.offer(example.index, score):
                kept = KeptExample.of(
                    example.index, example.name, example.image, example.label_map, prediction.cpu().numpy(), score
                )
                state.kept.keep(kept)
        if self.folder is not None and self.writer is not None:
            entries = encode_predictions(prediction.cpu().numpy(), self.ids, example.name)
            with writing_to(self.folder):
                self.writer.write(example.index, entries)

    def _save(self) -> None:
        if self.folder is None or self.file is None:
            return
        with writing_to(self.folder):
            if self.writer is not None:
                self.state.predictions_size = self.writer.flush()
                self.state.predictions_checksum = self.writer.checksum
            self.state.examples = self._fingerprint_of_done()
            self.file.save(self.state)

    def _merge_predictions(self, folder: Path) -> None:
        parts = [folder / PROGRESS_FOLDER / f"{other}.jsonl" for other in range(self.world)]
        if self.rank == 0:
            with writing_to(folder):
                merge_predictions(parts, folder / PREDICTIONS_FILE)
        self._wait()
        os.unlink(parts[self.rank])

    def _collect(self) -> Evaluation:
        """The metrics over all processes."""
        metrics, kept, broken = self.state.metrics, self.state.kept, self.state.broken
        if self.accelerator is not None:
            metrics.reduce(self.accelerator)
            broken = gather_object(broken)
            all_kept = gather_object([kept])
            kept = self._new_kept()
            kept.merge(all_kept)
        messages = [message for _, message in sorted(broken)]
        if not metrics.num_images:
            raise EvaluationError(
                f"{self.data.name}: none of the images of {self.data.split} could be used"
                + (f", the first because: {messages[0]}" if messages else ".")
            )
        worst, random = kept.worst_first(), kept.random_first()
        wanted = {index for index, _ in worst} | {*random} | {*self.options.keep}
        return Evaluation(
            **vars(metrics.compute(self.data.class_names)),
            worst=worst,
            random=random,
            broken=messages,
            colors=self.vocabulary.colors,
            examples={index: example for index, example in kept.examples.items() if index in wanted},
        )

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


__all__ = ["Evaluation", "EvaluationError", "EvaluationOptions", "draw_examples", "evaluate"]
