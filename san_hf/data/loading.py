"""Opening data sets of any kind: prepared benchmarks, data sets on the Hub, folders of files."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Image as ImageFeature
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from PIL import Image

from san_hf.messages import join_some, one_line
from san_hf.vocabularies import VOCABULARIES

from .class_names import read_class_names
from .dataset import SegmentationDataset
from .errors import DataError


# What describes a prepared data set, beside its data/*.parquet.
METADATA_FILE = "segmentation.json"
CLASS_FILES = ("classes.txt", "classes.json")
IMAGE_COLUMNS = ("image",)
LABEL_COLUMNS = ("label", "annotation", "mask", "label_map", "segmentation_map", "semantic_map")
FILE_NAME_COLUMNS = ("file_name", "filename", "image_id")
# Of so many examples, evenly spread, the first must have a pixel with a label.
_EXAMPLES_TO_PROBE = 256


def load_segmentation_dataset(
    source: str | os.PathLike,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: str | os.PathLike | Sequence[str] | None = None,
    ignore_index: int | None = None,
    label_shift: int = 0,
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
) -> SegmentationDataset:
    """
    Opens one split of a data set for semantic segmentation.

    Args:
        source: one of
            - a folder that `san-hf prepare` wrote, or a repository on the Hub that it was pushed to: nothing else is
              needed;
            - a folder with `images/` and `labels/` (files of the same name but for the ending; labels are images of
              one channel, or with a palette, whose indices count), either directly, or in a folder of the split's
              name, or holding such folders. Beside them may lie the class list, classes.txt or classes.json;
            - any other repository on the Hub, or folder, that `datasets.load_dataset` opens.
        split: such as "train"; where `datasets` reads it, also a part such as "train[:100]".
        image_column, label_column: by default those of the usual names.
        class_names: the names in the order of their labels; or the name of one of `san_hf.VOCABULARIES`; or a file:
            text with one name a line, or JSON, a list of names or names by label ({"0": "sky", ...}).
        ignore_index: what pixels without a label have. By default what the prepared set says, else 255, or 65535 for
            more than 255 classes.
        label_shift: what to add to the labels; -1 where 0 stands for "no label" and classes count from 1. What falls
            below 0 becomes `ignore_index`; `ignore_index` itself stays.
        streaming: read while iterating, rather than download first. There are then no indices and no length.
        config_name: of a repository that has several configurations.
        revision: branch, tag or commit of the repository.

    Raises:
        DataError: there is no such data set, split or column, the split is empty or without any label, files lack
            their counterpart, no classes are known, or the ignore index is one of them.
    """
    source = os.fspath(source)
    metadata = _read_metadata(source, revision)
    if metadata is None and (pairs := _find_pairs(Path(source), split)):
        dataset, listed = _pair_files(*pairs), next(filter(Path.is_file, _class_files(Path(source), split)), None)
        name = Path(source).resolve().name
        if streaming:
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
    else:
        dataset = _load(source, split, metadata, streaming, config_name, revision)
        listed, name = None, source
        if os.path.isdir(source):
            listed = next(filter(Path.is_file, _class_files(Path(source), split)), None)
            name = Path(source).resolve().name
    dataset = _select_columns(dataset, source, split, image_column, label_column)

    if metadata is not None:
        name = metadata["name"]
        ignore_index = metadata["ignore_index"] if ignore_index is None else ignore_index
        class_names = metadata["class_names"] if class_names is None else class_names
        expected = metadata["splits"].get(split)
        if not streaming and expected is not None and len(dataset) != expected:
            raise DataError(
                f"'{source}' holds {len(dataset)} examples of {split}, but its {METADATA_FILE} says {expected}: files "
                "are missing or from elsewhere. Prepare or download it again."
            )
    if class_names is None and listed is None:
        raise DataError(
            f"The class names of '{source}' are not known. Give class_names: a list, a file with one name a line, or "
            f"one of {', '.join(VOCABULARIES)}"
            + (f"; or put a {CLASS_FILES[0]} there." if os.path.isdir(source) else ".")
        )
    names = read_class_names(class_names if class_names is not None else listed or "")
    if ignore_index is None:
        ignore_index = 255 if len(names) <= 255 else 65535
    if 0 <= ignore_index < len(names):
        raise DataError(
            f"ignore_index {ignore_index} is the label of the class {names[ignore_index]!r}: expected a value beyond "
            f"0..{len(names) - 1}."
        )
    data = SegmentationDataset(dataset, names, ignore_index, name, split, label_shift)
    if not streaming:
        _check_annotated(data)
    return data


def _check_annotated(data: SegmentationDataset) -> None:
    """Goes through examples, evenly spread, until one has a label; usually the first."""
    count = min(len(data), _EXAMPLES_TO_PROBE)
    for number in range(count):
        if (data[number * len(data) // count][1] != data.ignore_index).any():
            return
    raise DataError(
        f"{data.name}: no pixel of {'the' if count == len(data) else 'any of'} {count} examples of {data.split} "
        f"{'' if count == len(data) else 'that were looked at '}has a label: all are {data.ignore_index}, which stands "
        "for none. Check the label files, the ignore index and the shift of the labels."
    )


def _read_metadata(source: str, revision: str | None) -> dict[str, Any] | None:
    """Description of a prepared data set; None for any other."""
    if os.path.isdir(source):
        file = Path(source) / METADATA_FILE
        if not file.is_file():
            return None
    elif os.path.exists(source):
        raise DataError(f"'{source}' is a file, expected a folder or the name of a repository on the Hub.")
    else:
        try:
            file = Path(hf_hub_download(source, METADATA_FILE, repo_type="dataset", revision=revision))
        except HFValidationError as error:
            raise DataError(f"There is no folder '{source}', and it is no name of a repository on the Hub.") from error
        # No such file there, no such repository, no network: if it matters, loading the data says so.
        except Exception:
            return None
    try:
        metadata = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' can't be read: {error}. Prepare or download the data set again.") from error
    expected = {"name": str, "class_names": list, "ignore_index": int, "splits": dict}
    for key, kind in expected.items():
        if not isinstance(metadata, dict) or not isinstance(metadata.get(key), kind):
            raise DataError(f"'{file}' has no {key!r} of the type {kind.__name__}. Prepare the data set again.")
    return metadata


def _load(
    source: str,
    split: str,
    metadata: dict[str, Any] | None,
    streaming: bool,
    config_name: str | None,
    revision: str | None,
) -> datasets.Dataset | datasets.IterableDataset:
    """The split as `datasets` loads it."""
    stem = split.partition("[")[0]
    if metadata is not None and stem not in metadata["splits"]:
        raise DataError(f"'{source}' has no split {split!r}, expected one of {', '.join(metadata['splits'])}.")
    arguments: dict[str, Any] = {"path": source, "name": config_name, "revision": revision}
    if metadata is not None:
        # Only this split is downloaded or copied.
        arguments["data_files"] = {stem: f"data/{stem}-*.parquet"}
    try:
        dataset = datasets.load_dataset(**arguments, split=split, streaming=streaming)
    # Every builder, file system and network has errors of its own.
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise _empty(split, source) from error
        reason = one_line(error)
        raise DataError(
            f"The split {split!r} of '{source}' can't be loaded: {reason}. Expected a folder that san-hf prepare "
            "wrote, a folder with images/ and labels/, or a data set that datasets.load_dataset opens."
        ) from error
    return dataset


def _select_columns(dataset, source: str, split: str, image_column: str | None, label_column: str | None):
    """The columns under our names, not decoded."""
    where = f"'{source}'"
    # Before anything else: of a stream, columns would be decoded on the way to a selection of them.
    dataset = _undecoded(dataset)
    first = None
    if isinstance(dataset, datasets.IterableDataset):
        first = next(iter(dataset), None)
        empty = first is None
    else:
        empty = len(dataset) == 0
    if empty:
        raise _empty(split, source)
    columns = dataset.column_names or list(first or ())

    def find(role: str, given: str | None, usual: Sequence[str]) -> str:
        if given is not None and given not in columns:
            raise DataError(f"{where} has no column {given!r} ({role}); it has {', '.join(columns)}.")
        column = given or next((column for column in usual if column in columns), None)
        if column is None:
            raise DataError(
                f"{where} has no column {' or '.join(map(repr, usual))}; it has {', '.join(columns)}. Say which "
                f"one holds the {role.removesuffix('_column')}s: {role}=..."
            )
        feature = (dataset.features or {}).get(column)
        if isinstance(feature, datasets.ClassLabel | datasets.Value):
            raise DataError(
                f"The column {column!r} of {where} holds {feature}, expected images. Say which one holds the "
                f"{role.removesuffix('_column')}s: {role}=..., one of {', '.join(columns)}."
            )
        return column

    names = {
        find("image_column", image_column, IMAGE_COLUMNS): "image",
        find("label_column", label_column, LABEL_COLUMNS): "label",
    }
    if len(names) < 2:
        raise DataError(f"{where}: image_column and label_column are the same, {image_column!r}.")
    file_name = next((column for column in FILE_NAME_COLUMNS if column in columns and column not in names), None)
    if file_name is not None:
        names[file_name] = "file_name"
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _empty(split: str, source: str) -> DataError:
    return DataError(f"The split {split!r} of '{source}' is empty, expected at least one image.")


def _undecoded(dataset):
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def _find_pairs(source: Path, split: str) -> tuple[Path, Path] | None:
    """The folders of images and of labels, if there are such."""
    for images in (source / split / "images", source / "images" / split, source / "images"):
        labels = source / "labels" / split if images.name == split else images.with_name("labels")
        if images.is_dir() and labels.is_dir():
            return images, labels
    if splits := sorted(path.parent.name for path in source.glob("*/images") if path.with_name("labels").is_dir()):
        raise DataError(f"'{source}' has no split {split!r}, expected one of {', '.join(splits)}.")
    return None


def _class_files(source: Path, split: str) -> Iterator[Path]:
    for folder in (source / split, source):
        for name in CLASS_FILES:
            yield folder / name


def _pair_files(images: Path, labels: Path) -> datasets.Dataset:
    """The images below one folder with the label maps of the same name below the other."""
    found = {}
    for folder in (images, labels):
        files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.suffix.lower() not in Image.registered_extensions() or any(x.startswith(".") for x in name.parts):
                continue
            stem = name.with_suffix("").as_posix()
            if stem in files:
                raise DataError(f"'{files[stem]}' and '{path}' have the same name: expected one file of each.")
            files[stem] = path
        found[folder] = files
    for here, there in ((images, labels), (labels, images)):
        if unpaired := [str(path) for stem, path in found[here].items() if stem not in found[there]]:
            raise DataError(f"No file of the same name in '{there}' for {join_some(unpaired)}.")
    if not found[images]:
        raise DataError(f"There is no image in '{images}', expected at least one.")
    columns = {
        "image": [str(path) for path in found[images].values()],
        "label": [str(found[labels][stem]) for stem in found[images]],
        "file_name": [path.relative_to(images).as_posix() for path in found[images].values()],
    }
    features = {"image": ImageFeature(), "label": ImageFeature(), "file_name": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
