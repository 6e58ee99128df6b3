"""Opening data sets of any kind: prepared benchmarks, data sets on the Hub, folders of files, `datasets`' objects."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Image as ImageFeature
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from san_hf.json_files import read_json
from san_hf.messages import one_line
from san_hf.paths import expand_path
from san_hf.vocabularies import VOCABULARIES

from .class_names import read_class_names
from .dataset import SegmentationDataset
from .errors import DataError
from .folders import IMAGE_FOLDERS, LABEL_FOLDERS, open_folders
from .label_checks import check_labels
from .palettes import load_palette
from .parquet_files import check_parquet
from .splits import OTHER_NAMES, split_names, take_split


# What describes a prepared data set, beside its data/*.parquet.
METADATA_FILE = "segmentation.json"
CLASS_FILES = ("classes.txt", "classes.json")
IMAGE_COLUMNS = ("image",)
LABEL_COLUMNS = ("label", "annotation", "mask", "label_map", "segmentation_map", "semantic_map")
FILE_NAME_COLUMNS = ("file_name", "filename", "image_id")
# Objects of `datasets` that are taken as they are.
Opened: TypeAlias = datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict

# Label images have 16 bits, and label maps with what is added to them 32.
LARGEST_LABEL = 65535


def load_segmentation_dataset(
    source: str | os.PathLike | Opened,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: str | os.PathLike | Sequence[str] | None = None,
    ignore_index: int | None = None,
    label_shift: int = 0,
    label_palette: str | os.PathLike | Mapping[Any, str | int] | None = None,
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
              name, or holding such folders, or with lists of the splits' images (train.txt, or VOC's
              ImageSets/Segmentation/train.txt). Other usual names of the two, such as `img_dir/` and `ann_dir/`, are
              known, too. Beside them may lie the class list, classes.txt or classes.json;
            - any other repository on the Hub, or folder, that `datasets.load_dataset` opens;
            - an object of `datasets`: `Dataset`, `DatasetDict`, or their streamed kinds.
        split: such as "train", which is also the one split of a pair of folders without splits; or, unless it is
            streamed, a part such as "train[:100]" or "train[:80%]".
        image_column, label_column: by default those of the usual names; of a pair of folders, their names.
        class_names: the names in the order of their labels; or the name of one of `san_hf.VOCABULARIES`; or a file:
            text with one name a line, or JSON, a list of names or names by label ({"0": "sky", ...}).
        ignore_index: what pixels without a label have. By default what the prepared set says, else 255, or 65535 for
            more than 255 classes.
        label_shift: what to add to the labels; -1 where 0 stands for "no label" and classes count from 1. What falls
            below 0 becomes `ignore_index`; `ignore_index` itself stays.
        label_palette: what the colours of the label maps stand for, where they hold colours rather than numbers:
            "binary" (black and white for two classes), "voc", "cityscapes", or a file or mapping of colours and
            classes, see [`san_hf.data.palettes.load_palette`].
        streaming: read while iterating, rather than download first. There are then no indices and no length.
        config_name: of a repository that has several configurations.
        revision: branch, tag or commit of the repository.

    Raises:
        DataError: there is no such data set, split or column, the split is empty or without any label, files lack
            their counterpart, no classes are known, the ignore index is one of them, or the label maps can't be meant,
            such as black and white for two classes.
    """
    metadata, listed = None, None
    as_objects = isinstance(source, Opened)
    if as_objects:
        dataset = _take_object(source, split)
        where, name = "the data set", getattr(dataset.info, "dataset_name", None) or "data"
    else:
        source = where = expand_path(source)
        name = Path(source).resolve().name if os.path.isdir(source) else source
        metadata = _read_metadata(source, revision)
        dataset = None
        if metadata is None and os.path.isdir(source):
            dataset = open_folders(Path(source), split, image_column, label_column)
            listed = next(filter(Path.is_file, _class_files(Path(source), split)), None)
        if dataset is not None:
            image_column = label_column = None
        else:
            dataset = _load(source, split, metadata, streaming, config_name, revision)
    dataset = _select_columns(dataset, f"'{where}'", split, image_column, label_column)

    for option, value in (("ignore_index", ignore_index), ("label_shift", label_shift)):
        if value is not None and not -LARGEST_LABEL <= value <= LARGEST_LABEL:
            raise DataError(f"{option} is {value}, expected an integer between {-LARGEST_LABEL} and {LARGEST_LABEL}.")
    given_index = ignore_index
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
            f"The class names of '{where}' are not known. Give class_names: a list, a file with one name a line, or "
            f"one of {', '.join(VOCABULARIES)}"
            + (f"; or put a {CLASS_FILES[0]} there." if os.path.isdir(where) else ".")
        )
    names = read_class_names(class_names if class_names is not None else listed or "")
    if ignore_index is None:
        ignore_index = 255 if len(names) <= 255 else 65535
    if 0 <= ignore_index < len(names):
        raise DataError(
            f"ignore_index {ignore_index} is the label of the class {names[ignore_index]!r}: expected a value beyond "
            f"0..{len(names) - 1}."
        )
    palette = None
    if label_palette is not None:
        if label_shift:
            raise DataError("label_palette says what each colour stands for: leave label_shift out.")
        palette = load_palette(label_palette, names, ignore_index)
    data = SegmentationDataset(dataset, names, ignore_index, name, split, label_shift, palette)
    check_labels(data, prepared=metadata is not None, ignore_is_meant=given_index is not None)
    if streaming and isinstance(dataset, datasets.Dataset):
        data = replace(data, dataset=dataset.to_iterable_dataset(num_shards=min(len(dataset), 64)))
    return data


def _take_object(source: Opened, split: str) -> datasets.Dataset | datasets.IterableDataset:
    """The split, or parts of splits, of an object of `datasets`. A single data set without a name goes by any."""
    if isinstance(source, dict):
        return take_split(split, source, source.__getitem__, "The DatasetDict")
    known = [str(source.split)] if source.split is not None else split_names(split)
    # What `datasets` calls "train[:10]" is a part that was taken already.
    return take_split(split, [*known, *split_names(known[0])], lambda _: source, "The data set")


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
        metadata = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"'{file}' can't be read: {one_line(error)}. Prepare or download the data set again."
        ) from error
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
    arguments: dict[str, Any] = {"path": source, "name": config_name, "revision": revision}
    if metadata is not None:
        known, names = list(metadata["splits"]), split_names(split)
        if unknown := [name for name in names if name not in known]:
            raise DataError(f"'{source}' has no split {unknown[0]!r}, expected one of {', '.join(known)}.")
        # Only these splits are downloaded or copied.
        arguments["data_files"] = {name: f"data/{name}-*.parquet" for name in names}
    if os.path.isdir(source):
        check_parquet(Path(source))
    try:
        dataset = datasets.load_dataset(**arguments, split=split, streaming=streaming)
    # Every builder, file system and network has errors of its own.
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise _empty(split, f"'{source}'") from error
        reason = one_line(error)
        raise DataError(
            f"The split {split!r} of '{source}' can't be loaded: {reason}. Expected a folder that san-hf prepare "
            f"wrote, a data set that datasets.load_dataset opens, or two folders: {' or '.join(IMAGE_FOLDERS)} with "
            f"images, and {' or '.join(LABEL_FOLDERS)} with label maps. Folders of other names are given by "
            "image_column and label_column."
        ) from error
    return dataset


def _select_columns(dataset, where: str, split: str, image_column: str | None, label_column: str | None):
    """The columns under our names, not decoded."""
    # Before anything else: of a stream, columns would be decoded on the way to a selection of them.
    dataset = _undecoded(dataset)
    first = None
    if isinstance(dataset, datasets.IterableDataset):
        first = next(iter(dataset), None)
        empty = first is None
    else:
        empty = len(dataset) == 0
    if empty:
        raise _empty(split, where)
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


def _empty(split: str, where: str) -> DataError:
    return DataError(f"The split {split!r} of {where} is empty, expected at least one image.")


def _undecoded(dataset):
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def _class_files(source: Path, split: str) -> Iterator[Path]:
    names = [other for name in split_names(split) for other in (name, *OTHER_NAMES.get(name, ()))]
    for folder in (*(source / name for name in names), source):
        for name in CLASS_FILES:
            yield folder / name
