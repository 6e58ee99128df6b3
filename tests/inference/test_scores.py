"""Scores of classes that a segmentation computes when asked for them."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from san_hf.inference import Segmenter, segment_frames


NAMES = ["cat, kitten", "grass", "sky; heaven", "red boat"]
OPTIONS = [
    {},
    {"expand": ["dog", "road", "tree"]},
    {"synonyms": True, "expand": ["dog", "road"], "threshold": 0.35, "other": "rest"},
    {"augment": True, "threshold": 0.2},
]


@torch.inference_mode()
def dense_scores(segmenter: Segmenter, image) -> torch.Tensor:
    """The definition, written out with maps of all classes and pixels: (labels, H, W)."""
    predictor, vocabulary = segmenter.predictor, segmenter.vocabulary
    ((views),) = (encoded.views for encoded in predictor.encode([image]))
    classifier = predictor.model.build_classifier(class_embeds=vocabulary.class_embeds)
    total = 0.0
    for view in views:
        logits = predictor.model.class_logits(view.mask_embeds, classifier)
        *words, nothing = logits.unbind(-1)
        if vocabulary.class_of_row is not None:
            rows = np.array(vocabulary.class_of_row)
            words = [torch.stack([words[row] for row in np.flatnonzero(rows == c)]).amax(0) for c in sorted(set(rows))]
        probabilities = torch.stack([*words, nothing], dim=-1).softmax(-1)[:, :-1]
        (height, width), patch = view.image_size, view.patch_size
        padded = [cells * side for cells, side in zip(view.mask_logits.shape[-2:], patch)]
        masks = F.interpolate(view.mask_logits[None], padded, mode="bilinear")[..., :height, :width]
        masks = F.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
        masks = masks.flip(-1) if view.mirrored else masks
        total += torch.einsum("qc,qhw->chw", probabilities, masks.sigmoid()) / len(views)
    scores = total / total.sum(0).clamp(min=1)
    own, others = scores[: vocabulary.num_labels], scores[vocabulary.num_labels :]
    if not vocabulary.has_other:
        return own
    other = others.amax(0, keepdim=True) if len(others) else torch.zeros_like(own[:1])
    return torch.cat([own, other])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_scores_are_the_dense_formulas(model, processor, images, options, passes):
    """Catches another normalisation than the confidence's, scores of words rather than classes, an "other" that isn't
    the best of the expansion, views that are left out, and another image's scores."""
    segmenter = Segmenter(model, processor, NAMES, confidence=True, **options)
    seen: set[int] = set()
    for image, got in zip(images[:3], segmenter(images[:3], batch_size=3), strict=True):
        before = passes["images"]
        scores = got.scores(got.class_names)
        assert passes["images"] == before
        expected = dense_scores(segmenter, image).numpy()
        assert scores.dtype == np.float32 and scores.shape == (len(got.class_names), *got.label_map.shape)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        np.testing.assert_allclose(scores.max(0), got.confidence, atol=1e-6)
        labels = scores.argmax(0)
        if "threshold" in options:
            labels[got.confidence < segmenter.vocabulary.threshold] = len(got.class_names) - 1
        assert (labels == got.label_map).mean() > 0.99  # rounding may make two classes equal
        seen.update(np.unique(labels))
    assert len(seen) > 2


def test_scores_carried_over_frames(model, processor, images):
    """Catches scores of one frame where the labels come from several, weighted."""
    segmenter = Segmenter(model, processor, NAMES, confidence=True)
    frames = [images[0], Image.blend(images[0], images[2], 0.1)]
    single, (_, carried) = segmenter(frames[1]), segment_frames(segmenter, frames, smooth=0.7)
    assert len(carried.predictions) == 2 and np.abs(carried.confidence - single.confidence).max() > 1e-3
    np.testing.assert_allclose(carried.scores(NAMES).max(0), carried.confidence, atol=1e-6)


def test_what_can_be_asked_for(model, processor, images):
    """Catches names and labels that are taken for others, boxes with rows and columns exchanged, and scores at one
    pixel that are another one's."""
    got = Segmenter(model, processor, NAMES, confidence=True, expand=["dog"])(images[0])
    scores = got.scores(range(5))
    sky = got.scores("sky; heaven")
    assert sky.shape == (got.height, got.width)
    np.testing.assert_allclose(sky, scores[2], atol=1e-6)
    np.testing.assert_array_equal(got.scores(np.int64(2)), sky)
    np.testing.assert_allclose(got.scores(["other", 0, "other"]), scores[[4, 0, 4]], atol=1e-6)
    assert got.scores([]).shape == (0, got.height, got.width)
    np.testing.assert_allclose(got.scores(("grass", 3), (70, 10, 90, 61)), scores[[1, 3], 10:61, 70:90], atol=1e-6)
    there = got.scores_at(71, 10)
    assert list(there.values()) == sorted(there.values(), reverse=True) and set(there) == set(got.class_names)
    assert [there[name] for name in got.class_names] == pytest.approx(scores[:, 10, 71], abs=1e-6)


@pytest.mark.parametrize(
    ("classes", "box", "message"),
    [
        ("ski", None, "Got the class 'ski', expected one of cat, kitten, grass, .*, or a label from 0 to 3"),
        (["grass", 4], None, "Got the class 4, expected"),
        (-1, None, "Got the class -1, expected"),
        (0, (0, 0, 91, 64), r"Got the box \(0, 0, 91, 64\), expected .* within an image of 90 x 64"),
        (0, (5, 5, 5, 6), "with at least one pixel"),
    ],
)
def test_what_can_not(model, processor, images, classes, box, message):
    """Catches a stack trace, or another class's scores, for a class or box that isn't there."""
    got = Segmenter(model, processor, NAMES, confidence=True)(images[0])
    with pytest.raises(ValueError, match=message):
        got.scores(classes, box)
    for x, y in ((90, 0), (0, 64), (-1, 0)):
        with pytest.raises(ValueError, match=rf"pixel \({x}, {y}\), expected x from 0 to 89 and y from 0 to 63"):
            got.scores_at(x, y)


def test_results_without_scores(model, processor, images):
    """Catches masks that are kept unasked for, and results that don't say why they have no scores."""
    plain = Segmenter(model, processor, NAMES)(images[0])
    assert not plain.predictions
    with pytest.raises(ValueError, match=r"no scores: ask for them by Segmenter\(..., confidence=True\)"):
        plain.scores("grass")
    windowed = Segmenter(model, processor, NAMES, confidence=True, tile=48)(images[0])
    assert windowed.confidence is not None and not windowed.predictions
    with pytest.raises(ValueError, match="made in windows, or by hand: segment the part .* without tile"):
        windowed.scores_at(0, 0)


def test_results_travel_with_their_scores(model, processor, images):
    """Catches results of one batch that hold each other's masks, or tensors that can't be pickled or copied."""
    segmenter = Segmenter(model, processor, NAMES, confidence=True)
    first = segmenter(images[:3], batch_size=3)[0]
    packed = pickle.dumps(first)
    alone = pickle.dumps(segmenter(images[0]))
    assert len(packed) == pytest.approx(len(alone), rel=0.01)
    for other in (pickle.loads(packed), copy.deepcopy(first)):
        assert other == first and hash(other) == hash(first)
        np.testing.assert_array_equal(other.scores(NAMES), first.scores(NAMES))
    (view,) = first.predictions
    kept = sum(tensor.untyped_storage().nbytes() for tensor in (view.mask_logits, view.probabilities))
    assert kept == 4 * (view.mask_logits.numel() + view.probabilities.numel())
