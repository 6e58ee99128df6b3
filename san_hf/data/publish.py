"""A prepared benchmark's description and card, and its way to the Hub."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from huggingface_hub import HfApi

from san_hf.files import json_text, write_file
from san_hf.version import __version__

from .benchmarks import Benchmark, Source
from .errors import DataError
from .loading import METADATA_FILE
from .shards import ANNOTATED_KEY, Shard


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


def describe(
    benchmark: Benchmark, sources: dict[str, list[Source]], shards: list[Shard], allow_incomplete: bool
) -> dict[str, Any]:
    annotated = dict.fromkeys(sources, 0)
    for shard in shards:
        annotated[shard.file.name.split("-")[0]] += int(pq.read_metadata(shard.file).metadata[ANNOTATED_KEY])
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
        "complete": all(benchmark.release_of(split, count) is not None for split, count in counts.items()),
        "source": benchmark.source,
        "license": benchmark.license,
        "terms": benchmark.terms,
        "original_names": {split: name for split, name in benchmark.original_names.items() if split in counts},
        "prepared_by": f"san_hf {__version__}",
    }


def publish(staging: Path, output: Path, shards: list[Shard], metadata: dict[str, Any]) -> None:
    """Moves complete shards into the output. The description comes last, so that its presence means completeness."""
    expected = {shard.file.name for shard in shards}
    for file in (staging / "data").iterdir():
        if file.name not in expected:
            file.unlink()
    write_file(staging / "README.md", dataset_card(metadata))
    write_file(staging / METADATA_FILE, json_text(metadata, indent=2) + "\n")
    for name in ("data", "README.md", METADATA_FILE):
        os.replace(staging / name, output / name)


def dataset_card(metadata: dict[str, Any]) -> str:
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
    partial = "" if metadata["complete"] else "\n\n**Incomplete: a part of the set, not for results to compare.**"
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
