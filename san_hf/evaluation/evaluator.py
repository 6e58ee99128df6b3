"""A model's figures on a data set: image by image, over any number of processes, and resumable."""

import heapq
import io
import os
import shutil
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import IterableDataset
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from san_hf.data import DataError, SegmentationDataset
from san_hf.evaluation.metrics import Results, SegmentationMetrics
from san_hf.evaluation.predictions import PredictionWriter, category_ids, encode_predictions, merge_predictions
from san_hf.inference import Predictor, PreparedImage
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.visualization import Comparison, draw_comparisons


PREDICTIONS_FILE = "predictions.json"
OUT_OF_MEMORY = "out of memory: try a batch size of 1, bfloat16, or another device."


class EvaluationError(ValueError):
    """An evaluation that can't be made or continued; the message says why, and what to do."""


@dataclass(frozen=True)
class Evaluation(Results):
    """
    The figures, and what else came up.

    Attributes:
        worst: (index, mIoU of the image alone in percent) of the images with the lowest, lowest first; as many as
            were asked for.
        broken: what is wrong with each example that was left out, in the order of the examples.
    """

    worst: list[tuple[int, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def evaluate(
    model: SANForSemanticSegmentation,
    processor: SANProcessor,
    data: SegmentationDataset,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 1,
    workers: int = 2,
    limit: int | None = None,
    expand: str | None = None,
    synonyms: bool = False,
    templates: str | Sequence[str] | None = None,
    augment: bool = False,
    boundary: bool = False,
    worst: int = 0,
    skip_broken: bool = False,
    output: str | os.PathLike | None = None,
    save_every: int = 100,
    resume: bool = False,
    predictions: bool = False,
    progress: str | None = None,
) -> Evaluation:
    """
    Segments every image of a data set by the names of its classes, and compares.

    Each process takes every n-th image, none twice, and counts of pixels are added up at the end: the number of
    processes changes no figure. Label maps and scores are never kept.

    Args:
        model: unwrapped, on its device. Which of its parts are in training mode is as before afterwards.
        processor: the model's.
        data: a split of a data set; its class names are looked for, whatever vocabulary the model carries.
        accelerator: of a run of several processes, all of which call this; the model runs under its mixed precision.
        batch_size: images at a time, of the same size only, as padding would change what the model sees. The default,
            1, gives the same figures to the last digit however the images are spread; with larger ones a pixel may
            differ, as sums of floats depend on how many are computed at once.
        workers: threads that read and resize images ahead; 0 for none.
        limit: only the first so many images.
        expand, synonyms, templates, augment: see [`Predictor`] and [`Vocabulary`].
        boundary: whether to measure boundaries, too: see [`SegmentationMetrics`].
        worst: how many of the worst images to name.
        skip_broken: go on without examples that can't be read, and list them, rather than stop at the first.
        output: a folder for "progress/", what `resume` needs, and the predictions.
        save_every: how many images of a process to lose at most when it is killed.
        resume: go on where an evaluation with the same `output`, the same settings, and as many processes was
            interrupted. Where there is nothing to go on from, it starts anew, as it always does otherwise.
        predictions: whether to write `output`/predictions.json: see [`encode_predictions`] and [`merge_predictions`].
        progress: what to call the progress bar on standard error; `None` for no bar.

    Returns:
        The same in all processes.

    Raises:
        DataError: an example that can't be used, unless those are skipped. The state is saved before.
        EvaluationError: nothing to go on from that fits, no image at all, a model whose outputs aren't finite, too
            little memory, or a folder that can't be written.
    """
    if predictions and output is None:
        raise ValueError("Predictions need an output folder: pass output.")
    if min(batch_size, save_every) < 1 or workers < 0 or worst < 0 or (limit is not None and limit < 1):
        raise ValueError("batch_size, save_every and limit must be at least 1, workers and worst at least 0.")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    streamed = isinstance(data.dataset, IterableDataset)
    total = limit if streamed else min(len(data), limit or len(data))
    stop = 2**62 if total is None else total

    with _evaluation_mode(model):
        autocast = accelerator.autocast if accelerator else nullcontext
        predictor = Predictor(model, processor, augment=augment, autocast=autocast)
        vocabulary = predictor.vocabulary(data.class_names, expand=expand, synonyms=synonyms, templates=templates)
        state = _State(SegmentationMetrics(len(data.class_names), data.ignore_index, boundary, model.device), worst)
        store = writer = None
        if output is not None:
            folder = Path(output)
            settings = {
                "processes": world,
                "batch size": batch_size,
                "data set": [data.name, data.split, total, list(data.class_names), data.ignore_index],
                "label shift": data.label_shift,
                # Of the files' paths, or of the cache that they were read into, and the columns: it is the same in
                # another process. Streams have none.
                "fingerprint of the data set": None if streamed else data.dataset._fingerprint,
                "model": _checksum(model, processor),
                "dtype": str(model.dtype),
                "expansion": expand,
                "synonyms": synonyms,
                "templates": templates if templates is None or isinstance(templates, str) else list(templates),
                "augmentation": augment,
                "boundaries": boundary,
                "predictions": predictions,
                "worst images": worst,
            }
            with _writing(folder):
                if rank == 0:
                    if not resume:
                        shutil.rmtree(folder / "progress", ignore_errors=True)
                    (folder / "progress").mkdir(parents=True, exist_ok=True)
                    # Predictions that no state has led to are of another evaluation.
                    if not all((folder / "progress" / f"{other}.pt").exists() for other in range(world)):
                        (folder / PREDICTIONS_FILE).unlink(missing_ok=True)
                wait()
                store = _Store(folder / "progress" / f"{rank}.pt", settings)
                store.load(state)
                if predictions and not (folder / PREDICTIONS_FILE).exists():
                    writer = PredictionWriter(folder / "progress" / f"{rank}.jsonl", state.predictions_size)

        def save() -> None:
            if store is not None:
                with _writing(folder):
                    if writer is not None:
                        state.predictions_size = writer.flush()
                    store.save(state)

        ids = category_ids(data.class_names)

        def segment(examples: list["_Example"]) -> None:
            try:
                label_maps = predictor([example.inputs for example in examples], vocabulary)
            except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
                names = ", ".join(example.name for example in examples)
                reason = f"{error}" if isinstance(error, ValueError) else OUT_OF_MEMORY
                raise EvaluationError(f"{data.name}: {names}: {reason}") from error
            for example, prediction in zip(examples, label_maps):
                state.count(example.index, prediction, example.label_map)
                if writer is not None:
                    entries = encode_predictions(prediction.cpu().numpy(), ids, example.name)
                    with _writing(folder):
                        writer.write(example.index, entries)

        def prepare(index: int, row: dict[str, Any]) -> "_Example":
            try:
                image, label_map, name = data.example(row, index)
            except DataError as error:
                return _Example(index, error=error)
            return _Example(index, name, predictor.prepare(image), torch.from_numpy(label_map))

        waiting = _Batches(batch_size, segment)
        rows = _rows(data, range(rank + state.done * world, stop, world))
        bar = _progress_bar(progress if rank == 0 else None)
        try:
            with bar, _ahead(prepare, rows, workers) as examples:
                task = bar.add_task(progress or "", total=total, completed=min(state.done * world, stop), speed="")
                started, before = bar.get_time(), state.done
                for example in examples:
                    if example.error is None:
                        waiting.add(example)
                    elif skip_broken:
                        state.broken.append((example.index, str(example.error)))
                    else:
                        waiting.finish()
                        save()
                        raise example.error
                    state.done += 1
                    if state.done % save_every == 0:
                        waiting.finish()
                        save()
                    speed = (state.done - before) * world / max(bar.get_time() - started, 1e-9)
                    bar.update(task, completed=min(state.done * world, stop), speed=f"{speed:.2f} images/s")
                waiting.finish()
            save()
        finally:
            if writer is not None:
                writer.close()

    wait()
    if writer is not None:
        if rank == 0:
            parts = [folder / "progress" / f"{other}.jsonl" for other in range(world)]
            with _writing(folder):
                merge_predictions(parts, folder / PREDICTIONS_FILE)
        wait()
        os.unlink(folder / "progress" / f"{rank}.jsonl")
    metrics = state.metrics
    broken, worst_images = state.broken, state.worst
    if accelerator is not None:
        metrics.reduce(accelerator)
        broken, worst_images = gather_object(broken), gather_object(worst_images)
    broken = [message for _, message in sorted(broken)]
    if not metrics.num_images:
        raise EvaluationError(
            f"{data.name}: none of the images of {data.split} could be used"
            + (f", the first because: {broken[0]}" if broken else ".")
        )
    worst_images = [(index, -score) for score, index in sorted(worst_images, reverse=True)[:worst]]
    return Evaluation(**vars(metrics.compute(data.class_names)), worst=worst_images, broken=broken)


def draw_examples(
    models: dict[str, tuple[SANForSemanticSegmentation, SANProcessor]],
    data: SegmentationDataset,
    indices: Sequence[int],
    titles: Sequence[str] | None = None,
    **options: Any,
) -> Image.Image:
    """
    A picture of what models make of some examples, a row for each: image, ground truth, and for each model its
    prediction and its errors, with the image's own mIoU.

    Args:
        models: model and processor by what to call them.
        data: not streamed.
        indices: of the examples.
        titles: what to write over each example; its name by default.
        **options: of [`Predictor`] and [`Vocabulary`].
    """
    examples = [data[index] for index in indices]
    columns: dict[str, list[tuple[np.ndarray, float]]] = {}
    for title, (model, processor) in models.items():
        with _evaluation_mode(model):
            of_predictor = {name: options.pop(name) for name in ("augment", "autocast") if name in options}
            predictor = Predictor(model, processor, **of_predictor)
            vocabulary = predictor.vocabulary(data.class_names, **options)
            columns[title] = []
            for image, label_map, _ in examples:
                (prediction,) = predictor([image], vocabulary)
                metrics = SegmentationMetrics(len(data.class_names), data.ignore_index, device=prediction.device)
                metrics.update(prediction, label_map)
                columns[title].append((prediction.cpu().numpy(), metrics.compute().metrics["mIoU"]))
    comparisons = [
        Comparison(
            title=name if titles is None else titles[row],
            image=image,
            label_map=label_map,
            predictions={title: column[row][0] for title, column in columns.items()},
            scores={title: column[row][1] for title, column in columns.items()},
        )
        for row, (image, label_map, name) in enumerate(examples)
    ]
    return draw_comparisons(comparisons, data.class_names, data.ignore_index)


@dataclass
class _Example:
    """An image with its label map, or what is wrong with it."""

    index: int
    name: str = ""
    inputs: PreparedImage | None = None
    label_map: torch.Tensor | None = None
    error: DataError | None = None


class _Batches:
    """Collects examples by their shape, and hands them on as soon as there is a batch of one."""

    def __init__(self, size: int, function: Callable[[list[_Example]], None]):
        self.size, self.function = size, function
        self.waiting: dict[tuple, list[_Example]] = defaultdict(list)

    def add(self, example: _Example) -> None:
        shape = example.inputs.shape
        self.waiting[shape].append(example)
        if len(self.waiting[shape]) == self.size:
            self.function(self.waiting.pop(shape))
        elif sum(map(len, self.waiting.values())) == 8 * self.size:
            # Of many shapes few may ever make a whole batch.
            self.function(self.waiting.pop(max(self.waiting, key=lambda shape: len(self.waiting[shape]))))

    def finish(self) -> None:
        while self.waiting:
            self.function(self.waiting.popitem()[1])


class _State:
    """What a process knows after the first `done` of its images."""

    def __init__(self, metrics: SegmentationMetrics, num_worst: int):
        self.metrics, self.num_worst = metrics, num_worst
        self.done = 0
        self.broken: list[tuple[int, str]] = []  # with the index
        self.worst: list[tuple[float, int]] = []  # a heap of (-mIoU, index)
        self.predictions_size = 0

    def count(self, index: int, prediction: torch.Tensor, label_map: torch.Tensor) -> None:
        if not self.num_worst:
            self.metrics.update(prediction, label_map)
            return
        total = self.metrics
        own = SegmentationMetrics(total.num_labels, total.ignore_index, total.boundary, total.device)
        own.update(prediction, label_map)
        total.merge(own)
        score = own.compute().metrics["mIoU"]
        if not np.isnan(score):
            heapq.heappush(self.worst, (-score, index))
            # The heap's root is the lowest of -mIoU: the best of them.
            if len(self.worst) > self.num_worst:
                heapq.heappop(self.worst)

    def state_dict(self) -> dict[str, Any]:
        metrics = {key: v.cpu() if torch.is_tensor(v) else v for key, v in self.metrics.state_dict().items()}
        facts = {key: getattr(self, key) for key in ("done", "broken", "worst", "predictions_size")}
        return facts | {"metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics.load_state_dict(state["metrics"])
        for key in ("done", "broken", "worst", "predictions_size"):
            setattr(self, key, state[key])


class _Store:
    """The file with a process's state, which is complete whenever it is there."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def save(self, state: _State) -> None:
        partial, content = self.path.with_suffix(".part"), io.BytesIO()
        # torch.save into a file would turn a full disk's error into one of its own.
        torch.save({"settings": self.settings, "state": state.state_dict()}, content)
        with open(partial, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def load(self, state: _State) -> None:
        """
        Raises:
            EvaluationError: the file can't be read, or is of other settings.
        """
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = saved["settings"]
        # Broken files make torch fail in ways of its own.
        except Exception as error:
            raise EvaluationError(f"'{self.path}' can't be read: {error}. Evaluate anew, without resuming.") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                was, now = (f"{setting!s:.100}" for setting in (settings.get(name), value))
                difference = f"; it was {was} and is {now} now" if was != now else ""
                raise EvaluationError(
                    f"'{self.path.parent}' is of another evaluation: the {name} differs{difference}. Use the same "
                    "options, or evaluate anew, without resuming."
                )
        state.load_state_dict(saved["state"])


def _checksum(model: SANForSemanticSegmentation, processor: SANProcessor) -> str:
    """Changes with any weight and with the processor's settings."""
    checksum = zlib.crc32(repr(sorted(processor.to_dict().items(), key=str)).encode())
    for tensor in model.state_dict().values():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a process's share of it
        values = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def _rows(data: SegmentationDataset, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
    if isinstance(data.dataset, IterableDataset):
        for index, row in enumerate(islice(data.dataset, indices.stop)):
            if index in indices:
                yield index, row
    else:
        for index in indices:
            yield index, data.dataset[index]


@contextmanager
def _ahead(function: Callable, items: Iterable[tuple], workers: int) -> Iterator[Iterator]:
    """The function's results for the items, in their order, computed ahead by threads."""
    if not workers:
        yield (function(*item) for item in items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()

        def results() -> Iterator:
            for item in items:
                pending.append(pool.submit(function, *item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EvaluationError(
            f"Can't write to '{folder}': {error.strerror or error}. What was noted before is kept: resume from it once "
            "this is mended."
        ) from error


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _progress_bar(description: str | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=description is None,
    )
