"""Predictions in the format of COCO-Stuff's owners: a run-length code per label and image, in one JSON file."""

import heapq
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from san_hf.evaluation.resume import EvaluationError
from san_hf.files import json_text, new_file
from san_hf.inference.exchange import encode_mask
from san_hf.json_files import parse_json
from san_hf.vocabularies import load_class_ids, load_vocabulary


def category_ids(class_names: Sequence[str]) -> list[int]:
    """Category id of each label in predictions: for COCO-Stuff's classes their ids, otherwise the labels themselves."""
    if list(class_names) == load_vocabulary("coco-stuff"):
        return load_class_ids("coco-stuff")
    return list(range(len(class_names)))


def encode_predictions(label_map: np.ndarray, ids: Sequence[int], name: str) -> list[dict]:
    """
    One image's predictions.

    Args:
        label_map: (H, W) integers; those of `len(ids)` and above are none of the classes, and left out.
        ids: the category id of each label.
        name: of the image's file.

    Returns:
        For each label that occurs "file_name", "category_id", and "segmentation", a run-length code of COCO's:
        {"size": [H, W], "counts": text}.
    """
    entries = []
    for label in np.unique(label_map[label_map < len(ids)]).tolist():
        code = encode_mask(label_map == label)
        entries.append({"file_name": name, "category_id": ids[label], "segmentation": code})
    return entries


class PredictionWriter:
    """
    One process's predictions, a line for each image, written as they come.

    Args:
        path: of the file.
        size: what of it counts, in bytes, if an earlier run was interrupted; what follows is dropped.
        checksum: of what counts.

    Attributes:
        checksum: of all that was written, as of `zlib.crc32`.

    Raises:
        OSError: the file can't be written.
        EvaluationError: what counts of it isn't what was written.
    """

    def __init__(self, path: str | os.PathLike, size: int = 0, checksum: int = 0):
        self.path, self.checksum = path, 0
        self.file = open(path, "r+b" if size else "wb")
        left = size
        while left and (part := self.file.read(min(left, 1 << 22))):
            left, self.checksum = left - len(part), zlib.crc32(part, self.checksum)
        if left or self.checksum != checksum:
            self.file.close()
            problem = "has lost its end" if left else "is damaged: its checksum isn't that of what was written"
            raise EvaluationError(f"'{path}' {problem}. Evaluate from the start, without resuming.")
        self.file.truncate(size)

    def write(self, index: int, entries: list[dict]) -> None:
        line = json_text([index, entries]).encode("utf-8") + b"\n"
        self.file.write(line)
        self.checksum = zlib.crc32(line, self.checksum)

    def flush(self) -> int:
        """Sees to it that everything is on the disk; returns the file's size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:  # what wasn't flushed doesn't count
            pass


def merge_predictions(parts: Sequence[Path], output: Path) -> None:
    """
    Makes one JSON list of all processes' files, in the order of the images; it appears at once when complete.

    Each entry also gets an "image_id": the file's name as a number, "000000000139.jpg" -> 139, if that tells all
    images apart; otherwise the image's index.
    """
    numbers = [_file_number(entries[0]["file_name"]) for part in parts for _, entries in _read(part) if entries]
    numbered = None not in numbers and len(set(numbers)) == len(numbers)
    with new_file(output) as file:
        separator = "["
        for index, entries in heapq.merge(*map(_read, parts), key=lambda line: line[0]):
            for entry in entries:
                image_id = _file_number(entry["file_name"]) if numbered else index
                line = json_text({"image_id": image_id, **entry})
                file.write(f"{separator}\n{line}".encode())
                separator = ","
        file.write(b"\n]\n" if separator == "," else b"[]\n")


def _file_number(name: str) -> int | None:
    stem = Path(name).stem
    return int(stem) if stem.isascii() and stem.isdecimal() else None


def _read(part: Path) -> Iterator[list]:
    with open(part, encoding="utf-8") as file:
        for line in file:
            yield parse_json(line, f"'{part}'")
