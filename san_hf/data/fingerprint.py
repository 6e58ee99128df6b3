"""Fingerprint of a data set: whether work that was interrupted goes on with the data it was begun with."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np

from .dataset import SegmentationDataset


# Of a file, so many bytes at its start and at its end, and its size: a PNG has checksums of its contents there, and in
# other compressed files a change moves or changes what follows.
BYTES_AT_EACH_END = 32768
READERS = 8


class Fingerprint:
    """
    What tells a data set from another one. It doesn't depend on where the files lie.

    Args:
        data: the data set. Of a streamed one only the first example is looked at.

    Attributes:
        facts: what has to stay the same from the start to the end, by what to call it: the number of examples, the
            classes, the ignore index, the shift of the labels, the files' names in their order.
    """

    def __init__(self, data: SegmentationDataset):
        self.data = data
        self.streamed = isinstance(data.dataset, datasets.IterableDataset)
        self._digests: dict[int, int] = {}
        names, first = None, None
        if self.streamed:
            first = next((f"{_digest_example(row):08x}" for row in data.dataset), None)
        elif "file_name" in data.dataset.column_names:
            names = _hash(str(name) for name in data.dataset["file_name"])
        self.facts: dict[str, Any] = {
            "examples": None if self.streamed else len(data),
            "class_names": list(data.class_names),
            "ignore_index": data.ignore_index,
            "label_shift": data.label_shift,
            "label_palette": None
            if data.palette is None
            else [data.palette.codes.tolist(), data.palette.labels.tolist()],
            "file names": names,
            "first example": first,
        }

    def of_examples(self, indices: Iterable[int]) -> str | None:
        """
        Changes with the images and label maps at these indices. Each is read once. None for streamed data.

        What was used has to stay as it was; what was not yet, such as a broken file that stopped the work, may change.
        """
        if self.streamed:
            return None
        wanted = list(indices)
        missing = sorted({*wanted} - self._digests.keys())
        with ThreadPoolExecutor(READERS) as readers:
            rows = (self.data.dataset[index] for index in missing)
            self._digests.update(zip(missing, readers.map(_digest_example, rows)))
        return _hash(f"{self._digests[index]:08x}" for index in wanted)


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _digest_example(row: dict[str, Any]) -> int:
    return _digest(row["label"], _digest(row["image"], 0))


def _digest(value: Any, digest: int) -> int:
    """Checksum of an image as `datasets` has it undecoded, {"bytes", "path"}, or of an array."""
    content = value.get("bytes") if isinstance(value, dict) else None
    if content is not None:
        ends = content[:BYTES_AT_EACH_END] + content[-BYTES_AT_EACH_END:]
        return zlib.crc32(ends, zlib.crc32(str(len(content)).encode(), digest))
    if not isinstance(value, dict):
        return zlib.crc32(np.ascontiguousarray(value).tobytes() if value is not None else b"", digest)
    path = value.get("path") or ""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = zlib.crc32(str(size).encode(), digest)
            start = file.read(BYTES_AT_EACH_END)
            file.seek(max(size - BYTES_AT_EACH_END, 0))
            return zlib.crc32(start + file.read(BYTES_AT_EACH_END), digest)
    except OSError:  # what reads it for its pixels says so
        return zlib.crc32(path.encode("utf-8", "surrogatepass"), digest)
