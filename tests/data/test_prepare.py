"""Benchmarks in miniature through `san-hf prepare`: labels, interruptions, files that aren't what they should be."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import savemat
from typer.main import get_command
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.data import (
    BENCHMARKS,
    DataError,
    load_segmentation_dataset,
    prepare_benchmark,
    push_dataset,
    shards,
)
from san_hf.data.benchmarks import ade20k_847, pascal_context_59
from san_hf.locks import InUseError, locked
from san_hf.vocabularies import load_vocabulary
from tests.data.miniature_sets import (
    BUILDERS,
    bands,
    build_ade_150,
    build_ade_847,
    build_coco,
    build_context_459,
    build_context_detail,
    build_voc,
    count_as_complete,
    prepare_until_killed,
    write_png,
)
from tests.hub.conftest import connect  # noqa: F401 (a fixture)
from tests.hub.server import Hub


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "prepared" / "set"


@pytest.fixture
def ade(monkeypatch, source) -> Path:
    """ADE20K-150 with two images a split, one a shard."""
    count_as_complete(monkeypatch, "ade20k-150", build_ade_150(source))
    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", 1)
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SHARDS = [f"{split}-{number:05d}-of-00002.parquet" for split in ("train", "validation") for number in range(2)]
COMPLETE = {*(f"data/{name}" for name in SHARDS), "README.md", "segmentation.json"}


@pytest.mark.parametrize("key", BUILDERS)
def test_labels(monkeypatch, source, output, key):
    """Catches labels off by one, unlabelled pixels taken for a class, ids of the owner taken for labels, 16-bit labels
    cut to 8, images that are encoded anew, and labels that went to other images."""
    name, build = BUILDERS[key]
    expected = build(source)
    count_as_complete(monkeypatch, name, expected)
    metadata = prepare_benchmark(name, source, output, workers=1)
    assert metadata["complete"] and metadata["splits"] == {split: len(images) for split, images in expected.items()}
    files = {file.name: file for file in source.rglob("*.jpg")}
    for split, label_maps in expected.items():
        data = load_segmentation_dataset(output, split)
        assert (data.name, data.class_names) == (name, load_vocabulary(name))
        assert data.ignore_index == BENCHMARKS[name].ignore_index
        assert [file_name for _, _, file_name in data] == sorted(label_maps)
        for row, (image, label_map, file_name) in zip(data.dataset, data):
            assert np.array_equal(label_map, label_maps[file_name]), file_name
            assert image.size == label_map.shape[::-1]
            stored = Image.open(io.BytesIO(row["label"]["bytes"]))
            assert (stored.format, stored.mode) == ("PNG", "L" if data.ignore_index == 255 else "I;16")
            if name != "ade20k-847":
                assert row["image"]["bytes"] == files[file_name].read_bytes()
        streamed = load_segmentation_dataset(output, split, streaming=True)
        for (_, label_map, file_name), expected_name in zip(streamed, sorted(label_maps)):
            assert file_name == expected_name and np.array_equal(label_map, label_maps[file_name])


def test_what_datasets_alone_makes_of_it(ade, output):
    """Catches a set that only this package can read, and a card that the Hub can't."""
    prepare_benchmark("ade20k-150", ade, output, workers=1)
    both = datasets.load_dataset(str(output))
    assert {split: len(data) for split, data in both.items()} == {"train": 2, "validation": 2}
    row = both["validation"][1]
    assert row["file_name"] == "ADE_val_00000002.jpg" and row["image"].mode == "RGB"
    assert np.array_equal(np.asarray(row["label"]), bands([255, 0, 149, 39]))
    _, head, text = (output / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["pretty_name"] == "ADE20K-150" and head["task_categories"] == ["image-segmentation"]
    assert [entry["split"] for entry in head["configs"][0]["data_files"]] == ["train", "validation"]
    assert BENCHMARKS["ade20k-150"].source in text and "0 'wall'" in text
    described = json.loads((output / "segmentation.json").read_text(encoding="utf-8"))
    assert described["original_names"] == {"validation": "ade20k_sem_seg_val"}
    assert described["license"] == "other" and described["images_with_labels"] == {"train": 2, "validation": 2}


def test_ade_847_images(monkeypatch, source, output):
    """Catches the 512 rule left out, applied to the longer side or to small images, and an image turned away from its
    labels."""
    count_as_complete(monkeypatch, "ade20k-847", build_ade_847(source))
    prepare_benchmark("ade20k-847", source, output, workers=1)
    data = load_segmentation_dataset(output, "validation")
    (large, _, _), (turned, _, _) = data
    assert large.size == (805, 512)
    with Image.open(source / "images/ADE/validation/home_or_hotel/attic/ADE_val_00000001.jpg") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(pixels, (512, 805), mode="bilinear", align_corners=False)
    # Between them lies a JPEG of high quality.
    assert (torch.from_numpy(np.array(large)).permute(2, 0, 1)[None] - expected).abs().mean() < 1
    with Image.open(source / "images/ADE/validation/work_place/val_shop/ADE_val_00000002.jpg") as image:
        assert turned.size == image.size == (30, 20)
        assert np.abs(np.asarray(turned, np.int32) - np.asarray(image)).mean() < 3
    # Small images stay as they are, byte for byte.
    row = load_segmentation_dataset(output, "train").dataset[1]
    assert row["image"]["bytes"] == next(source.rglob(row["file_name"])).read_bytes()


@pytest.mark.parametrize("size", [(512, 805), (700, 512), (513, 512), (7, 5)])
def test_reduction(size):
    """Catches a resize between other pixels than the original's: half a pixel off, or smoothed first."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (731, 1003, 3), dtype=np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), size, mode="bilinear", align_corners=False
    )
    reduced = torch.from_numpy(shards.reduce_image(pixels, size)).permute(2, 0, 1)
    assert (reduced - expected[0]).abs().max() < 0.501
    labels = rng.integers(0, 60000, (731, 1003), dtype=np.int32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(labels)[None, None].double(), size, mode="nearest")
    assert np.array_equal(shards.reduce_labels(labels, size), expected[0, 0].numpy())


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ades_index(tmp_path, protocol):
    """Catches an index that isn't read because of its arrays, by whichever version of Python and NumPy it was made."""
    index = {"folder": ["a", "b"], "filename": ["1.jpg", "2.jpg"], "objectPresence": np.arange(6).reshape(2, 3)}
    index |= {"names": np.array(["x", "y"]), "objects": np.array([None, "z"], object), "count": np.int64(3)}
    file = tmp_path / "index_ade20k.pkl"
    file.write_bytes(pickle.dumps(index, protocol))
    assert ade20k_847.read_ade_index(file) == (["a", "b"], ["1.jpg", "2.jpg"])
    file.write_bytes(file.read_bytes().replace(b"numpy._core", b"numpy.core"))
    if protocol < 4:  # later protocols say how long a name is
        assert ade20k_847.read_ade_index(file) == (["a", "b"], ["1.jpg", "2.jpg"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_ades_index_is_executed(tmp_path, protocol):
    """Catches a pickle that runs a command when it is read."""
    victim, file = tmp_path / "victim", tmp_path / "index_ade20k.pkl"
    for content in (
        {"folder": ["a"], "filename": ["1.jpg"], "objects": Malicious(f"touch {victim}")},
        [Malicious(f"touch {victim}")],
        {"folder": ["a"], "filename": ["1.jpg"], "objects": np.array([Malicious(f"touch {victim}")], object)},
    ):
        file.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(DataError, match="index_ade20k.pkl' can't be read as ADE20K's index: it asks for .*system"):
            ade20k_847.read_ade_index(file)
    for name in (b"builtins\neval", b"builtins\ngetattr", b"numpy\nload", b"numpy\nfromfile", b"_codecs\nlookup"):
        file.write_bytes(b"c" + name + b"\n(V1\ntR.")
        with pytest.raises(DataError, match="it asks for"):
            ade20k_847.read_ade_index(file)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (["a"], "has no list of texts 'folder'"),
        ({"folder": ["a"], "filename": np.array(["1.jpg"])}, "has no list of texts 'filename'"),
        ({"folder": ["a"], "filename": ["1.jpg", "2.jpg"]}, "has 1 folders for 2 file names"),
        ({"folder": ["ADE20K_2021_17_01/../.."], "filename": ["ADE_val_1.jpg"]}, "which is not below the data set"),
        ({"folder": ["/etc"], "filename": ["ADE_val_1.jpg"]}, "which is not below the data set"),
        ({"folder": ["a"], "filename": ["../ADE_val_1.jpg"]}, "which is not below the data set"),
    ],
)
def test_wrong_indices(source, output, index, message):
    """Catches files read from anywhere on the disk because an index says so."""
    (source / "index_ade20k.pkl").write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match=message):
        prepare_benchmark("ade20k-847", source, output)
    (source / "index_ade20k.pkl").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="can't be read as ADE20K's index"):
        prepare_benchmark("ade20k-847", source, output)


def test_expected_counts(source, output):
    """Catches a download that broke off and passes for the set."""
    build_coco(source)
    with pytest.raises(DataError, match="COCO-Stuff 164k has 118,287 images in train, but '.*source' 3"):
        prepare_benchmark("coco-stuff", source, output)
    assert not output.exists()
    assert {name: item.splits for name, item in BENCHMARKS.items()} == {
        "coco-stuff": {"train": 118_287, "validation": 5_000},
        "voc": {"train": 10_582, "validation": 1_449},
        "pascal-context-59": {"train": 4_998, "validation": 5_105},
        "pascal-context-459": {"train": 4_998, "validation": 5_105},
        "ade20k-150": {"train": 20_210, "validation": 2_000},
        "ade20k-847": {"train": 25_574, "validation": 2_000},
    }
    # For trying: what is there, and said so.
    metadata = prepare_benchmark("coco-stuff", source, output, allow_incomplete=True, workers=1)
    assert not metadata["complete"] and metadata["splits"] == {"train": 3, "validation": 2}
    assert "Incomplete" in (output / "README.md").read_text(encoding="utf-8")


def test_the_release_of_the_merged_json(monkeypatch, source, output):
    """Catches a complete set that is refused because another release has more images, and a part that passes for it."""
    expected = {split: len(images) for split, images in build_context_detail(source).items()}
    more = {split: count + 1 for split, count in expected.items()}
    name = "pascal-context-59"
    assert BENCHMARKS[name].other_splits == {"of the merged JSON file": {"train": 4_996, "validation": 5_104}}
    changed = replace(BENCHMARKS[name], splits=more, other_splits={"of the merged JSON file": expected})
    monkeypatch.setitem(BENCHMARKS, name, changed)
    metadata = prepare_benchmark(name, source, output, workers=1)
    assert metadata["complete"] and metadata["splits"] == expected
    monkeypatch.setitem(BENCHMARKS, name, replace(changed, other_splits={"of the merged JSON file": more}))
    with pytest.raises(DataError, match=r"has 3 or 3 \(of the merged JSON file\) images in train, but '.*' 2\."):
        prepare_benchmark(name, source, output.with_name("other"), workers=1)


def test_one_split(source, output):
    """Catches a split that is asked for although the user hasn't downloaded it."""
    build_coco(source)
    shutil.rmtree(source / "train2017")
    with pytest.raises(DataError, match="no folder of images of train.* looked for .*only some of the splits"):
        prepare_benchmark("coco-stuff", source, output, allow_incomplete=True)
    prepare_benchmark("coco-stuff", source, output, splits=["validation"], allow_incomplete=True, workers=1)
    assert len(load_segmentation_dataset(output, "validation")) == 2
    with pytest.raises(DataError, match="has no split 'train', expected one of validation"):
        load_segmentation_dataset(output, "train")
    with pytest.raises(DataError, match=r"'.*set' holds coco-stuff \(validation\), not coco-stuff \(train\)"):
        prepare_benchmark("coco-stuff", source, output, splits=["train"], allow_incomplete=True)
    with pytest.raises(DataError, match="COCO-Stuff 164k has no split 'test'"):
        prepare_benchmark("coco-stuff", source, output, splits=["test"])


def test_missing_files_are_named(ade, output):
    """Catches an error for the first of many missing files, after an hour."""
    (ade / "images/training/ADE_train_00000002.jpg").unlink()
    for number in range(3, 33):
        write_png(ade / f"annotations/training/ADE_train_{number:08d}.png", bands([1]))
    with pytest.raises(DataError) as error:
        prepare_benchmark("ade20k-150", ade, output)
    message = str(error.value)
    assert message.startswith("31 files of ADE20K-150 (train) are missing: ")
    assert "images/training/ADE_train_00000002.jpg" in message and message.endswith(" and 11 more.")


def test_wrong_files_are_named_and_the_rest_is_kept(ade, output):
    """Catches a run that stops at the first of several wrong files, or that starts over when they are mended."""
    good = (ade / "images/training/ADE_train_00000001.jpg").read_bytes()
    (ade / "images/training/ADE_train_00000001.jpg").write_bytes(good[:300])
    write_png(ade / "annotations/validation/ADE_val_00000001.png", bands([0, 151, 1]))
    write_png(ade / "annotations/validation/ADE_val_00000002.png", bands([1], size=(29, 20)))
    with pytest.raises(DataError) as error:
        prepare_benchmark("ade20k-150", ade, output, workers=1)
    message = str(error.value)
    assert message.startswith("3 of the images or their labels are wrong: ")
    assert "ADE_train_00000001.jpg': Truncated File Read" in message
    assert "ADE_val_00000001.jpg': its labels have the values 151" in message
    assert "ADE_val_00000002.jpg': its labels can't be read: they are 29 x 20 pixels, their image 30 x 20" in message
    assert set(contents(output)) - {".unfinished/lock"} == {f".unfinished/data/{SHARDS[1]}"}
    kept = (output / ".unfinished" / "data" / SHARDS[1]).stat()

    (ade / "images/training/ADE_train_00000001.jpg").write_bytes(good)
    write_png(ade / "annotations/validation/ADE_val_00000001.png", bands([0, 150, 1]))
    write_png(ade / "annotations/validation/ADE_val_00000002.png", bands([1]))
    prepare_benchmark("ade20k-150", ade, output, workers=1)
    assert set(contents(output)) == COMPLETE
    assert (output / "data" / SHARDS[1]).stat().st_mtime_ns == kept.st_mtime_ns
    assert (load_segmentation_dataset(output, "validation")[1][1] == 0).all()


@pytest.mark.parametrize(
    ("name", "build", "file", "spoil", "message"),
    [
        (
            "pascal-context-459",
            build_context_459,
            "trainval/2008_000002.mat",
            lambda file: savemat(file, {"Labels": np.zeros((20, 30))}),
            "its labels can't be read: has no variable LabelMap",
        ),
        (
            "pascal-context-459",
            build_context_459,
            "trainval/2008_000002.mat",
            lambda file: savemat(file, {"LabelMap": bands([0, 460], np.uint16)}),
            "its labels can't be read: has the values 460: expected integers, 0..459",
        ),
        (
            "pascal-context-459",
            build_context_459,
            "trainval/2008_000002.mat",
            lambda file: file.write_bytes(b"MATLAB 5.0 MAT-file"),
            "its labels can't be read: ",
        ),
        (
            "voc",
            build_voc,
            "SegmentationClassAug/2007_000032.png",
            lambda file: Image.new("RGB", (30, 20)).save(file),
            "its labels can't be read: got a RGB image",
        ),
        (
            "voc",
            build_voc,
            "SegmentationClassAug/2007_000032.png",
            lambda file: write_png(file, bands([21, 254, 3])),
            "its labels have the values 21, 254",
        ),
        (
            "ade20k-847",
            build_ade_847,
            "images/ADE/training/urban/street/ADE_train_00000001_seg.png",
            lambda file: Image.new("L", (30, 20)).save(file),
            "its labels can't be read: got a L image, expected RGB",
        ),
    ],
)
def test_wrong_labels(monkeypatch, source, output, name, build, file, spoil, message):
    """Catches wrong labels that become right ones in silence."""
    count_as_complete(monkeypatch, name, build(source))
    spoil(source / file)
    with pytest.raises(DataError, match=f"1 of the images or their labels are wrong: '.*jpg': {message}"):
        prepare_benchmark(name, source, output, workers=1)


def test_wrong_annotations_of_detail(monkeypatch, source, output):
    """Catches a stack trace for an annotation file that is cut off or of another kind."""
    count_as_complete(monkeypatch, "pascal-context-59", build_context_detail(source))
    file = source / "trainval_merged.json"
    for text, message in ((file.read_text()[:500], "is no JSON"), ('{"images": []}', "has no 'images' with")):
        pascal_context_59.read_detail.cache_clear()
        file.write_text(text)
        with pytest.raises(DataError, match=f"trainval_merged.json' {message}"):
            prepare_benchmark("pascal-context-59", source, output)


def test_no_label_at_all(ade, output):
    """Catches training and scores on nothing."""
    for number in (1, 2):
        write_png(ade / f"annotations/validation/ADE_val_{number:08d}.png", bands([0]))
    with pytest.raises(DataError, match="No pixel of the 2 images of validation has a label"):
        prepare_benchmark("ade20k-150", ade, output, workers=1)
    assert not (output / "data").exists()


def test_a_finished_set_is_left_alone(ade, output):
    """Catches hours of work done again, and a set that is overwritten by another."""
    metadata = prepare_benchmark("ade20k-150", ade, output, workers=1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert prepare_benchmark("ade20k-150", ade, output) == metadata
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(DataError, match=r"holds ade20k-150 \(train, validation\), not voc"):
        prepare_benchmark("voc", ade, output)

    (output / "data" / SHARDS[1]).unlink()
    with pytest.raises(DataError, match="lacks some of the files of train"):
        prepare_benchmark("ade20k-150", ade, output)
    with pytest.raises(DataError, match="holds 1 examples of train, but its segmentation.json says 2"):
        load_segmentation_dataset(output, "train")
    (output / "segmentation.json").write_text("{}")
    with pytest.raises(DataError, match="segmentation.json' has no 'name' of the type str"):
        load_segmentation_dataset(output, "train")


def test_outputs_that_cannot_be(ade, tmp_path):
    """Catches a folder of something else that gets a data set mixed in, and stack traces for outputs that can't be
    written."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes' holds mine\.txt: expected a new or an empty folder"):
        prepare_benchmark("ade20k-150", ade, tmp_path / "notes")
    with pytest.raises(DataError, match=r"mine\.txt' is a file, expected a folder"):
        prepare_benchmark("ade20k-150", ade, tmp_path / "notes" / "mine.txt")
    with pytest.raises(DataError, match="Can't write to '.*mine.txt/set': Not a directory"):
        prepare_benchmark("ade20k-150", ade, tmp_path / "notes" / "mine.txt" / "set")
    with pytest.raises(DataError, match="no folder '.*nowhere', expected the one with the files of ADE20K-150"):
        prepare_benchmark("ade20k-150", tmp_path / "nowhere", tmp_path / "set")
    with pytest.raises(DataError, match="There is no benchmark 'cityscapes', expected one of coco-stuff, voc"):
        prepare_benchmark("cityscapes", ade, tmp_path / "set")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user other than root")
def test_read_only_output(ade, output):
    """Catches a stack trace where nothing may be written."""
    output.mkdir(parents=True)
    output.chmod(0o500)
    with pytest.raises(DataError, match="Can't write to '.*set': Permission denied"):
        prepare_benchmark("ade20k-150", ade, output)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk(monkeypatch, ade, output):
    """Catches a shard cut short under its final name, and finished ones that are lost with it."""
    write_shard = shards.write_shard
    written = []

    @contextmanager
    def full_file(path):
        with open("/dev/full", "wb") as file:
            yield file

    def write_to_full_disk(shard, count):
        written.append(shard)
        with monkeypatch.context() as patch:
            if len(written) == 2:
                patch.setattr(shards, "new_file", full_file)
            return write_shard(shard, count)

    monkeypatch.setattr(shards, "write_shard", write_to_full_disk)
    with pytest.raises(DataError, match=r"Can't write to '.*set': .*[Nn]o space left.* What is finished is kept"):
        prepare_benchmark("ade20k-150", ade, output, workers=1)
    assert [path.name for path in (output / ".unfinished" / "data").iterdir()] == SHARDS[:1]
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as error:
        full.write(b"x")
    assert error.value.errno == errno.ENOSPC

    prepare_benchmark("ade20k-150", ade, output, workers=1)
    assert set(contents(output)) == COMPLETE
    assert len(written) == 2 + 3


def test_two_at_once(ade, output):
    """Catches two runs that write the same files."""
    (output / ".unfinished").mkdir(parents=True)
    outcomes = []

    def prepare():
        try:
            outcomes.append(prepare_benchmark("ade20k-150", ade, output, workers=1))
        except InUseError as error:
            outcomes.append(str(error))

    with locked(output / ".unfinished" / "lock", "Something"):
        thread = threading.Thread(target=prepare)
        thread.start()
        thread.join()
    assert re.fullmatch(rf"Preparing '.*set' is under way already, by process {os.getpid()} on .*", outcomes[0])
    prepare_benchmark("ade20k-150", ade, output, workers=1)


def test_a_changed_source_is_prepared_anew(monkeypatch, ade, output):
    """Catches shards of an earlier, other source that are taken for this one's."""
    write_png(ade / "annotations/validation/ADE_val_00000002.png", bands([200]))
    with pytest.raises(DataError):
        prepare_benchmark("ade20k-150", ade, output, workers=1)
    write_png(ade / "annotations/validation/ADE_val_00000002.png", bands([3]))
    write_png(ade / "annotations/training/ADE_train_00000001.png", bands([7]))
    prepare_benchmark("ade20k-150", ade, output, workers=1)
    assert (load_segmentation_dataset(output, "train")[0][1] == 6).all()


def is_running(process: int) -> bool:
    """Whether there is such a process that isn't only waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def processes():
    """Starts processes quickly: they all come from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.data.miniature_sets"])
    return context


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_at_any_moment(processes, ade, output, tmp_path):
    """Catches a half-written file under a final name, finished shards that are made again, and a set that differs from
    one whose making was never interrupted."""
    arguments = {"splits": ["validation"], "workers": 1}
    prepare_benchmark("ade20k-150", ade, tmp_path / "whole", **arguments)
    whole = contents(tmp_path / "whole")
    names = SHARDS[2:]
    assert set(whole) == {*(f"data/{name}" for name in names), "README.md", "segmentation.json"}
    for moment in range(1, 100):
        shutil.rmtree(output, ignore_errors=True)
        process = processes.Process(target=prepare_until_killed, args=(str(ade), str(output), moment, arguments))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        there = contents(output)
        if "segmentation.json" in there:
            assert {name: there[name] for name in whole} == whole
        finished = {}
        for folder in (output / "data", output / ".unfinished" / "data"):
            for file in folder.glob("*.parquet") if folder.is_dir() else ():
                assert file.read_bytes() == whole[f"data/{file.name}"]
                finished[file.name] = file.stat().st_ino
        # Not to be taken for the set before it is complete.
        if (output / "data").is_dir():
            assert set(finished) == set(names)
        prepare_benchmark("ade20k-150", ade, output, **arguments)
        assert contents(output) == whole, moment
        assert {name: (output / "data" / name).stat().st_ino for name in finished} == finished
    # 2 shards of a label map each, each renamed once; two descriptions; three renames to publish.
    assert moment == 1 + 2 * 3 + 2 * 2 + 3 * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc, where it looks for processes")
def test_several_processes(processes, ade, output, tmp_path):
    """Catches images that several processes put in another order, progress that doesn't reach its end, workers that
    live on when their parent is killed, and a worker's death that hangs or is passed over."""
    prepare_benchmark("ade20k-150", ade, tmp_path / "whole", workers=1)
    seen = []
    prepare_benchmark("ade20k-150", ade, output, workers=2, progress=lambda *counts: seen.append(counts))
    assert contents(output) == contents(tmp_path / "whole")
    assert seen == sorted(seen) and seen[0] == (0, 4) and seen[-1] == (4, 4)

    output = tmp_path / "killed"
    process = processes.Process(target=prepare_until_killed, args=(str(ade), str(output), 2, {"workers": 2}))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    workers = json.loads((ade / "children").read_text())
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
    prepare_benchmark("ade20k-150", ade, output, workers=2)
    assert contents(output) == contents(tmp_path / "whole")

    def kill_workers(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(DataError, match="A process was killed, perhaps for want of memory.*fewer workers"):
        prepare_benchmark("ade20k-150", ade, tmp_path / "broken", workers=2, progress=kill_workers)
    prepare_benchmark("ade20k-150", ade, tmp_path / "broken", workers=1)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_the_command(ade, output):
    """Catches a command that says it was done when it wasn't, or shows a stack trace."""
    arguments = ["prepare", "ade20k-150", "--source", str(ade), "--output", str(output), "--workers", "1"]
    (ade / "images/training/ADE_train_00000002.jpg").unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and not output.exists()
    assert "Error: 1 files of ADE20K-150 (train) are missing: " in result.output
    shutil.copy(ade / "images/training/ADE_train_00000001.jpg", ade / "images/training/ADE_train_00000002.jpg")
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert f"{output}: ADE20K-150, 150 classes, 2 train, 2 validation" in result.output
    assert set(contents(output)) == COMPLETE
    result = CliRunner().invoke(app, ["prepare", "cityscapes", "--source", ".", "--output", "x"])
    assert result.exit_code == 2 and "ade20k-847" in result.output


@pytest.fixture
def hub(connect, monkeypatch):  # noqa: F811
    hub = Hub()
    hub.address = hub.start()
    connect(hub.address)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield hub
    hub.stop()


def test_push(hub, connect, monkeypatch, ade, output):  # noqa: F811
    """Catches an upload without the description, with what isn't finished, or that leaves shards of an earlier one."""
    hub.commit("someone/ade", {"data/train-00000-of-00001.parquet": b"old", "notes.md": b"mine", "README.md": b"old"})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = ["prepare", "ade20k-150", "--source", str(ade), "--output", str(output), "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--push", "someone/ade"])
    assert result.exit_code == 0, result.output
    assert f"Uploaded: {hub.address}/" in result.output
    files = hub.repositories["someone/ade"][-1]
    assert files == {"notes.md": b"mine"} | contents(output) and set(files) == COMPLETE | {"notes.md"}

    connect("http://127.0.0.1:9")  # where nobody is
    for repository in ("someone/ade", "no/such/name"):
        result = CliRunner().invoke(app, [*arguments, "--push", repository])
        assert result.exit_code == 2
        assert f"Error: '{output}' is complete, but could not be uploaded to '{repository}': " in result.output
    with pytest.raises(DataError, match="no prepared data set: there is no segmentation.json"):
        push_dataset(ade, "someone/ade")


@pytest.mark.parametrize("streaming", [False, True])
def test_from_the_hub(hub, ade, output, streaming):
    """Catches a pushed set that is loaded without its classes, or whose other splits are downloaded, too."""
    prepare_benchmark("ade20k-150", ade, output, workers=1)
    repository = f"someone/ade-{streaming}"
    hub.commit(repository, contents(output))
    data = load_segmentation_dataset(repository, "validation", streaming=streaming)
    assert (data.name, data.class_names[0], data.ignore_index) == ("ade20k-150", "wall", 255)
    examples = list(data)
    assert [name for _, _, name in examples] == ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    assert all(np.array_equal(label_map, bands([255, 0, 149, 39])) for _, label_map, _ in examples)
    assert any("validation" in request for request in hub.downloads())
    assert not any("train" in request for request in hub.downloads())
    with pytest.raises(DataError, match="has no split 'test', expected one of train, validation"):
        load_segmentation_dataset(repository, "test")


def test_the_page():
    """Catches a page about data that tells of other sets, counts and commands than there are."""
    page = (Path(shards.__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line] for line in lines]
    table = {row[0].strip("`"): row[1:4] for row in rows}
    assert table == {
        name: [
            " / ".join(f"{count:,}" for count in benchmark.splits.values()),
            str(len(benchmark.class_names)),
            str(benchmark.ignore_index),
        ]
        for name, benchmark in BENCHMARKS.items()
    }
    commands = set(re.findall(r"`san-hf prepare (\S+) --source \S+ --output \S+", page))
    assert commands == set(BENCHMARKS) - {"pascal-context-459"}  # "likewise"
    described = [get_command(app).commands[name] for name in ("prepare", "evaluate")]
    options = {option for command in described for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"[ \[`(](--[a-z-]+)", page)) <= options
