"""Examples on their way to the model: read ahead by threads, and collected into batches of one shape."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from datasets import IterableDataset
from PIL import Image

from san_hf.data import DataError, SegmentationDataset
from san_hf.inference import PreparedImage


T = TypeVar("T")


@dataclass
class Example:
    """
    An image with its label map.

    Attributes:
        index: in the data set.
        name: of the file.
        image: upright, 8-bit RGB.
        label_map: (H, W) int32.
        inputs: the model's inputs for the image.
    """

    index: int
    name: str
    image: Image.Image
    label_map: np.ndarray
    inputs: PreparedImage


@dataclass
class BrokenExample:
    """An example that can't be used, and why."""

    index: int
    error: DataError


class ShapeBatches:
    """
    Collects examples by the shape of the model's inputs, and hands on each batch as soon as it is full.

    Args:
        size: examples in a batch.
        function: takes a batch.
    """

    def __init__(self, size: int, function: Callable[[list[Example]], None]):
        self.size, self.function = size, function
        self.waiting: dict[tuple, list[Example]] = defaultdict(list)

    def add(self, example: Example) -> None:
        shape = example.inputs.shape
        self.waiting[shape].append(example)
        if len(self.waiting[shape]) == self.size:
            self.function(self.waiting.pop(shape))
        elif sum(map(len, self.waiting.values())) == 8 * self.size:
            # Of many shapes few may ever make a whole batch.
            self.function(self.waiting.pop(max(self.waiting, key=lambda shape: len(self.waiting[shape]))))

    def finish(self) -> None:
        """Hands on what is left, in smaller batches."""
        while self.waiting:
            self.function(self.waiting.popitem()[1])


def rows(data: SegmentationDataset, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and row, not decoded, of some examples of a data set, which may be streamed."""
    if isinstance(data.dataset, IterableDataset):
        for index, row in enumerate(islice(data.dataset, indices.stop)):
            if index in indices:
                yield index, row
    else:
        for index in indices:
            yield index, data.dataset[index]


@contextmanager
def computed_ahead(function: Callable[..., T], items: Iterable[tuple], workers: int) -> Iterator[Iterator[T]]:
    """The function's results for the items, in their order, computed ahead by so many threads; 0 for none."""
    if not workers:
        yield (function(*item) for item in items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[T]] = deque()

        def results() -> Iterator[T]:
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
