"""Large images in overlapping windows."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from san_hf import Segmenter
from san_hf.cli import app
from san_hf.inference.windows import Windows
from san_hf.modeling import SANModel
from san_hf.modeling.label_maps_san import label_pixels
from tests.inference.conftest import four_pages


NAMES = ["sky", "grass", "house", "tree", "water"]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained(class_names=NAMES, confidence=True)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return four_pages(352, 320)


def windowed(segmenter, tile, overlap=None, **options) -> Segmenter:
    predictor = segmenter.predictor
    return Segmenter(predictor.model, predictor.processor, NAMES, tile=tile, overlap=overlap, **options)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 100, 127, 128, 129, 1000])
@pytest.mark.parametrize(("size", "overlap"), [(64, 0), (64, 16), (64, 32), (1, 0), (33, 16)])
def test_windows_cover_each_pixel_once(length, size, overlap):
    """Pixels of no window, shares that don't add up, windows beyond the image or with less in common."""
    sides = Windows(size, overlap).along(length)
    total, touched = torch.zeros(length), torch.zeros(length, dtype=int)
    for side in sides:
        assert side.place.stop - side.place.start == len(side.shares) == min(size, length)
        total[side.place] += side.shares
        touched[side.place] += 1
    torch.testing.assert_close(total, torch.ones(length))
    assert touched.min() >= 1 and touched.max() <= 3
    for side, following in zip(sides, sides[1:]):
        assert side.place.stop - following.place.start >= overlap
    assert len(sides) == 1 or len(sides) <= -(-(length - overlap) // (size - overlap))


def test_small_images_are_whole(segmenter, picture):
    """Windows of images that fit into one."""
    whole, in_windows = segmenter(picture), windowed(segmenter, 352, confidence=True)(picture)
    assert in_windows == whole


@torch.inference_mode()
def test_blended_as_scores(segmenter, picture):
    """Windows that are shifted, blended by labels rather than by scores, or by shares of other pixels."""
    predictor, vocabulary = segmenter.predictor, segmenter.vocabulary
    windows = Windows(160, 48)
    found = predictor.label_windows(picture, windows, vocabulary, return_confidence=True)
    classifier = predictor.model.build_classifier(class_embeds=vocabulary.class_embeds)
    scores = torch.zeros(len(NAMES), picture.height, picture.width)
    for row in windows.along(picture.height):
        for column in windows.along(picture.width):
            crop = picture.crop((column.place.start, row.place.start, column.place.stop, row.place.stop))
            (encoded,) = predictor.encode([crop])
            (prediction,) = predictor._predict_masks(encoded, vocabulary, classifier)
            share = row.shares[:, None] * column.shares
            scores[:, row.place, column.place] += share * label_pixels([prediction], return_scores=True).scores
    best, labels = scores.max(0)
    close = scores.topk(2, dim=0).values.diff(dim=0)[0].abs() < 1e-5
    assert ((found.labels == labels) | close).all() and len(labels.unique()) > 2
    torch.testing.assert_close(found.confidence, best / scores.sum(0).clamp(min=1), rtol=1e-4, atol=1e-5)


def test_no_seam(segmenter, picture):
    """
    Edges of windows that show: in an image of repeated parts, as far apart as the windows, each part is like the
    others. And where a window ends, its share has vanished.
    """
    part = picture.crop((96, 80, 160, 208))  # 64 x 128
    repeated = Image.new("RGB", (384, 128))
    for left in range(0, 384, 64):
        repeated.paste(part, (left, 0))
    found = windowed(segmenter, 128, 64, confidence=True)(repeated)
    for left in range(128, 320, 64):  # those that two windows see
        np.testing.assert_array_equal(found.label_map[:, left : left + 64], found.label_map[:, 64:128])
        np.testing.assert_allclose(found.confidence[:, left : left + 64], found.confidence[:, 64:128], atol=1e-5)
    assert len(np.unique(found.label_map)) > 1
    for side in Windows(128, 64).along(384)[1:-1]:
        assert side.shares[[0, -1]].max() < 0.01 and side.shares.diff().abs().max() < 0.02


def test_each_window_goes_through_the_model_once(segmenter, picture, monkeypatch):
    """Rows of windows that are encoded again for the pixels that they share with the next row."""
    seen, forward = [], SANModel.forward

    def count(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(SANModel, "forward", count)
    segmenter.predictor.label_windows(picture, Windows(128, 32), segmenter.vocabulary, batch_size=2)
    rows, columns = (len(Windows(128, 32).along(length)) for length in (picture.height, picture.width))
    assert sum(seen) == rows * columns == 3 * 4 and max(seen) == 2


def test_command(picture, tmp_path, segmenter):
    """Options that don't reach the segmenter; results that are mixed with those of other windows."""
    picture.save(tmp_path / "a.png")
    command = [
        "segment",
        str(tmp_path / "a.png"),
        "--classes",
        ",".join(NAMES),
        "-f",
        "npy",
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*command, "--tile", "176", "--overlap", "44"])
    assert done.exit_code == 0, done.output
    expected = windowed(segmenter, 176, 44)(picture).label_map
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "a.labels.npy"), expected)
    assert (expected != segmenter(picture).label_map).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "windows of 0 pixels"),
        ({"tile": 64, "overlap": 33}, "expected 0 to 32"),
        ({"tile": 64, "overlap": -1}, "expected 0 to 32"),
        ({"tile": None, "overlap": 8}, "without tile"),
        ({"tile": 64, "augment": True}, "leave one out"),
    ],
)
def test_windows_that_can_not_be(segmenter, options, message):
    """Windows without end, or of which three share a pixel."""
    with pytest.raises(ValueError, match=message):
        windowed(segmenter, **options)
