"""
From a benchmark's files to one form: parquet files that `datasets` loads, with what describes them.

The work is cut into shards of some hundred images. A finished shard appears under its name all at once, in a hidden
folder of the output; when all are there, they become the output. A run that was interrupted at any moment finds its
shards again by what they were made of.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, Value
from datasets import Image as ImageFeature
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from PIL import Image, ImageOps

from san_hf.images import to_rgb
from san_hf.messages import join_some
from san_hf.version import __version__

from .benchmarks import BENCHMARKS, Benchmark
from .errors import DataError
from .layouts import LAYOUTS, UNKNOWN, Source, label_table
from .loading import METADATA_FILE


STAGING_FOLDER = ".unfinished"
IMAGES_PER_SHARD = 500
# Rows are written so many at a time: what is held in memory, and what is read at once later.
_ROWS_AT_ONCE = 50
_FEATURES = Features({"image": ImageFeature(), "label": ImageFeature(), "file_name": Value("string")})
_FINGERPRINT, _ANNOTATED = b"san_hf.fingerprint", b"san_hf.annotated"
# Part of every fingerprint: to be raised when the same files are to become other shards.
_FORM = 1
_ERRORS_TO_NAME = 20


@dataclass(frozen=True)
class Shard:
    """Some images of a split, and the file they become."""

    benchmark: str
    file: Path
    sources: list[Source]
    fingerprint: str


def prepare_benchmark(
    name: str,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    allow_incomplete: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """
    Brings a benchmark into the form that [`san_hf.data.load_segmentation_dataset`] and `datasets.load_dataset` read.

    `output` gets `data/<split>-<i>-of-<n>.parquet` with the columns "image" (the owner's file, byte for byte, unless
    the benchmark has large images scaled down), "label" (PNG of 8 or 16 bits) and "file_name"; segmentation.json with
    class names, ignore index and whatever else describes the set; and a card, README.md. They appear when everything
    is complete. An interrupted run is taken up by another of the same arguments; a finished one is left as it is.

    Args:
        name: one of [`BENCHMARKS`].
        source: the folder with the owner's files.
        output: the folder to write.
        splits: which, all by default.
        workers: how many processes work at once; as many as there are processors by default.
        allow_incomplete: take what is there, without counting it. What is there has still to be right.
        progress: called now and then with the number of images done, and of all.

    Returns:
        What segmentation.json holds.

    Raises:
        DataError: files are missing or wrong (they are named), their number is, or the output can't be written.
            Finished shards are kept.
    """
    benchmark = _find_benchmark(name)
    splits = _check_splits(benchmark, splits)
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise DataError(f"There is no folder '{source}', expected the one with the files of {benchmark.title}.")
    if finished := _read_finished(output, benchmark, splits):
        shutil.rmtree(output / STAGING_FOLDER, ignore_errors=True)
        return finished

    sources = {split: _list_sources(benchmark, source, split, allow_incomplete) for split in splits}
    try:
        with _staging(output) as staging:
            shards = [shard for split in splits for shard in _cut(benchmark, split, sources[split], staging)]
            _write_shards(shards, workers or os.cpu_count() or 1, progress)
            metadata = _describe(benchmark, sources, shards, allow_incomplete)
            _publish(staging, output, shards, metadata)
    except OSError as error:
        raise DataError(
            f"Can't write to '{output}': {error.strerror or error}. What is finished is kept: run this again when the "
            "cause is removed."
        ) from error
    return metadata


def push_dataset(output: str | os.PathLike, repository: str, *, private: bool = True, token: str | None = None) -> str:
    """
    Uploads a prepared set to a repository on the Hub, which is made if it isn't there. What was uploaded before is not
    sent again.

    Args:
        output: the folder that [`prepare_benchmark`] wrote.
        repository: "name" or "owner/name".
        private: whether a repository that is made is private. Mind the terms of the images before making one public.
        token: see `huggingface_hub.HfApi`.

    Returns:
        The address of the commit.

    Raises:
        DataError: there is no prepared set.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, e.g. without a token that may write.
    """
    output = Path(output)
    if not (output / METADATA_FILE).is_file():
        raise DataError(f"'{output}' is no prepared data set: there is no {METADATA_FILE}.")
    api = HfApi(token=token)
    repository = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=output,
        allow_patterns=["data/*.parquet", METADATA_FILE, "README.md"],
        delete_patterns=["data/*.parquet"],
        commit_message="Upload a data set prepared by san_hf",
    )
    return commit.commit_url


def _find_benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise DataError(f"There is no benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def _check_splits(benchmark: Benchmark, splits: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(splits or ()) - set(benchmark.splits))
    if unknown:
        raise DataError(f"{benchmark.title} has no split {unknown[0]!r}, expected of {', '.join(benchmark.splits)}.")
    return [split for split in benchmark.splits if not splits or split in splits]


def _read_finished(output: Path, benchmark: Benchmark, splits: list[str]) -> dict[str, Any] | None:
    """What a finished output says of itself; None if there is none yet."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise DataError(f"'{output}' is a file, expected a folder to write or a new name.")
    try:
        metadata = json.loads((output / METADATA_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # Between the renames that publish a set, its data are there and its description isn't.
        publishing = (output / STAGING_FOLDER / METADATA_FILE).is_file()
        others = sorted(path.name for path in output.iterdir() if path.name != STAGING_FOLDER)
        if others and not publishing:
            raise DataError(f"'{output}' holds {join_some(others)}: expected a new or an empty folder.") from None
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"'{output / METADATA_FILE}' can't be read: {error}. Remove '{output}'.") from error
    if metadata.get("name") != benchmark.name or list(metadata.get("splits", ())) != splits:
        raise DataError(
            f"'{output}' holds {metadata.get('name')} ({', '.join(metadata.get('splits', ()))}), not {benchmark.name} "
            f"({', '.join(splits)}). Choose another folder, or remove it."
        )
    for split in splits:
        files = sorted((output / "data").glob(f"{split}-*.parquet"))
        if not files or files[-1].stem != f"{split}-{len(files) - 1:05d}-of-{len(files):05d}":
            raise DataError(f"'{output / 'data'}' lacks some of the files of {split}. Remove '{output}' to start anew.")
    return metadata


def _list_sources(benchmark: Benchmark, folder: Path, split: str, allow_incomplete: bool) -> list[Source]:
    """The images of a split with their labels, all of which exist."""
    expected = benchmark.splits[split]
    try:
        sources = LAYOUTS[benchmark.name].find(folder, split, expected)
    except DataError as error:
        more = "" if len(benchmark.splits) == 1 else " If you have only some of the splits, ask for those."
        raise DataError(f"{error}{more}") from error
    except OSError as error:
        raise DataError(f"'{folder}' can't be read: {error}") from error
    files = [file for item in sources for file in (item.image, item.labels) if isinstance(file, Path)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} files of {benchmark.title} ({split}) are missing: {join_some(missing, _ERRORS_TO_NAME)}."
        )
    if not sources or (len(sources) != expected and not allow_incomplete):
        raise DataError(
            f"{benchmark.title} has {expected:,} images in {split}, but '{folder}' {len(sources):,}. Download and "
            "unpack it again."
        )
    return sources


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """The folder that holds what isn't finished yet, for one process at a time."""
    staging = output / STAGING_FOLDER
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(staging / "lock", timeout=0):
            # A run that was killed while it published left its data there.
            if (output / "data").is_dir():
                os.replace(output / "data", staging / "data")
            (staging / "data").mkdir(exist_ok=True)
            for part in staging.rglob("*.part"):
                part.unlink()
            yield staging
    except Timeout as error:
        raise DataError(f"Another process is writing to '{output}'. Wait for it, or end it.") from error
    shutil.rmtree(staging)


def _cut(benchmark: Benchmark, split: str, sources: list[Source], staging: Path) -> list[Shard]:
    count = -(-len(sources) // IMAGES_PER_SHARD)
    shards = []
    for number in range(count):
        part = sources[number * IMAGES_PER_SHARD : (number + 1) * IMAGES_PER_SHARD]
        file = staging / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
        shards.append(Shard(benchmark.name, file, part, _fingerprint(benchmark.name, part)))
    return shards


def _fingerprint(name: str, sources: list[Source]) -> str:
    """Of what a shard is made of: files by name, size and time."""
    digest = hashlib.sha256(f"{name} {_FORM}".encode())
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
        return pq.read_metadata(shard.file).metadata.get(_FINGERPRINT) == shard.fingerprint.encode()
    # Not there, or cut short by a machine that lost its power.
    except (OSError, pa.ArrowInvalid):
        return False


def _write_shards(shards: list[Shard], workers: int, progress: Callable[[int, int], None] | None) -> None:
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
            f"{len(problems)} of the images or their labels are wrong: {join_some(problems, _ERRORS_TO_NAME)}. Get "
            "them again; what is finished is kept."
        )


def _start_worker(counter: Any) -> None:
    """Lets the worker count, and end when its parent does, which a killed parent can't tell it to."""
    global _counter
    _counter = counter

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
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
    table = label_table(shard.benchmark)
    part = shard.file.with_name(f"{shard.file.name}.{os.getpid()}.part")
    problems, annotated = [], 0
    try:
        with pq.ParquetWriter(part, _FEATURES.arrow_schema, compression="snappy") as writer:
            for start in range(0, len(shard.sources), _ROWS_AT_ONCE):
                rows = []
                for source in shard.sources[start : start + _ROWS_AT_ONCE]:
                    try:
                        row, has_labels = _convert(source, shard.benchmark, table)
                    # A broken file makes its reader fail in many ways.
                    except Exception as error:
                        problems.append(f"'{source.image}': {error or type(error).__name__}")
                        continue
                    annotated += has_labels
                    rows.append(row)
                if not problems:
                    writer.write_table(pa.Table.from_pylist(rows, schema=_FEATURES.arrow_schema))
                count(len(shard.sources[start : start + _ROWS_AT_ONCE]))
            writer.add_key_value_metadata({_FINGERPRINT: shard.fingerprint, _ANNOTATED: str(annotated)})
        if not problems:
            os.replace(part, shard.file)
    finally:
        part.unlink(missing_ok=True)
    return problems


def _convert(source: Source, name: str, table: np.ndarray) -> tuple[dict[str, Any], bool]:
    """A row, and whether any of its pixels has a label."""
    layout, ignore_index = LAYOUTS[name], BENCHMARKS[name].ignore_index
    data = source.image.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned and layout.upright else image
        size = upright.height, upright.width
        try:
            ids = layout.read_ids(source.labels, size)
        except Exception as error:
            raise ValueError(f"its labels can't be read: {error or type(error).__name__}") from error
        if ids.shape != size:
            raise ValueError(f"is {size[1]} x {size[0]} pixels, its labels {ids.shape[1]} x {ids.shape[0]}")
        labels = table[np.clip(ids, 0, len(table) - 1)]
        if (wrong := labels == UNKNOWN).any():
            raise ValueError(f"its labels have the values {join_some(np.unique(ids[wrong]).tolist())}")
        smaller = _reduced_size(size, layout.shorter_side)
        if smaller != size or (turned and not layout.upright):
            data = _encode_photograph(reduce_image(np.asarray(to_rgb(upright)), smaller))
            labels = reduce_labels(labels, smaller)
    row = {
        "image": {"bytes": data, "path": source.name},
        "label": {"bytes": _encode_labels(labels, ignore_index), "path": f"{Path(source.name).stem}.png"},
        "file_name": source.name,
    }
    return row, bool((labels != ignore_index).any())


def _encode_labels(labels: np.ndarray, ignore_index: int) -> bytes:
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


def _describe(
    benchmark: Benchmark, sources: dict[str, list[Source]], shards: list[Shard], allow_incomplete: bool
) -> dict[str, Any]:
    annotated = dict.fromkeys(sources, 0)
    for shard in shards:
        annotated[shard.file.name.split("-")[0]] += int(pq.read_metadata(shard.file).metadata[_ANNOTATED])
    for split, number in annotated.items():
        if not number:
            raise DataError(f"No pixel of the {len(sources[split])} images of {split} has a label. Check the labels.")
    counts = {split: len(items) for split, items in sources.items()}
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "class_names": benchmark.class_names,
        "ignore_index": benchmark.ignore_index,
        "splits": counts,
        "images_with_labels": annotated,
        "complete": all(counts[split] == benchmark.splits[split] for split in counts),
        "source": benchmark.source,
        "license": benchmark.license,
        "terms": benchmark.terms,
        "original_names": {split: name for split, name in benchmark.original_names.items() if split in counts},
        "prepared_by": f"san_hf {__version__}",
    }


def _publish(staging: Path, output: Path, shards: list[Shard], metadata: dict[str, Any]) -> None:
    """From complete shards to a complete output. The description comes last: where it is, everything is."""
    expected = {shard.file.name for shard in shards}
    for file in (staging / "data").iterdir():
        if file.name not in expected:
            file.unlink()
    _write(staging / "README.md", render_card(metadata))
    _write(staging / METADATA_FILE, json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
    for name in ("data", "README.md", METADATA_FILE):
        os.replace(staging / name, output / name)


def _write(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def render_card(metadata: dict[str, Any]) -> str:
    """The README.md of a prepared set, with what the Hub and `datasets` read at its head."""
    largest = max(sum(metadata["splits"].values()), 1)
    sizes = [1_000, 10_000, 100_000, 1_000_000]
    words = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    head = {
        "license": metadata["license"],
        "pretty_name": metadata["title"],
        "task_categories": ["image-segmentation"],
        "task_ids": ["semantic-segmentation"],
        "tags": ["san_hf"],
        "size_categories": [words[sum(largest >= size for size in sizes)]],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in metadata["splits"]],
            }
        ],
    }
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in metadata["splits"].items())
    names = ", ".join(f"{label} {name!r}" for label, name in enumerate(metadata["class_names"]))
    partial = "" if metadata["complete"] else "\n\n**Incomplete: a part of the set, not for figures to compare.**"
    bits = 8 if metadata["ignore_index"] == 255 else 16
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {metadata["title"]}, for semantic segmentation{partial}

Prepared by `{metadata["prepared_by"]}` (`san-hf prepare {metadata["name"]}`) from its owners' files:
<{metadata["source"]}>

{metadata["terms"]}

| split | images |
|---|---|
{rows}

Columns: `image`; `label`, a PNG of {bits} bits whose pixels are 0..{len(metadata["class_names"]) - 1}, or
{metadata["ignore_index"]} without a label; `file_name`. What describes them is in `{METADATA_FILE}`.

```python
from san_hf.data import load_segmentation_dataset

data = load_segmentation_dataset("FOLDER_OR_REPOSITORY", "{next(iter(metadata["splits"]))}")
image, label_map, name = data[0]
```

Classes: {names}
"""
