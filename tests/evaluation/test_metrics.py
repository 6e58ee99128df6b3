"""Figures from confusion matrices: the reference's, by hand, over shards, and as a metric of `evaluate`."""

import copy
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from san_hf.evaluation import ConfusionMatrixMetrics, segmentation_metric
from san_hf.evaluation.metrics import boundary_map
from san_hf.evaluation.segmentation_metric import SegmentationMetric


GOLDEN = Path(__file__).parents[1] / "fixtures" / "metrics"
CASES = json.loads((GOLDEN / "expected.json").read_text())


def golden_maps(case):
    maps = load_file(GOLDEN / "maps.safetensors")
    count = CASES[case]["images"]
    return [(maps[f"{case}.prediction.{i}"], maps[f"{case}.label.{i}"]) for i in range(count)]


def golden_metrics(case):
    return ConfusionMatrixMetrics(CASES[case]["num_classes"], CASES[case]["ignore_index"], boundary=case == "small")


def count(metrics, pairs):
    for prediction, label_map in pairs:
        metrics.update(prediction, label_map)
    return metrics


def figures(case):
    """What the reference expects: without the settings, and nan where it has null."""
    settings = ("num_classes", "ignore_index", "images")
    return {name: math.nan if v is None else v for name, v in CASES[case].items() if name not in settings}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case):
    """Catches any other definition: classes absent, only predicted, unlabelled pixels, boundaries, over 255 classes."""
    metrics = count(golden_metrics(case), golden_maps(case))
    results = metrics.compute([f"c{i}" for i in range(metrics.num_labels)])
    assert results.to_dict() == pytest.approx(figures(case), rel=1e-12, nan_ok=True)
    assert results.num_images == CASES[case]["images"]


@pytest.mark.parametrize("case", CASES)
def test_shards_add_up(case):
    """Catches counts that are lost, doubled or rounded between processes: any split gives the whole's matrices."""
    pairs = golden_maps(case)
    whole = count(golden_metrics(case), pairs)
    for split in range(len(pairs) + 1):
        merged, rest = count(golden_metrics(case), pairs[:split]), count(golden_metrics(case), pairs[split:])
        merged.merge(rest)
        for name, expected in whole.counts.items():
            assert torch.equal(merged.counts[name], expected), (split, name)


def test_definitions_by_hand():
    """
    Two classes in the ground truth, one only predicted, one nowhere. Catches averages over the wrong classes, and
    ignored pixels that count as predicted.
    """
    label_map = torch.tensor([[0, 0, 0, 1, 1, 255]])
    prediction = torch.tensor([[0, 0, 2, 1, 0, 2]])
    results = count(ConfusionMatrixMetrics(4, 255), [(prediction, label_map)]).compute()
    assert results.metrics == pytest.approx(
        {
            "mIoU": 100 * (2 / 4 + 1 / 2) / 2,
            "mIoU_over_present_or_predicted": 100 * (2 / 4 + 1 / 2) / 3,
            "fwIoU": 100 * (3 / 5 * 2 / 4 + 2 / 5 * 1 / 2),
            "mACC": 100 * (2 / 3 + 1 / 2) / 2,
            "pACC": 100 * 3 / 5,
        }
    )
    rows = results.per_class
    assert [row["ground_truth"] for row in rows] == [3, 2, 0, 0]
    assert [row["predicted"] for row in rows] == [3, 1, 1, 0]
    assert [row["name"] for row in rows] == ["0", "1", "2", "3"]
    assert [math.isnan(row["IoU"]) for row in rows] == [math.isnan(row["ACC"]) for row in rows] == [0, 0, 1, 1]


def test_predictions_outside_of_the_labels_are_misses_only():
    """Catches a larger vocabulary whose other words are dropped from the ground truth or credited to a class."""
    label_map = torch.tensor([[0, 0, 1, 1]])
    inside = count(ConfusionMatrixMetrics(3, 255), [(torch.tensor([[0, 2, 1, 1]]), label_map)]).compute()
    for other in (3, 4, 100_000):
        outside = count(ConfusionMatrixMetrics(3, 255), [(torch.tensor([[0, other, 1, 1]]), label_map)]).compute()
        assert [outside.per_class[0][key] for key in ("IoU", "ACC", "ground_truth")] == [50, 50, 2]
        assert outside.metrics["mIoU"] == inside.metrics["mIoU"] == 75
        # Predicted or not: the third class is only where it was predicted in its own name.
        assert outside.metrics["mIoU_over_present_or_predicted"] == 75
    assert inside.metrics["mIoU_over_present_or_predicted"] == 50


def test_nothing_labelled_is_nan():
    """Catches 0 or a division error where there is nothing to average."""
    results = count(ConfusionMatrixMetrics(2, 255), [(torch.zeros(2, 2, dtype=int), torch.full((2, 2), 255))]).compute()
    assert all(math.isnan(value) for value in results.metrics.values())
    assert [row["predicted"] for row in results.per_class] == [0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_dtypes(dtype):
    """Catches overflow, and 65535 read as -1."""
    ignored = 255 if dtype == np.uint8 else 32767 if dtype == np.int16 else 65535
    label_map = np.array([[0, 1, ignored]], dtype=dtype)
    results = count(ConfusionMatrixMetrics(200, ignored), [(np.array([[0, 1, 0]], dtype=dtype), label_map)]).compute()
    assert results.metrics["mIoU"] == 100 and results.per_class[0]["predicted"] == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (60, 80), (120, 97)])
def test_boundary_map_is_repeated_erosion(shape):
    """Catches a window of another size or another frame than 3 x 3 erosions, one after the other, with zeros around."""
    values = torch.randint(0, 300, shape, dtype=torch.int32)
    eroded = np.pad(values.numpy(), 1)
    for _ in range(max(1, round(0.02 * math.hypot(*shape)))):
        eroded = ndimage.minimum_filter(eroded, 3, mode="constant", cval=1000)
    assert np.array_equal(boundary_map(values), values.numpy() - eroded[1:-1, 1:-1])


def test_state_goes_on():
    """Catches a resumed evaluation that loses or doubles images, or a saved state that changes afterwards."""
    pairs = golden_maps("small")
    whole, half = count(golden_metrics("small"), pairs), count(golden_metrics("small"), pairs[:2])
    state = half.state_dict()
    saved = copy.deepcopy(state)
    count(half, pairs[2:])
    resumed = count(golden_metrics("small"), pairs[:1])
    resumed.load_state_dict(state)
    assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(saved[name])) for name in saved)
    count(resumed, pairs[2:])
    assert all(torch.equal(resumed.counts[name], whole.counts[name]) for name in whole.counts)


def test_other_settings_do_not_mix():
    """Catches a sum over matrices of other classes."""
    metrics = ConfusionMatrixMetrics(3, 255)
    for other, name in (
        (ConfusionMatrixMetrics(4, 255), "num_labels"),
        (ConfusionMatrixMetrics(3, 65535), "ignore_index"),
        (ConfusionMatrixMetrics(3, 255, boundary=True), "boundary"),
    ):
        with pytest.raises(ValueError, match=name):
            metrics.merge(other)
        with pytest.raises(ValueError, match=name):
            metrics.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("prediction", "label_map", "message"),
    [
        ([[0, 1]], [[0, 7]], r"label map has 7 at 1 pixels, expected 0\.\.2 or 255"),
        ([[0, 1]], [[0, 3]], "label map has 3 at"),
        ([[0, 1]], [[-1, 0]], "label map has -1 at"),
        ([[0, -2]], [[0, 1]], "prediction has -2 at 1 pixels"),
        ([[0, 1]], [[0], [1]], r"\(1, 2\), the label map \(2, 1\)"),
        ([[[0, 0]]], [[0]], r"prediction must be of shape \(height, width\), got \(1, 1, 2\)"),
        ([[2**32]], [[2**32 + 1]], "label map has 2147483647 at 1 pixels"),
        ([[0.5]], [[0]], "must hold integers"),
    ],
)
def test_wrong_maps(prediction, label_map, message):
    """Catches values that would count for another class, and images that are half counted."""
    metrics = ConfusionMatrixMetrics(3, 255, boundary=True)
    with pytest.raises(ValueError, match=message):
        metrics.update(torch.tensor(prediction), torch.tensor(label_map))
    assert all(not counts.any() for counts in metrics.counts.values())


def test_wrong_settings():
    with pytest.raises(ValueError, match="255 is also one of the 300 classes 0..299.*ignore_index_is_class=True"):
        ConfusionMatrixMetrics(300, 255)
    with pytest.raises(ValueError, match="at least 1"):
        ConfusionMatrixMetrics(0, 255)
    with pytest.raises(ValueError, match="2 class names for 3 labels"):
        ConfusionMatrixMetrics(3, 255).compute(["a", "b"])


def test_classes_of_one_name_keep_their_figures():
    """Catches a later class that hides an earlier one."""
    label_map = torch.tensor([[0, 1, 1]])
    flat = count(ConfusionMatrixMetrics(2, 255), [(torch.tensor([[0, 1, 0]]), label_map)]).compute(["x", "x"]).to_dict()
    assert flat["IoU-x"] == flat["IoU-x (1)"] == 50 and flat["ACC-x"] == 100 and flat["ACC-x (1)"] == 50


@pytest.fixture
def metric(tmp_path):
    return SegmentationMetric(6, 255, [f"c{i}" for i in range(6)], boundary=True, cache_dir=tmp_path / "cache")


def test_evaluate_metric_equals_reference(metric, tmp_path):
    """Catches other figures than the command's, label maps kept in files, and counts left over after compute."""
    first, *rest = golden_maps("small")
    for _ in range(2):
        metric.add(prediction=first[0], reference=first[1].numpy())
        metric.add_batch(predictions=[pair[0] for pair in rest], references=[pair[1] for pair in rest])
        assert len(metric) == 3
        assert metric.compute() == pytest.approx(figures("small"), nan_ok=True)
        assert len(metric) == 0
    pairs = [first, *rest]
    at_once = metric.compute(predictions=[pair[0] for pair in pairs], references=[pair[1] for pair in pairs])
    assert at_once == pytest.approx(figures("small"), nan_ok=True)
    assert not (tmp_path / "cache").exists()


def test_evaluate_loads_it_without_a_network(tmp_path, monkeypatch):
    """Catches a script that the library can't find a metric in."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    loaded = evaluate.load(segmentation_metric.__file__, num_labels=2)
    assert loaded.compute(predictions=[[[0, 1]]], references=[[[0, 255]]])["mIoU"] == 100


def test_evaluate_metric_says_what_is_wrong(metric):
    """Catches a batch that is half counted, and figures of nothing."""
    good, bad = np.zeros((2, 2), dtype=int), np.full((2, 2), 9)
    with pytest.raises(ValueError, match="Image 1 of the batch: The label map has 9"):
        metric.add_batch(predictions=[good, good], references=[good, bad])
    with pytest.raises(ValueError, match="Got 1 predictions for 2 references"):
        metric.add_batch(predictions=[good], references=[good, good])
    with pytest.raises(ValueError, match="nothing to compute from"):
        metric.compute()
    with pytest.raises(ValueError, match="num_process"):
        SegmentationMetric(2, num_process=2)
    with pytest.raises(ValueError, match="1 class names for 2 labels"):
        SegmentationMetric(2, class_names=["a"])


@pytest.mark.parametrize("dtype", [">i4", ">u2", ">i8", "<i2", "u1"])
def test_byte_orders_and_forms(dtype):
    """Arrays in another byte order, or with a last axis of one, counted as what they hold."""
    prediction, label_map = np.array([[0, 1, 1]]), np.array([[0, 1, 2]])
    expected = ConfusionMatrixMetrics(3, 255)
    expected.update(prediction, label_map)
    for form in (lambda x: x.astype(dtype), lambda x: x.astype(dtype)[..., None], lambda x: x.tolist()):
        metrics = ConfusionMatrixMetrics(3, 255)
        metrics.update(form(prediction), form(label_map))
        assert torch.equal(metrics.confusion_matrix, expected.confusion_matrix)


def test_an_ignored_class_that_is_meant():
    """Said to be meant, a class's own pixels count nowhere; an ignore index of -100 counts as any other."""
    counts = []
    for ignore_index, meant in ((1, True), (-100, False)):
        metrics = SegmentationMetric(3, ignore_index, ignore_index_is_class=meant)
        labels = np.array([[0, 1, 2, 2]])
        labels[labels == 1] = ignore_index
        metrics.add_batch(predictions=[np.array([[0, 1, 1, 2]])], references=[labels])
        counts.append(metrics.counts.confusion_matrix)
    assert torch.equal(*counts) and counts[0].sum() == 3
