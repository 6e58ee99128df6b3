"""The label map of an image: exact, with little work on a processor and without waiting on an accelerator."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from san_hf.modeling.label_maps_san import MaskPrediction, class_scores, label_pixels


SIZES = [(36, 52), (67, 90), (200, 131), (45, 1)]


def logits_of(kind: str, num_classes: int, num_queries: int = 40, grid=(40, 54), seed: int = 0):
    """
    Masks (Q, h, w) and class logits (Q, C + 1). "regions": each class that is there has a query that is sure of it,
    most queries are none of them, as after training. "alike": all classes are nearly as likely at every pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, num_queries, 6, 8, generator=generator)
    masks = F.interpolate(noise, size=grid, mode="bicubic")[0]
    if kind == "alike":
        return masks * 4, torch.rand(num_queries, num_classes + 1, generator=generator)
    there = num_queries // 4
    others = torch.stack([masks[:there].roll(shift, 0) for shift in range(1, there)]).amax(0)
    masks[:there] = (masks[:there] - others) * 12
    masks[there:] = masks[there:] * 4 - 12
    classes = torch.randn(num_queries, num_classes + 1, generator=generator)
    classes[range(there), torch.randint(num_classes, (there,), generator=generator)] += 10
    classes[there:, -1] += 10
    return masks, classes


def prediction_of(kind, num_classes, target, image=(640, 853), mirrored=False, **options):
    masks, classes = logits_of(kind, num_classes, **options)
    return MaskPrediction.from_logits(masks, classes, (16, 16), image, target, mirrored)


def scores_of(views) -> torch.Tensor:
    """The definition, written out: (C, H, W), in double precision."""
    scores = 0.0
    for view in views:
        logits = torch.einsum(
            "yh,qhw,xw->qyx", view.height_weights.double(), view.mask_logits.double(), view.width_weights.double()
        )
        scores += torch.einsum("cq,qyx->cyx", view.probabilities.double(), logits.sigmoid()) / len(views)
    return scores


class Operators(TorchDispatchMode):
    """Counts what is dispatched, by name, and notes the most elements of one tensor that came out."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return results


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("num_classes", [3, 30, 300])
@pytest.mark.parametrize("kind", ["regions", "alike"])
@pytest.mark.parametrize("target", SIZES)
def test_labels_and_confidence(kind, num_classes, dense, target):
    """Catches a class that is left out and would have won, seams between tiles or strips, and a confidence of another
    class than the label's: the label is that of the highest score, or of one that rounding makes its equal."""
    view = prediction_of(kind, num_classes, target)
    expected = scores_of([view])
    pixels = label_pixels([view], dense=dense)
    assert pixels.labels.shape == target and pixels.labels.dtype == torch.int64 and pixels.scores is None
    best = expected.amax(0)
    assert (expected.gather(0, pixels.labels[None])[0] >= best * (1 - 1e-6)).all()
    confidence = (best / expected.sum(0).clamp(min=1)).float()
    torch.testing.assert_close(pixels.confidence, confidence, rtol=1e-4, atol=1e-6)
    alone = label_pixels([view], return_confidence=False, dense=dense)
    assert torch.equal(alone.labels, pixels.labels) and alone.confidence is None


@pytest.mark.parametrize("options", [{}, {"num_labels": 20}, {"threshold": 0.4}, {"num_labels": 20, "threshold": 0.4}])
def test_both_ways_agree_on_all_options(options):
    """Views of different grids, one of them mirrored, with classes that are one "other" and pixels below a threshold:
    catches an option that only one of the two ways knows."""
    views = [
        prediction_of("regions", 60, (90, 120)),
        prediction_of("regions", 60, (90, 120), image=(320, 427), mirrored=True, grid=(20, 27), seed=1),
    ]
    tiles, strips = (label_pixels(views, **options, dense=dense) for dense in (False, True))
    scored = label_pixels(views, **options, return_scores=True)
    for pixels in (strips, scored):
        assert (pixels.labels != tiles.labels).float().mean() < 1e-3  # equal but for rounding
        torch.testing.assert_close(pixels.confidence, tiles.confidence, rtol=1e-4, atol=1e-6)
    expected = scores_of(views).float()
    if "num_labels" in options:
        expected = torch.cat((expected[:20], expected[20:].amax(0, keepdim=True)))
    torch.testing.assert_close(scored.scores, expected, rtol=1e-4, atol=1e-6)
    assert len(tiles.labels.unique()) > 3


@pytest.mark.parametrize("num_labels", [None, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_of_classes(shared, num_labels, monkeypatch):
    """Views of different grids, alike or by shares, in strips of a few rows: catches scores that aren't normalised as
    the confidence is, an "other" that is a sum or one class, and a part of the label map from elsewhere in it."""
    monkeypatch.setattr("san_hf.modeling.label_maps_san.VALUES_AT_ONCE", 2**16)
    views = [
        prediction_of("regions", 60, (90, 120)),
        prediction_of("regions", 60, (90, 120), image=(320, 427), mirrored=True, grid=(20, 27), seed=1),
    ]
    expected = scores_of(views)
    if shared:
        shares = torch.full((90,), 1.0), torch.linspace(0, 1, 120)
        views = [replace(view, shares=(shares[0], share)) for view, share in zip(views, (shares[1], 1 - shares[1]))]
        expected = scores_of(views[:1]) * shares[1] + scores_of(views[1:]) * (1 - shares[1])
    expected = expected / expected.sum(0).clamp(min=1)
    if num_labels is not None:
        expected = torch.cat((expected[:num_labels], expected[num_labels:].amax(0, keepdim=True)))
    got = class_scores(views, range(len(expected)), num_labels)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)
    pixels = label_pixels(views, num_labels)
    torch.testing.assert_close(got.amax(0), pixels.confidence, rtol=1e-5, atol=1e-6)
    some, rows, columns = [len(expected) - 1, 3], slice(40, 71), slice(100, 101)
    parts = [
        view.part(rows, columns, (view.shares[0][rows], view.shares[1][columns]) if shared else None) for view in views
    ]
    torch.testing.assert_close(class_scores(parts, some, num_labels), got[some][:, rows, columns])


def test_scores_are_not_all_at_once():
    """Catches the scores of all 300 classes at all pixels, for which one class is computed."""
    view = prediction_of("regions", 300, (900, 1200), image=(640, 853))
    with torch.no_grad(), Operators() as operators:
        class_scores([view], [7, 250], num_labels=250)
    assert operators.largest <= 2**22  # values; all scores are 300 * 900 * 1200, all masks 40 * 900 * 1200


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("num_classes", [9, 90])
def test_equal_scores_give_the_first_class(num_classes, dense):
    """As argmax does, whatever is left out on the way."""
    masks, _ = logits_of("alike", num_classes)
    classes = torch.zeros(len(masks), num_classes + 1)
    view = MaskPrediction.from_logits(masks, classes, (16, 16), (640, 853), (90, 120))
    assert not label_pixels([view], dense=dense).labels.any()
    classes[:, 4:] += 1  # the first of the likeliest
    view = MaskPrediction.from_logits(masks, classes, (16, 16), (640, 853), (90, 120))
    assert (label_pixels([view], dense=dense).labels == 4).all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_type_of_labels(dtype, dense):
    view = prediction_of("regions", 60, (90, 120))
    expected = label_pixels([view]).labels
    got = label_pixels([view], dtype=dtype, dense=dense, num_labels=50, threshold=0.5).labels
    assert got.dtype == dtype
    assert torch.equal(got.long(), label_pixels([view], num_labels=50, threshold=0.5).labels)
    assert torch.equal(label_pixels([view], dtype=dtype, dense=dense).labels.long(), expected)


@pytest.mark.parametrize("options", [{"return_confidence": False}, {}, {"threshold": 0.4, "num_labels": 15}])
@pytest.mark.parametrize("num_classes", [20, 171, 847])
def test_operators_on_an_accelerator(num_classes, options):
    """
    One image of 1200 x 1600 on a device that can't be looked at: nothing that waits for it, and few operators. Catches
    a look at a value (which a tensor without data refuses), and operators for each tile or class.
    """
    masks = torch.empty(100, 40, 54, device="meta")
    classes = torch.empty(100, num_classes + 1, device="meta")
    with torch.no_grad(), Operators() as operators:
        view = MaskPrediction.from_logits(masks, classes, (16, 16), (640, 853), (1200, 1600))
        pixels = label_pixels([view], **options)
    assert pixels.labels.shape == (1200, 1600) and pixels.labels.device.type == "meta"
    assert operators.counts.total() < 100
    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal.default", "_unique", "masked_select")
    assert not [name for name in operators.counts if any(word in name for word in waiting)]
    assert operators.largest <= 2**29  # of (847 + 100) * 1200 * 1600


def test_operators_of_the_dense_way_on_a_processor():
    """The same operators, whatever the values: no shape and no number of them depends on what is in the logits."""
    counts = []
    for kind in ("regions", "alike"):
        view = prediction_of(kind, 171, (300, 400))
        with torch.no_grad(), Operators() as operators:
            label_pixels([view], dense=True)
        assert not [name for name in operators.counts if "_local_scalar_dense" in name or "nonzero" in name]
        counts.append(operators.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("which", ["masks", "classes"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(which, value):
    """A CPU refuses them at once; an accelerator, which isn't waited for, has no label for them, and a later check."""
    masks, classes = logits_of("regions", 30)
    (masks if which == "masks" else classes)[3, 5] = value
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        MaskPrediction.from_logits(masks, classes, (16, 16), (640, 853), (45, 60))
    view = prediction_of("regions", 30, (45, 60))
    view = MaskPrediction(masks, classes.softmax(-1)[:, :-1].T, view.height_weights, view.width_weights)
    assert (label_pixels([view], dense=True, num_labels=20).labels == -1).all()
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        view.check()


@pytest.mark.parametrize(
    "kind, num_classes, most",
    [
        # Share of the multiplications that all scores take; measured: 0.057, 0.033, 0.148, 0.046.
        ("regions", 171, 0.08),
        ("regions", 847, 0.05),
        ("alike", 171, 0.2),
        ("alike", 847, 0.07),
    ],
)
def test_few_scores_are_computed(kind, num_classes, most):
    """Catches bounds that no longer leave classes out: the multiplications, resizing included."""
    view = prediction_of(kind, num_classes, (600, 800))
    with FlopCounterMode(display=False) as counter:
        label_pixels([view], return_confidence=False)
    assert counter.get_total_flops() < most * 2 * view.probabilities.numel() * 600 * 800


def test_no_tensor_of_all_scores():
    """12 megapixels would be 41 GB of scores: nothing larger than the label map itself, and the masks of a strip."""
    view = prediction_of("regions", 847, (1500, 2000))
    with torch.no_grad(), Operators() as operators:
        label_pixels([view], return_confidence=False, dtype=torch.int16)
    assert operators.largest == 1500 * 2000
