"""Parts of data sets: splits by name and slice, a share set aside for validation, and images that two parts share."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute

from san_hf.messages import join_some, notify

from .errors import DataError


if TYPE_CHECKING:
    from .dataset import SegmentationDataset

# What a folder's "train" and "validation" may also be called, as for `datasets`.
OTHER_NAMES = {"train": ("training",), "validation": ("val", "valid", "dev")}
# Bytes at the start, the middle and the end of a file: two files of equal size that differ are told apart by these
# alone, but for few.
_SAMPLE = 2048


def take_split(split: str, known: Collection[str], open_split: Callable[[str], Any], where: str, hint: str = "") -> Any:
    """
    A split, or parts of splits, in the notation of `datasets`: "train", "train[:80%]", "train[:10]+validation".

    Args:
        split: what is asked for.
        known: names of the splits there are.
        open_split: gives the data set of a name.
        where: the source, for errors.
        hint: what to do, for the error of an unknown split.

    Raises:
        DataError: no such split, or a part that can't be understood, or of streamed data.
    """
    if split in known:
        return open_split(split)
    names = split_names(split)
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"{where} has no split {unknown[0]!r}, expected one of {', '.join(known)}.{hint}")
    opened = {name: open_split(name) for name in names}
    if any(isinstance(dataset, datasets.IterableDataset) for dataset in opened.values()):
        raise DataError(f"{where} is streamed, so that {split!r} can't be taken: expected one of {', '.join(known)}.")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(dataset) for name, dataset in opened.items()}
        )
    # Of slices that are no slices, there are ValueErrors, TypeErrors and AssertionErrors.
    except Exception as error:
        raise DataError(
            f"The split {split!r} of {where} can't be understood: expected a name, one of {', '.join(known)}, or a "
            f"part of one, such as {names[0]}[:80%] or {names[0]}[100:200]."
        ) from error
    taken = [opened[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def split_names(split: str) -> list[str]:
    """The names in "train[:10]+validation"."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def set_aside(
    data: "SegmentationDataset", share: float, seed: int
) -> "tuple[SegmentationDataset, SegmentationDataset]":
    """
    Divides a data set, by image: the same whenever it is called with the same data and seed, and rows with the same
    image stay together.

    Args:
        data: what to divide; not streamed.
        share: of the images for validation, between 0 and 1; at least one image.
        seed: of the choice.

    Returns:
        The rest, for training, and the share, for validation; both in the order of `data`.

    Raises:
        DataError: the data are streamed, the share is none, or there is only one image.
    """
    if not 0 < share < 1:
        raise DataError(f"The share for validation is {share:g}, expected a number between 0 and 1, such as 0.1.")
    if isinstance(data.dataset, datasets.IterableDataset):
        raise DataError(
            f"{data.name} is streamed: a share for validation can only be set aside where all images are known. Leave "
            "streaming out, or name a split for validation."
        )
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(_image_keys(data)):
        groups[key].append(index)
    if len(groups) < 2:
        raise DataError(f"{data.name}: {data.split} has one image only, of which no share can be set aside.")
    names = _names(data)
    counts = Counter(names)

    def rank(indices: list[int]) -> bytes:
        name = names[indices[0]]
        # The order of the rows matters only where names don't tell them apart.
        text = name if counts[name] == 1 else f"{name}\0{indices[0]}"
        return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()

    wanted = max(1, round(share * len(data)))
    chosen: list[int] = []
    for group in sorted(groups.values(), key=rank)[:-1]:
        if len(chosen) >= wanted:
            break
        chosen += group
    inside = set(chosen)
    rest = [index for index in range(len(data)) if index not in inside]
    return (
        replace(data, dataset=data.dataset.select(rest), split=f"{data.split} without {share:g} (seed {seed})"),
        replace(data, dataset=data.dataset.select(sorted(inside)), split=f"{share:g} of {data.split} (seed {seed})"),
    )


def check_disjoint(training: "SegmentationDataset", validation: "SegmentationDataset", allow: bool = False) -> None:
    """
    Compares two data sets by their images' files, byte for byte. Streamed ones are compared by name and split alone.

    Args:
        training, validation: what to compare.
        allow: whether a shared image is a warning rather than an error.

    Raises:
        DataError: they share an image.
    """
    if any(isinstance(data.dataset, datasets.IterableDataset) for data in (training, validation)):
        if (training.name, training.split) != (validation.name, validation.split):
            return
        message = f"{training.name}: training and validation are the same split, {training.split!r}."
    else:
        keys = _image_keys(training, validation)
        known = set(keys[: len(training)])
        shared = [index for index, key in enumerate(keys[len(training) :]) if key in known]
        if not shared:
            return
        names = _names(validation)
        message = (
            f"{len(shared)} of the {len(validation)} validation images of {validation.name} ({validation.split}) are "
            f"training images, too: {join_some((names[index] for index in shared), 5)}."
        )
    if allow:
        notify(message)
    else:
        raise DataError(
            f"{message} Validate on another split, on a part (train[80%:] beside train[:80%]) or on a share that is "
            "set aside (data.validation_split=0.1), or allow it by data.shared_images=warn."
        )


def _names(data: "SegmentationDataset") -> list[str]:
    if "file_name" in (data.dataset.column_names or ()):
        return [str(name) for name in data.dataset["file_name"]]
    return [f"{data.split}[{index}]" for index in range(len(data))]


def _image_keys(*parts: "SegmentationDataset") -> list[Any]:
    """
    A key for each row of these data sets, equal where the images are. Files are read only where others have their
    size, and as a whole only where others have the same beginning, middle and end, too.
    """
    rows = [(data.dataset, index) for data in parts for index in range(len(data))]
    keys: list[tuple] = [(size,) for data in parts for size in _image_sizes(data.dataset)]
    for digest in (_sample_digest, _digest):
        counts = Counter(keys)
        for position, key in enumerate(keys):
            if counts[key] > 1 and key[0] is not None:
                dataset, index = rows[position]
                keys[position] = (*key, digest(dataset[index]["image"]))
    # What has no size is no file: nothing is known about it.
    return [(position,) if key[0] is None else key for position, key in enumerate(keys)]


def _image_sizes(dataset: datasets.Dataset) -> list[int | None]:
    """Bytes of each image's file; None where it is none."""
    sizes: list[int | None] = []
    for table in dataset.select_columns(["image"]).with_format("arrow").iter(1000):
        column = table["image"]
        if not {"bytes", "path"} <= {child.name for child in getattr(column.type, "fields", [])}:
            sizes += [None] * len(column)
            continue
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        for length, path in zip(lengths, paths):
            if length is None and path and os.path.isfile(path):
                length = os.path.getsize(path)
            sizes.append(length)
    return sizes


def _sample_digest(image: dict[str, Any]) -> bytes:
    content, path = image["bytes"], image["path"]
    if content is not None:
        middle = len(content) // 2
        return hashlib.sha256(content[:_SAMPLE] + content[middle : middle + _SAMPLE] + content[-_SAMPLE:]).digest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for position in (0, os.path.getsize(path) // 2, max(0, os.path.getsize(path) - _SAMPLE)):
            file.seek(position)
            digest.update(file.read(_SAMPLE))
    return digest.digest()


def _digest(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).digest()
    return hashlib.sha256(Path(image["path"]).read_bytes()).digest()
