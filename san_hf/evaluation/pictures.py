"""Examples that are drawn after an evaluation, with the predictions that it made."""

import heapq
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from san_hf.colors import Color
from san_hf.data import SegmentationDataset
from san_hf.evaluation.metrics import ConfusionMatrixMetrics
from san_hf.inference.predictor import Predictor, evaluation_mode
from san_hf.legend import numbered_names, numbers_note
from san_hf.messages import notify
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.visualization import COMPARISON_SIZE, Comparison, draw_comparisons


@dataclass(frozen=True)
class KeptExample:
    """
    An example with its prediction, at the size at which it is drawn.

    Attributes:
        index: in the data set.
        name: of the file.
        image: (h, w, 3) uint8.
        label_map: (h, w) int32.
        prediction: (h, w) int32.
        score: mIoU of this image alone, in percent; nan where nothing has a label.
    """

    index: int
    name: str
    image: torch.Tensor
    label_map: torch.Tensor
    prediction: torch.Tensor
    score: float

    @classmethod
    def of(
        cls, index: int, name: str, image: Image.Image, label_map: np.ndarray, prediction: np.ndarray, score: float
    ) -> "KeptExample":
        """From an image and label maps of its size."""
        return cls(
            index,
            name,
            _shrink(image, Image.Resampling.BICUBIC),
            _shrink(Image.fromarray(label_map.astype(np.int32)), Image.Resampling.NEAREST),
            _shrink(Image.fromarray(prediction.astype(np.int32)), Image.Resampling.NEAREST),
            score,
        )


class KeptExamples:
    """
    Chooses, image by image, the examples to draw: the worst ones, random ones, and given ones.

    Args:
        num_worst: how many of those with the lowest mIoU.
        num_random: how many others.
        order: a random order of all indices; the first ones that can be read and are not among the worst are chosen.
        indices: of examples that are kept in any case.
    """

    def __init__(self, num_worst: int = 0, num_random: int = 0, order: Sequence[int] = (), indices: Sequence[int] = ()):
        self.num_worst, self.num_random, self.indices = num_worst, num_random, frozenset(indices)
        self.rank = {index: rank for rank, index in enumerate(order)}
        # Heaps whose root is the first to be dropped: (-mIoU, index), (-rank, index).
        self.worst: list[tuple[float, int]] = []
        self.random: list[tuple[int, int]] = []
        self.examples: dict[int, KeptExample] = {}

    @property
    def needs_scores(self) -> bool:
        return bool(self.num_worst or self.num_random or self.indices)

    def offer(self, index: int, score: float) -> bool:
        """Takes note of an image and its mIoU (nan for none); whether it is to be kept, for now."""
        dropped = []
        if self.num_worst and not np.isnan(score):
            dropped += _push(self.worst, (-score, index), self.num_worst)
        if self.num_random:
            # Some of them may turn out to be among the worst.
            dropped += _push(self.random, (-self.rank[index], index), self.num_random + self.num_worst)
        wanted = self.wanted
        for other in dropped:
            if other not in wanted:
                self.examples.pop(other, None)
        return index in wanted

    @property
    def wanted(self) -> set[int]:
        return {index for _, index in self.worst} | {index for _, index in self.random} | self.indices

    def keep(self, example: KeptExample) -> None:
        self.examples[example.index] = example

    def merge(self, others: Sequence["KeptExamples"]) -> None:
        """Takes in what other processes have seen."""
        for other in others:
            for negative_score, index in other.worst:
                _push(self.worst, (negative_score, index), self.num_worst)
            for negative_rank, index in other.random:
                _push(self.random, (negative_rank, index), self.num_random + self.num_worst)
            self.examples |= other.examples

    def worst_first(self) -> list[tuple[int, float]]:
        """(index, mIoU) of the worst images, lowest first."""
        return [(index, -negative_score) for negative_score, index in sorted(self.worst, reverse=True)]

    def random_first(self) -> list[int]:
        """Indices of the random images that aren't among the worst, in the random order."""
        worst = {index for _, index in self.worst}
        in_order = [index for _, index in sorted(self.random, reverse=True)]
        return [index for index in in_order if index not in worst][: self.num_random]

    def state_dict(self) -> dict[str, Any]:
        examples = [vars(example) for example in self.examples.values()]
        return {"worst": list(self.worst), "random": list(self.random), "examples": examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.worst, self.random = list(state["worst"]), list(state["random"])
        self.examples = {facts["index"]: KeptExample(**facts) for facts in state["examples"]}


def draw_kept(
    columns: dict[str, dict[int, KeptExample]],
    titles: dict[int, str],
    class_names: Sequence[str],
    ignore_index: int,
    colors: Mapping[str, Color] | None = None,
) -> Image.Image:
    """
    Draws examples that evaluations have kept, a row for each: image, ground truth, and for each model its prediction
    and its errors, with the image's own mIoU. Names that no font can write are drawn as numbers; a notice lists them.

    Args:
        columns: each model's examples by their index, by what to call the model.
        titles: what to write over each example, by its index, in the order of the rows.
        class_names: names of the labels.
        ignore_index: value of unlabelled pixels.
        colors: by class name, for classes that are to have their own: see [`san_hf.colors.name_colors`].
    """
    first = next(iter(columns.values()))
    comparisons = [
        Comparison(
            title=title,
            image=Image.fromarray(first[index].image.numpy()),
            label_map=first[index].label_map.numpy(),
            predictions={model: examples[index].prediction.numpy() for model, examples in columns.items()},
            scores={model: examples[index].score for model, examples in columns.items()},
        )
        for index, title in titles.items()
    ]
    if numbered := numbered_names(class_names):
        notify(numbers_note(numbered))
    return draw_comparisons(comparisons, class_names, ignore_index, given_colors=colors)


def draw_examples(
    models: dict[str, tuple[SANForSemanticSegmentation, SANProcessor]],
    data: SegmentationDataset,
    indices: Sequence[int],
    titles: Sequence[str] | None = None,
    *,
    augment: bool = False,
    autocast: Any = nullcontext,
    **options: Any,
) -> Image.Image:
    """
    Draws the predictions of models for some examples, see [`draw_kept`].

    Args:
        models: model and processor by what to call them.
        data: not streamed.
        indices: of the examples.
        titles: what to write over each example; its name by default.
        augment, autocast: see [`Predictor`].
        **options: of [`san_hf.inference.Vocabulary.encode`].
    """
    examples = {index: data[index] for index in indices}
    columns: dict[str, dict[int, KeptExample]] = {}
    for title, (model, processor) in models.items():
        with evaluation_mode(model):
            predictor = Predictor(model, processor, augment=augment, autocast=autocast)
            vocabulary = predictor.vocabulary(data.class_names, **options)
            columns[title] = {}
            for index, (image, label_map, name) in examples.items():
                (prediction,) = predictor([image], vocabulary)
                metrics = ConfusionMatrixMetrics(len(data.class_names), data.ignore_index, device=prediction.device)
                metrics.update(prediction, label_map)
                score = metrics.compute().metrics["mIoU"]
                columns[title][index] = KeptExample.of(index, name, image, label_map, prediction.cpu().numpy(), score)
    names = [name for _, _, name in examples.values()] if titles is None else titles
    return draw_kept(columns, dict(zip(examples, names)), data.class_names, data.ignore_index, options.get("colors"))


def _push(heap: list, entry: tuple, size: int) -> list[int]:
    """Puts an entry onto a heap of at most so many; the indices of those that are no longer on it."""
    if size == 0:
        return []
    if len(heap) < size:
        heapq.heappush(heap, entry)
        return []
    return [heapq.heappushpop(heap, entry)[1]]


def _shrink(image: Image.Image, resample: Image.Resampling) -> torch.Tensor:
    """The image at the size of comparisons."""
    scale = COMPARISON_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return torch.from_numpy(np.array(image.resize(size, resample)))
