"""
From a benchmark's files to one form: parquet files that `datasets` loads, with what describes them.

The work is cut into shards of some hundred images. A finished shard appears under its name all at once, in a hidden
folder of the output; when all are there, they become the output. A run that was interrupted at any moment finds its
shards again by what they were made of.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from san_hf.files import remove_leftovers
from san_hf.json_files import read_json
from san_hf.locks import InUseError, locked
from san_hf.messages import join_some, one_line

from .benchmarks import BENCHMARKS, Benchmark, Source
from .errors import DataError
from .loading import METADATA_FILE
from .publish import describe, publish
from .shards import ERRORS_TO_NAME, cut_into_shards, write_shards


STAGING_FOLDER = ".unfinished"


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
        san_hf.locks.InUseError: another process prepares it.
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
            shards = [shard for split in splits for shard in cut_into_shards(benchmark, split, sources[split], staging)]
            write_shards(shards, workers or os.cpu_count() or 1, progress)
            metadata = describe(benchmark, sources, shards, allow_incomplete)
            publish(staging, output, shards, metadata)
    except InUseError:
        raise
    except OSError as error:
        raise DataError(
            f"Can't write to '{output}': {one_line(error)}. What is finished is kept: run this again when the "
            "cause is removed."
        ) from error
    return metadata


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
    """Description of a finished output; None if it is not finished."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise DataError(f"'{output}' is a file, expected a folder to write or a new name.")
    try:
        metadata = read_json(output / METADATA_FILE)
        if not isinstance(metadata, dict) or not isinstance(metadata.get("splits", {}), dict):
            raise DataError("it describes no data set")
    except FileNotFoundError:
        # Between the renames that publish a set, its data are there and its description isn't.
        publishing = (output / STAGING_FOLDER / METADATA_FILE).is_file()
        others = sorted(path.name for path in output.iterdir() if path.name != STAGING_FOLDER)
        if others and not publishing:
            raise DataError(f"'{output}' holds {join_some(others)}: expected a new or an empty folder.") from None
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"'{output / METADATA_FILE}' can't be read: {one_line(error)}. Remove '{output}'.") from error
    if metadata.get("name") != benchmark.name or list(metadata.get("splits", ())) != splits:
        raise DataError(
            f"'{output}' holds {metadata.get('name')} ({', '.join(metadata.get('splits', ()))}), not {benchmark.name} "
            f"({', '.join(splits)}). Choose another folder, or remove it."
        )
    for split in splits:
        files = sorted((output / "data").glob(f"{split}-*.parquet"))
        if not files or files[-1].stem != f"{split}-{len(files) - 1:05d}-of-{len(files):05d}":
            raise DataError(
                f"'{output / 'data'}' lacks some of the files of {split}. Remove '{output}' to start again."
            )
    return metadata


def _list_sources(benchmark: Benchmark, folder: Path, split: str, allow_incomplete: bool) -> list[Source]:
    """The images of a split with their labels, all of which exist."""
    expected = benchmark.splits[split]
    try:
        sources = benchmark.find_images(folder, split, expected)
    except DataError as error:
        more = "" if len(benchmark.splits) == 1 else " If you have only some of the splits, ask for those."
        raise DataError(f"{error}{more}") from error
    except OSError as error:
        raise DataError(f"'{folder}' can't be read: {error}") from error
    files = [file for item in sources for file in (item.image, item.labels) if isinstance(file, Path)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} files of {benchmark.title} ({split}) are missing: {join_some(missing, ERRORS_TO_NAME)}."
        )
    if not sources or (benchmark.release_of(split, len(sources)) is None and not allow_incomplete):
        raise DataError(
            f"{benchmark.title} has {benchmark.counts_of(split)} images in {split}, but '{folder}' {len(sources):,}. "
            "Download and "
            "unpack it again."
        )
    return sources


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """The folder that holds what isn't finished yet, for one process at a time."""
    staging = output / STAGING_FOLDER
    staging.mkdir(parents=True, exist_ok=True)
    with locked(staging / "lock", f"Preparing '{output}'"):
        # A run that was killed while it published left its data there.
        if (output / "data").is_dir():
            os.replace(output / "data", staging / "data")
        (staging / "data").mkdir(exist_ok=True)
        for folder in (staging, staging / "data"):
            remove_leftovers(folder)
        yield staging
        shutil.rmtree(staging)
