"""Annotation files that nobody should trust: run-length codes, MATLAB's variables, Pascal in Detail's JSON."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from pycocotools import mask as coco
from scipy.io import savemat

from san_hf.data import DataError
from san_hf.data.benchmarks import pascal_context_59
from san_hf.data.benchmarks.annotations import decode_rle, read_mat, to_ids


SIZE = (20, 30)


@pytest.mark.parametrize("seed", range(6))
def test_runs_as_cocos_api_reads_them(seed):
    """Catches columns taken for rows, a run's sign or its difference to an earlier one lost: both forms, any mask."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 90, 2).tolist())
    mask = (rng.random(size) < rng.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
    if seed == 0:
        mask[:] = 1  # starts with a run of length 0
    code = coco.encode(np.asfortranarray(mask))
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0)).tolist()
    lengths = np.diff([0, *changes, mask.size]).tolist()
    for counts in (code["counts"].decode(), lengths):
        decoded = decode_rle({"size": list(size), "counts": counts}, size)
        assert decoded.dtype == bool and np.array_equal(decoded, mask)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"size": [20, 30], "counts": [0, 10**9]}, "add up to 1,000,000,000: expected the image's 600 pixels"),
        ({"size": [20, 30], "counts": [0, 2**70]}, "add up to"),
        ({"size": [20, 30], "counts": [-5, 605]}, "some of them negative"),
        ({"size": [20, 30], "counts": [0, 10]}, "add up to 10:"),
        ({"size": [20, 30], "counts": []}, "add up to 0:"),
        ({"size": [20, 30], "counts": [0.0, 600.0]}, "expected a text or a list of integers"),
        ({"size": [20, 30], "counts": [True] * 600}, "expected a text or a list of integers"),
        ({"size": [20, 30], "counts": 5}, "expected a text or a list of integers"),
        ({"size": [20, 30], "counts": None}, "expected a text or a list of integers"),
        ({"size": [20, 30], "counts": ""}, "expected a run-length code of COCO's API"),
        ({"size": [20, 30], "counts": "é"}, "expected a run-length code of COCO's API"),
        ({"size": [20, 30], "counts": "\x7f" * 40}, "expected a run-length code of COCO's API"),
        ({"size": [20, 30], "counts": "o" * 13}, "cut short"),
        ({"size": [20, 30], "counts": "o" * 12 + "0"}, "a run longer than any image"),
        ({"size": [20, 30], "counts": "0" * 10_000_000}, "more runs than its image has pixels"),
        ({"size": [20, 30], "counts": "00"}, "add up to 0:"),
        ({"size": [100_000, 100_000], "counts": [0, 10**10]}, "has the size .100000, 100000., its image .20, 30."),
        ({"size": [-20, -30], "counts": [0, 600]}, "has the size"),
        ({"size": [30, 20], "counts": [0, 600]}, "has the size"),
        ({"size": ["20", "30"], "counts": [0, 600]}, "has the size"),
        ({"size": [20.0, 30.0], "counts": [0, 600]}, "has the size"),
        ({"size": 600, "counts": [0, 600]}, "has the size"),
        ({"size": [20, 30]}, "expected a run-length code"),
        ([[1, 1, 5, 1, 5, 5]], "expected a run-length code"),
        (None, "expected a run-length code"),
    ],
)
def test_runs_that_are_none(region, message):
    """Catches regions that are made of whatever was in memory, or as large as a file says."""
    with pytest.raises(ValueError, match=message):
        decode_rle(region, SIZE)


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float64])
def test_variables_of_matlab(tmp_path, compressed, kind):
    """Catches a number type, or a file with compression or without it, that is read wrongly."""
    values = np.arange(600).reshape(SIZE).astype(kind) % 250
    file = tmp_path / "x.mat"
    savemat(file, {"a": 1, "LabelMap": values, "b": "text"}, do_compression=compressed)
    read = to_ids(read_mat(file, "LabelMap", SIZE), 460)
    assert read.dtype == np.int32 and np.array_equal(read, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((30, 20), np.uint16), "is 20 x 30, its image 30 x 20 pixels"),
        (np.zeros((20, 30, 2), np.uint16), "is 30 x 20, its image|is 20 x 30 x 2, its image"),
        (np.full(SIZE, 65536.5), "has the values 65536.5: expected integers, 0..459"),
        (np.full(SIZE, 2.5), "has the values 2.5"),
        (np.full(SIZE, np.nan), "has the values nan"),
        (np.full(SIZE, np.inf), "has the values inf"),
        (np.full(SIZE, -1, np.int16), "has the values -1"),
        (np.full(SIZE, 2**32 + 2, np.int64), "has the values 4294967298"),
        (np.full(SIZE, 460, np.uint16), "has the values 460"),
        (np.full(SIZE, 1 + 1j), "complex"),
        (np.array([["x" * 30]] * 20), "of the type char"),
        (np.full(SIZE, None, object), "of the type cell|"),
    ],
)
def test_variables_that_are_no_labels(tmp_path, values, message):
    """Catches numbers that become labels of another class when they are cast."""
    values = np.where(values == None, "x", values) if values.dtype == object else values  # noqa: E711
    savemat(tmp_path / "x.mat", {"LabelMap": values})
    with pytest.raises(ValueError, match=message):
        to_ids(read_mat(tmp_path / "x.mat", "LabelMap", SIZE), 460)


def test_files_of_matlab_that_fill_the_memory(tmp_path):
    """Catches a file of kilobytes that unpacks to gigabytes, and one that announces them."""
    buffer = io.BytesIO()
    savemat(buffer, {"LabelMap": np.zeros(SIZE, np.uint16)})
    header = buffer.getvalue()[:128]
    file = tmp_path / "x.mat"
    bomb = zlib.compress(bytes(50_000_000))
    file.write_bytes(header + element(15, bomb))
    with pytest.raises(ValueError, match="unpacks to more than 70,336 bytes"):
        read_mat(file, "LabelMap", SIZE)
    savemat(buffer, {"LabelMap": np.zeros((3000, 3000))}, do_compression=True)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="unpacks to more than|too many for labels of"):
        read_mat(file, "LabelMap", SIZE)
    file.write_bytes(header + struct.pack("<II", 14, 1 << 31))
    with pytest.raises(ValueError, match="is cut short"):
        read_mat(file, "LabelMap", SIZE)
    file.write_bytes(header + element(15, bomb[:-40]))
    with pytest.raises(ValueError, match="unpacks to more than|is cut short"):
        read_mat(file, "LabelMap", SIZE)
    file.write_bytes(header + element(15, b"no zlib"))
    with pytest.raises(ValueError, match="is damaged"):
        read_mat(file, "LabelMap", SIZE)
    file.write_bytes(b"x" * 200_000)
    with pytest.raises(ValueError, match="too many for labels of 30 x 20 pixels"):
        read_mat(file, "LabelMap", SIZE)
    file.write_bytes(b"\x89HDF" * 40)
    with pytest.raises(ValueError, match="is no MATLAB 5 file"):
        read_mat(file, "LabelMap", SIZE)


GOOD_IMAGE = {"image_id": 1, "file_name": "a.jpg", "phase": "val"}
GOOD_REGION = {"image_id": 1, "category_id": 2, "segmentation": {"size": [20, 30], "counts": [0, 600]}}


@pytest.mark.parametrize(
    ("images", "regions", "message"),
    [
        ([GOOD_IMAGE | {"file_name": "../a.jpg"}], [GOOD_REGION], "a file's name without a folder"),
        ([GOOD_IMAGE | {"file_name": ".."}], [GOOD_REGION], "a file's name without a folder"),
        ([GOOD_IMAGE | {"file_name": "a\\b.jpg"}], [GOOD_REGION], "a file's name without a folder"),
        ([GOOD_IMAGE | {"file_name": ""}], [GOOD_REGION], "a file's name without a folder"),
        ([GOOD_IMAGE | {"file_name": 3}], [GOOD_REGION], "has no 'images' with"),
        ([GOOD_IMAGE | {"image_id": [1]}], [GOOD_REGION], "has no 'images' with"),
        ([GOOD_IMAGE, GOOD_IMAGE | {"image_id": 2}], [GOOD_REGION], "images of the same file_name: a.jpg"),
        ([GOOD_IMAGE, GOOD_IMAGE | {"file_name": "b.jpg"}], [GOOD_REGION], "images of the same image_id: 1"),
        ([GOOD_IMAGE], [GOOD_REGION | {"category_id": 460}], "of the category_id 460 in the image 1, expected 0..459"),
        ([GOOD_IMAGE], [GOOD_REGION | {"category_id": -1}], "of the category_id -1"),
        ([GOOD_IMAGE], [GOOD_REGION | {"category_id": 2.5}], "has no 'annos_segmentation' with"),
        ([GOOD_IMAGE], [GOOD_REGION | {"category_id": True}], "has no 'annos_segmentation' with"),
        ([GOOD_IMAGE], ["text"], "has no 'annos_segmentation' with"),
        ([GOOD_IMAGE], {}, "has no 'annos_segmentation' with"),
    ],
)
def test_wrong_annotations_of_detail(tmp_path, images, regions, message):
    """Catches ids that are none, images that share their regions, and names that lead to other folders."""
    file = tmp_path / "trainval_merged.json"
    file.write_text(json.dumps({"images": images, "annos_segmentation": regions}))
    with pytest.raises(DataError, match=message):
        pascal_context_59.read_detail(file)
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is no JSON"):
        pascal_context_59.read_detail(file)
