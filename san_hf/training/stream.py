"""The order in which training sees its data: an endless stream of samples that depends on nothing but the seed.

Sample n of the stream is always the same image with the same augmentation, whatever the number of worker processes,
training processes or interruptions; a run is resumed by starting at another n.
"""

import signal
from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from san_hf.data import DataError, SegmentationDataset

from .augmentation import TrainingTransform
from .collator import SegmentationCollator


class SampleStream:
    """
    Batches of samples (n, index, row), as this process is to have them: of each batch of all processes it takes every
    `num_processes`-th.

    Args:
        data: what to draw from. All of it is drawn, in a random order, before anything is drawn again. Where it is
            streamed, the order is random within a buffer, and each process reads through the whole.
        seed: of the order.
        batch_size: samples in a batch of all processes.
        first: number n of the first sample.
        shuffle_buffer: size of the buffer for streamed data.
        epoch_length: how many examples streamed data have, if that is known.
    """

    def __init__(
        self,
        data: SegmentationDataset,
        seed: int,
        batch_size: int,
        first: int = 0,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1000,
        epoch_length: int | None = None,
    ):
        self.data, self.seed, self.batch_size, self.first = data, seed, batch_size, first
        self.process_index, self.num_processes = process_index, num_processes
        self.shuffle_buffer = shuffle_buffer
        self.streaming = isinstance(data.dataset, datasets.IterableDataset)
        self.epoch_length = epoch_length if self.streaming else len(data)

    def drawn(self, count: int) -> list[int]:
        """Indices of the examples that are among the first `count` samples, each once; none of streamed data."""
        if self.streaming:
            return []
        length = len(self.data)
        return _permutation(self.seed, 0, length)[: min(count, length)].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int, dict[str, Any] | None]]]:
        samples = self._read() if self.streaming else self._draw()
        while True:
            batch = list(islice(samples, self.batch_size))
            yield batch[self.process_index :: self.num_processes]

    def _draw(self):
        length = len(self.data)
        for number in count(self.first):
            epoch, position = divmod(number, length)
            yield number, int(_permutation(self.seed, epoch, length)[position]), None

    def _read(self):
        shuffled = self.data.dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        # While the length is unknown, the first pass is not over.
        epoch, start = divmod(self.first, self.epoch_length) if self.epoch_length else (0, self.first)
        number = self.first
        while True:
            shuffled.set_epoch(epoch)
            length = 0
            for index, row in enumerate(shuffled):
                length += 1
                if index >= start:
                    yield number, index, row
                    number += 1
            if length <= start:
                raise DataError(
                    f"{self.data.name}: {self.data.split} had {length} examples this time, expected more than {start}: "
                    "has it changed?"
                )
            self.epoch_length, epoch, start = length, epoch + 1, 0


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


class AugmentedSamples(Dataset):
    """Decodes and augments samples of a [`SampleStream`]. An example that can't be used comes as its `DataError`."""

    def __init__(self, data: SegmentationDataset, transform: TrainingTransform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, sample: tuple[int, int, dict[str, Any] | None]) -> dict[str, Any] | DataError:
        number, index, row = sample
        try:
            image, label_map, name = self.data.example(self.data.dataset[index] if row is None else row, index)
        # Returned rather than raised: errors of workers come with a stack trace in their message.
        except DataError as error:
            return error
        # 1: not the generator that the order comes from.
        pixels, labels = self.transform(image, label_map, np.random.default_rng([self.seed, number, 1]))
        return {"image": pixels, "label_map": labels, "name": name}


class Batches:
    """Makes a batch of examples, or hands on the first error among them."""

    def __init__(self, collator: SegmentationCollator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any] | DataError]) -> dict[str, Any] | DataError:
        usable = []
        for example in examples:
            if isinstance(example, DataError):
                return example
            usable.append(example)
        return {**self.collator(usable), "names": [example["name"] for example in usable]}


def build_loader(
    stream: SampleStream, transform: TrainingTransform, collator: SegmentationCollator, workers: int
) -> DataLoader:
    """Batches without end: of `pixel_values` (B, 3, H, W), `labels` (B, H, W) and `names`, or a DataError each."""
    return DataLoader(
        AugmentedSamples(stream.data, transform, stream.seed),
        batch_sampler=stream,
        collate_fn=Batches(collator),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(_worker: int) -> None:
    # Those that stop a run go to all its processes, but the last batches are still wanted. Workers end with the run.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
