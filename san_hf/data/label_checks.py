"""Label maps that can be read but can't be meant, found by looking at some of them."""

from collections.abc import Iterator
from itertools import islice

import datasets
import numpy as np

from san_hf.messages import join_some, notify

from .dataset import SegmentationDataset
from .errors import DataError


# So many label maps, evenly spread, are looked at, and of a stream the first of them.
_LABEL_MAPS_TO_SEE = 256
_STREAMED_TO_SEE = 8
# What a mask in black and white has for white.
_WHITE = 255


def check_labels(data: SegmentationDataset, *, prepared: bool, ignore_is_meant: bool) -> None:
    """
    Looks at some label maps: there must be a label, and masks of 0 and 255 for two classes are refused where 255 would
    stand for none. Classes that never occur while the ignore index does are warned of.

    Args:
        data: what to look at.
        prepared: whether `san-hf prepare` made it, so that one label is enough.
        ignore_is_meant: whether the user gave the ignore index.

    Raises:
        DataError: there is no label, they can't be meant, or the first label maps can't be read.
    """
    streamed = isinstance(data.dataset, datasets.IterableDataset)
    if streamed and prepared:
        return
    count = _STREAMED_TO_SEE if streamed else min(len(data), _LABEL_MAPS_TO_SEE)
    occurs, ignored = np.zeros(len(data.class_names), dtype=bool), False
    looked_at = 0
    for label_map in _label_maps(data, count):
        looked_at += 1
        labels = label_map[label_map != data.ignore_index]
        ignored = ignored or labels.size < label_map.size
        occurs |= np.bincount(labels, minlength=len(occurs)) > 0
        if occurs.all() or (prepared and occurs.any()):
            return
    if streamed:
        some = f"the first {looked_at} examples"
    elif looked_at == len(data):
        some = f"the {looked_at} examples"
    else:
        some = f"{looked_at} of the {len(data)} examples"
    if not occurs.any():
        if streamed:
            return
        raise DataError(
            f"{data.name}: no pixel of {some} of {data.split} has a label: all are {data.ignore_index}, which stands "
            "for none. Check the label files, the ignore index and the shift of the labels."
        )
    if ignored:
        _check_absent(data, occurs, some, ignore_is_meant)


def _check_absent(data: SegmentationDataset, occurs: np.ndarray, some: str, ignore_is_meant: bool) -> None:
    absent = [name for name, present in zip(data.class_names, occurs) if not present]
    as_stored = data.palette is None and not data.label_shift
    black_and_white = as_stored and data.ignore_index == _WHITE and occurs[0] and not occurs[1:].any()
    if not absent:
        return
    if black_and_white and len(occurs) == 2 and not ignore_is_meant:
        raise DataError(
            f"{data.name}: the label maps of {data.split} have only 0 and {_WHITE}, which stands for no label, so that "
            f"{absent[0]!r} never occurs ({some}). If {_WHITE} means {absent[0]!r}, give label_palette=binary; if it "
            f"means no label, say so by ignore_index={_WHITE}."
        )
    hint = f" Masks in black and white need a label_palette, a file that says what {_WHITE} means." * bool(
        black_and_white
    )
    notify(
        f"{data.name}: classes that never occur in {some} of {data.split}, while {data.ignore_index}, which stands for "
        f"no label, does: {join_some(map(repr, absent))}.{hint}"
    )


def _label_maps(data: SegmentationDataset, count: int) -> Iterator[np.ndarray]:
    """Label maps, evenly spread or the first. After one with a label, those that can't be read are left to others."""
    if isinstance(data.dataset, datasets.IterableDataset):
        for index, row in enumerate(islice(data.dataset, count)):
            try:
                yield data.label_map(row, index)
            except DataError:
                continue
        return
    labelled = False
    for number in range(count):
        index = number * len(data) // count
        row = data.dataset[index]
        try:
            # As a whole, so that what is wrong with all of the data shows here.
            label_map = data.label_map(row, index) if labelled else data.example(row, index)[1]
        except DataError:
            if labelled:
                continue
            raise
        labelled = labelled or bool((label_map != data.ignore_index).any())
        yield label_map
