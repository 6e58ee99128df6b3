"""Shards of a prepared benchmark: some hundred images each, written by several processes, whole or not at all."""

import hashlib
import io
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from san_hf.files import new_file
from san_hf.images import pixel_limit, to_rgb
from san_hf.messages import join_some

from .benchmarks import BENCHMARKS, Benchmark, Source
from .benchmarks.base import UNKNOWN
from .errors import DataError


IMAGES_PER_SHARD = 500
ERRORS_TO_NAME = 20
# Rows are written so many at a time: what is held in memory, and what is read at once later.
ROWS_AT_ONCE = 50
FEATURES = Features({"image": ImageFeature(), "label": ImageFeature(), "file_name": Value("string")})
FINGERPRINT_KEY, ANNOTATED_KEY = b"san_hf.fingerprint", b"san_hf.annotated"
# Part of every fingerprint: to be raised when the same files are to become other shards.
FORM = 1


@dataclass(frozen=True)
class Shard:
    """Some images of a split, and the file they become."""

    benchmark: str
    file: Path
    sources: list[Source]
    fingerprint: str


def cut_into_shards(benchmark: Benchmark, split: str, sources: list[Source], staging: Path) -> list[Shard]:
    count = -(-len(sources) // IMAGES_PER_SHARD)
    shards = []
    for number in range(count):
        part = sources[number * IMAGES_PER_SHARD : (number + 1) * IMAGES_PER_SHARD]
        file = staging / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
        shards.append(Shard(benchmark.name, file, part, _fingerprint(benchmark.name, part)))
    return shards


def _fingerprint(name: str, sources: list[Source]) -> str:
    """Of what a shard is made of: files by name, size and time."""
    digest = hashlib.sha256(f"{name} {FORM}".encode())
    for source in sources:
        digest.update(repr(source.name).encode())
        for file in (source.image, source.labels):
            if isinstance(file, Path):
                status = file.stat()
                digest.update(f" {file.name} {status.st_size} {status.st_mtime_ns}".encode())
            else:
                digest.update(repr(file).encode())
    return digest.hexdigest()


def _is_finished(shard: Shard) -> bool:
    try:
        return pq.read_metadata(shard.file).metadata.get(FINGERPRINT_KEY) == shard.fingerprint.encode()
    # Not there, or cut short by a machine that lost its power.
    except (OSError, pa.ArrowInvalid):
        return False


def write_shards(shards: list[Shard], workers: int, progress: Callable[[int, int], None] | None) -> None:
    """
    Writes the shards that aren't there yet.

    Raises:
        DataError: images or labels are wrong; all are looked at first.
        OSError: the disk is full, or can't be written to.
    """
    total = sum(len(shard.sources) for shard in shards)
    rest = [shard for shard in shards if not _is_finished(shard)]
    resumed = total - sum(len(shard.sources) for shard in rest)
    report = progress or (lambda done, total: None)
    report(resumed, total)
    problems: list[str] = []
    workers = min(workers, len(rest))
    if workers <= 1:
        done = resumed
        for shard in rest:

            def count(number: int) -> None:
                nonlocal done
                done += number
                report(done, total)

            problems += write_shard(shard, count)
    else:
        # Not forked from this process, whose threads may hold locks.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        counter = context.Value("q", resumed)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
        try:
            waiting = {pool.submit(_write_shard_in_worker, shard) for shard in rest}
            while waiting:
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                report(counter.value, total)
                for future in ready:
                    problems += future.result()
            report(total, total)
        except BrokenProcessPool as error:
            raise DataError(
                "A process was killed, perhaps for want of memory. What is finished is kept: run this again with "
                "fewer workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    if problems:
        raise DataError(
            f"{len(problems)} of the images or their labels are wrong: {join_some(problems, ERRORS_TO_NAME)}. Get "
            "them again; what is finished is kept."
        )


# Of a worker: the counter of finished images that it shares with the others.
_counter: Any = None


def _start_worker(counter: Any) -> None:
    """Lets the worker count, and end when its parent does, which a killed parent can't tell it to."""
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard_in_worker(shard: Shard) -> list[str]:
    def count(number: int) -> None:
        with _counter.get_lock():
            _counter.value += number

    return write_shard(shard, count)


def write_shard(shard: Shard, count: Callable[[int], None]) -> list[str]:
    """
    Writes a shard, unless any of its images or labels is wrong.

    Args:
        shard: what to write.
        count: called with numbers of images that are done.

    Returns:
        What is wrong: a text for each image.
    """
    problems: list[str] = []
    try:
        with new_file(shard.file) as file:
            _write_rows(shard, file, problems, count)
            if problems:
                raise _BrokenShard
    except _BrokenShard:
        pass
    return problems


class _BrokenShard(Exception):
    """Not all of a shard's images can be used: nothing of it is kept."""


def _write_rows(shard: Shard, file: BinaryIO, problems: list[str], count: Callable[[int], None]) -> None:
    benchmark = BENCHMARKS[shard.benchmark]
    table, annotated = benchmark.label_table(), 0
    with pq.ParquetWriter(file, FEATURES.arrow_schema, compression="snappy") as writer:
        for start in range(0, len(shard.sources), ROWS_AT_ONCE):
            rows = []
            for source in shard.sources[start : start + ROWS_AT_ONCE]:
                try:
                    row, has_labels = _convert(source, benchmark, table)
                # A broken file makes its reader fail in many ways.
                except Exception as error:
                    problems.append(f"'{source.image}': {str(error) or type(error).__name__}")
                    continue
                annotated += has_labels
                rows.append(row)
            if not problems:
                writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
            count(len(shard.sources[start : start + ROWS_AT_ONCE]))
        writer.add_key_value_metadata({FINGERPRINT_KEY: shard.fingerprint, ANNOTATED_KEY: str(annotated)})


def _convert(source: Source, benchmark: Benchmark, table: np.ndarray) -> tuple[dict[str, Any], bool]:
    """A row, and whether any of its pixels has a label."""
    ignore_index = benchmark.ignore_index
    data = source.image.read_bytes()
    with pixel_limit(), Image.open(io.BytesIO(data)) as image:
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned and benchmark.upright else image
        size = upright.height, upright.width
        try:
            ids = benchmark.read_ids(source.labels, size)
        except Exception as error:
            raise ValueError(f"its labels can't be read: {str(error) or type(error).__name__}") from error
        if ids.shape != size:
            raise ValueError(f"is {size[1]} x {size[0]} pixels, its labels {ids.shape[1]} x {ids.shape[0]}")
        labels = table[np.where(ids < 0, len(table) - 1, np.minimum(ids, len(table) - 1))]
        if (wrong := labels == UNKNOWN).any():
            raise ValueError(f"its labels have the values {join_some(np.unique(ids[wrong]).tolist())}")
        smaller = _reduced_size(size, benchmark.shorter_side)
        if smaller != size or (turned and not benchmark.upright):
            data = _encode_photograph(reduce_image(np.asarray(to_rgb(upright)), smaller))
            labels = reduce_labels(labels, smaller)
    row = {
        "image": {"bytes": data, "path": source.name},
        "label": {"bytes": encode_labels(labels, ignore_index), "path": f"{Path(source.name).stem}.png"},
        "file_name": source.name,
    }
    return row, bool((labels != ignore_index).any())


def encode_labels(labels: np.ndarray, ignore_index: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8 if ignore_index == 255 else np.uint16)).save(stream, format="png")
    return stream.getvalue()


def _encode_photograph(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="jpeg", quality=95, subsampling=0)
    return stream.getvalue()


def _reduced_size(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """(height, width) with a shorter side of at most so many pixels."""
    if shorter_side is None or min(size) <= shorter_side:
        return size
    height, width = (round(side / min(size) * shorter_side) for side in size)
    return height, width


def reduce_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    Scales an image (H, W, 3) uint8 to a (height, width), bilinear between the four nearest pixels: as the original
    does it, without smoothing first, as Pillow would.
    """
    if pixels.shape[:2] == size:
        return pixels
    for axis, side in enumerate(size):
        position = np.clip((np.arange(side) + 0.5) * (pixels.shape[axis] / side) - 0.5, 0, pixels.shape[axis] - 1)
        low = position.astype(int)
        high = np.minimum(low + 1, pixels.shape[axis] - 1)
        weight = np.expand_dims((position - low).astype(np.float32), (1, 2) if axis == 0 else (0, 2))
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(high, axis) * weight
    return np.rint(pixels).astype(np.uint8)


def reduce_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales a label map (H, W) to a (height, width): each pixel takes the label at its upper left corner."""
    if labels.shape == size:
        return labels
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, labels.shape))
    return labels[rows][:, columns]
