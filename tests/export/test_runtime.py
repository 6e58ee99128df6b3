"""Exported folders in place of a model."""

import ctypes
import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from san_hf.export import ExportedVision, ExportError, load_exported
from san_hf.export.targets import TARGETS
from san_hf.inference import Predictor, Segmenter
from tests.export.conftest import NAMES
from tests.tiny import segmenting_model


# Tracing takes half a minute of an idle processor.
pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnx", marks=slow)])
def test_the_same_label_maps(runtime, exported, model, processor, images):
    """Catches other results than the model's, in batches, with synonyms, "other", confidence and augmentation."""
    folder, labels = exported(runtime, "open"), set()
    for options in ({}, {"expand": ["house", "tree"], "confidence": True}, {"augment": True}):
        ours = Segmenter.from_pretrained(folder, NAMES, runtime=runtime, **options)
        for got, expected in zip(ours(images, batch_size=4), Segmenter(model, processor, NAMES, **options)(images)):
            assert got.class_names == expected.class_names
            labels.update(expected.label_map.flat)
            assert (got.label_map != expected.label_map).mean() < 0.005  # a tie may go the other way
            if expected.confidence is not None:
                np.testing.assert_allclose(got.confidence, expected.confidence, atol=1e-3)
    assert len(labels) > 3


def test_two_steps(exported, model, processor, images, monkeypatch):
    """Catches new words that cost a vision pass, and a graph that runs once for each image of a batch."""
    folder, shapes = exported("openvino", "open"), []
    run = TARGETS["openvino"].Runner.__call__

    def count(self, inputs, outputs):
        shapes.append(inputs["pixel_values"].shape)
        return run(self, inputs, outputs)

    monkeypatch.setattr(TARGETS["openvino"].Runner, "__call__", count)
    predictor = Predictor(model, processor, runtime=ExportedVision(folder, "openvino"))
    encoded = predictor.encode(images)
    assert sorted(shape[0] for shape in shapes) == [1, 1, 2]
    for names in (NAMES, NAMES[:2]):
        got = predictor.classify(encoded, predictor.vocabulary(names))
        expected = Predictor(model, processor)(images, predictor.vocabulary(names))
        assert all((one != other).float().mean() < 0.005 for one, other in zip(got, expected))
    assert len(shapes) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/self/maps")
def test_signals_after_graphs_are_gone(exported):
    """Catches a stack for signals that is no longer mapped, once runners have gone in the order in which they came."""
    vision = [ExportedVision(exported("openvino", "open"), "openvino") for _ in range(2)]
    for runner in vision:
        runner(torch.zeros(1, 3, 64, 64))
    del runner
    while vision:
        vision.pop(0)
        gc.collect()
        for start, size in signal_stack():
            assert is_mapped(start, start + size)


def signal_stack():
    """Address and size of this thread's stack for signals, if it has one."""

    class Stack(ctypes.Structure):
        _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return [(stack.start, stack.size)] if stack.start else []


def is_mapped(start, stop):
    """Whether all of this memory can be written to; regions that touch count as one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, end = (int(edge, 16) for edge in span.split("-"))
        if first <= start < end and "w" in rights:
            start = min(end, stop)
    return start == stop


def test_what_is_refused(exported, model, processor, tmp_path, monkeypatch):
    """Catches folders, sizes and settings that a graph isn't for, taken without a word."""
    folder = exported("openvino", "open")
    vision = ExportedVision(folder, "openvino")
    with pytest.raises(ExportError, match="Got images of 60 x 64, expected sides of at least 32 that are multiples"):
        vision(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ExportError, match="doesn't give 'output_attentions'"):
        vision(torch.zeros(1, 3, 64, 64), output_attentions=True)
    with pytest.raises(ExportError, match="of another model"):
        Predictor(_other_model(), processor, runtime=vision)
    for arguments, match in (
        ((folder, "onnx"), "was exported for openvino, got the runtime 'onnx'"),
        ((folder, "torch"), "Got the runtime 'torch', expected one of onnx, openvino"),
        ((tmp_path, "onnx"), "is no exported folder"),
        ((folder, "openvino", "cuda"), "run on the CPU"),
        ((folder, "openvino", "cpu", torch.float16), "computes in float32 here, got torch.float16"),
    ):
        with pytest.raises(ExportError, match=match):
            load_exported(*arguments)
    closed = (folder / "san_hf.json").read_text().replace('"form": "open"', '"form": "closed"')
    (tmp_path / "san_hf.json").write_text(closed)
    with pytest.raises(ExportError, match="of the closed form"):
        load_exported(tmp_path, "openvino")


def _other_model():
    model = segmenting_model()
    with torch.no_grad():
        model.model.side_adapter.query_tokens.mul_(2)
    return model
