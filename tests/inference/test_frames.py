"""Frames segmented one after the other, with and without scores that are carried over."""

import numpy as np
import pytest
import torch
from PIL import Image

from san_hf.inference import FrameSegmenter, Predictor, Segmenter, segment_frames
from san_hf.inference.frames import CARRIED_FRAMES
from san_hf.modeling.label_maps_san import MaskPrediction, label_pixels


NAMES = ["cat", "grass", "sky", "house"]


@pytest.fixture(scope="module")
def segmenter(model, processor):
    return Segmenter(model, processor, NAMES, confidence=True)


@pytest.fixture(scope="module")
def still() -> list[Image.Image]:
    """A still scene, 24 times, with a camera's noise."""
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
    pixels = np.asarray(scene).astype(float)
    return [
        Image.fromarray((pixels + rng.normal(0, 25, pixels.shape)).clip(0, 255).astype(np.uint8)) for _ in range(24)
    ]


def label_maps(segmentations) -> list[np.ndarray]:
    return [segmentation.label_map for segmentation in segmentations]


def flicker(maps: list[np.ndarray]) -> float:
    """Share of pixels whose label changes from one frame to the next."""
    return float(np.mean([before != after for before, after in zip(maps, maps[1:])]))


def test_without_smoothing_frames_are_images(segmenter, images):
    """Catches frames that differ from the same images segmented one by one, of whatever sizes they are."""
    assert list(segment_frames(segmenter, iter(images))) == segmenter(images)
    windows = Segmenter(segmenter.predictor.model, segmenter.predictor.processor, NAMES, tile=48, overlap=8)
    assert list(segment_frames(windows, images[:2])) == windows(images[:2])


def test_smoothing_calms_a_still_scene(segmenter, still):
    """Catches labels that are carried instead of scores, weights that are ignored, and flicker that stays."""
    shares = [flicker(label_maps(segment_frames(segmenter, still, smooth))) for smooth in (0, 0.5, 1)]
    assert 0.005 < shares[0] and shares[1] < 0.6 * shares[0] and shares[2] < 0.5 * shares[1], shares


@torch.inference_mode()
@pytest.mark.parametrize("smooth, carried", [(0.2, 1), (0.5, 4), (1, CARRIED_FRAMES)])
def test_scores_are_averaged(segmenter, still, smooth, carried):
    """Catches weights, and a length of memory, other than documented: compared with the average of whole score maps."""
    predictor, vocabulary = segmenter.predictor, segmenter.vocabulary
    frames = still[: carried + 3]
    found = list(segment_frames(segmenter, frames, smooth))
    classifier = predictor.model.build_classifier(class_embeds=vocabulary.class_embeds)
    scores = []
    for image in predictor.encode(frames):
        (view,) = image.views
        logits = predictor.model.class_logits(view.mask_embeds, classifier)
        prediction = MaskPrediction.from_logits(
            view.mask_logits, logits, view.patch_size, view.image_size, image.target_size
        )
        scores.append(label_pixels([prediction], return_scores=True).scores.double())
    for last, segmentation in enumerate(found):
        ages = range(min(last, carried) + 1)
        weights = [smooth**age for age in ages]
        mean = sum(weight * scores[last - age] for weight, age in zip(weights, ages)) / sum(weights)
        top = mean.topk(2, dim=0).values
        clear = (top[0] - top[1] > 1e-5).numpy()
        assert clear.mean() > 0.99
        assert np.array_equal(mean.argmax(0).numpy()[clear], segmentation.label_map[clear])
        confidence = top[0] / mean.sum(0).clamp(min=1)
        assert np.abs(confidence.numpy() - segmentation.confidence).max() < 1e-5


def test_nothing_is_carried_over_a_cut(segmenter, still):
    """Catches ghosts of the scene before, and a cut seen in noise; another size is a cut, too."""
    other = [Image.fromarray(255 - np.asarray(image)) for image in still[:6]]
    larger = [image.resize((120, 64)) for image in still[:3]]
    cuts = [still[:6], other, larger, other[:3]]
    together = list(segment_frames(segmenter, [frame for scene in cuts for frame in scene], 0.8))
    assert together == [one for scene in cuts for one in segment_frames(segmenter, scene, 0.8)]
    # A scene alone goes on where it was.
    assert together[5] != next(segment_frames(segmenter, still[5:6], 0.8))


def test_frames_that_are_passed_over(segmenter, still):
    """Catches a run that goes on with other labels than those of an unbroken one."""
    unbroken = list(segment_frames(segmenter, still[:12], 0.5))
    again = FrameSegmenter(segmenter, 0.5)
    for frame in still[8 - again.carried_frames : 8]:
        again.pass_over(frame)
    assert [again(frame) for frame in still[8:12]] == unbroken[8:]


def test_each_frame_is_encoded_once(segmenter, still, monkeypatch):
    """Catches earlier frames that go through the model again for each later one, and frames that pile up."""
    encoded, encode = [], Predictor.encode

    def count(self, images):
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Predictor, "encode", count)
    taken = 0

    def frames():
        nonlocal taken
        for frame in still[:10]:
            taken += 1
            yield frame

    for number, _ in enumerate(segment_frames(segmenter, frames(), 0.9), start=1):
        assert number <= taken <= number + 2
    assert encoded == [1] * 10


def test_other_words_for_the_same_frames(model, processor, still):
    """Catches scores of old words carried on: what is carried knows no classes."""
    segmenter = Segmenter(model, processor, NAMES)
    frames = FrameSegmenter(segmenter, 0.5)
    frames(still[0])
    segmenter.vocabulary = segmenter.predictor.vocabulary(["dog", "sea"])
    assert frames(still[1]) == list(segment_frames(segmenter, still[:2], 0.5))[1]


def test_augmented_views_are_carried(model, processor, still):
    """Catches views of one frame that count as frames."""
    segmenter = Segmenter(model, processor, NAMES, augment=True)
    once = segmenter(still[0]).label_map
    assert np.mean(once != list(segment_frames(segmenter, [still[0]] * 3, 1))[2].label_map) < 1e-3


@pytest.mark.parametrize("smooth", [-0.1, 1.1, float("nan")])
def test_out_of_range(segmenter, smooth):
    """Catches weights that grow with age."""
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        FrameSegmenter(segmenter, smooth)
    with pytest.raises(ValueError, match="smooth and tile"):
        FrameSegmenter(Segmenter(segmenter.predictor.model, segmenter.predictor.processor, NAMES, tile=48), 0.5)
