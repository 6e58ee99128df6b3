"""Augmentation and batches: against the recipe's figures and values computed some other way."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from san_hf.modeling import SANImageProcessor
from san_hf.training import ColorJitter, SegmentationCollator, TrainingTransform


PLAIN = {"color_jitter": False, "flip": False}


def photo(height: int, width: int, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A smooth random image and a label map of random blocks."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    blocks = Image.fromarray(rng.integers(0, 200, (4, 6)).astype(np.int32))
    size = (width, height)
    return image.resize(size, Image.Resampling.BICUBIC), np.array(blocks.resize(size, Image.Resampling.NEAREST))


def test_recipe():
    """The recipe's sizes, 640 * 0.5 ... 640 * 1.5: a rounded or truncated scale would make 447 of 448."""
    transform = TrainingTransform()
    assert [size.shortest_edge for size in transform.sizes] == [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]
    assert {size.longest_edge for size in transform.sizes} == {2560}
    assert transform.crop_size == 640 and transform.color_jitter and transform.flip


def test_randomness_is_the_generators():
    """A draw from any other source of randomness would break exact resuming."""
    image, label_map = photo(50, 70)
    transform = TrainingTransform(crop_size=32)
    results = []
    for seed in (5, 5, 6):
        np.random.seed(len(results))
        torch.manual_seed(len(results))
        results.append(transform(image, label_map, np.random.default_rng([seed, 3])))
    assert all((one == other).all() for one, other in zip(results[0], results[1]))
    assert not all((one == other).all() for one, other in zip(results[0], results[2]))
    assert photo(50, 70)[0] == image  # and what comes in is left as it is


def test_windows():
    """
    Every result is a window of the whole image resized, at one of the scales, labels from the same place; all scales
    and all positions come up. Would catch a box that is off by a pixel, swapped axes, windows that never reach the
    last row or column, and labels from elsewhere than the pixels.
    """
    image, label_map = photo(20, 27)
    transform = TrainingTransform(crop_size=16, scales=(1.0, 1.25, 2.0), **PLAIN)
    sizes = [(16, 22), (20, 27), (32, 43)]  # (height, width): 27 * 16 / 20 = 21.6, 27 * 32 / 20 = 43.2
    whole = {}
    for height, width in sizes:
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        labels = Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST)
        whole[height, width] = np.dstack([resized, np.asarray(labels)])

    seen = {size: set() for size in sizes}
    for seed in range(600):
        pixels, labels = transform(image, label_map, np.random.default_rng(seed))
        assert pixels.dtype == np.uint8 and labels.dtype == np.int32
        found = np.dstack([pixels.astype(int), labels])
        matches = [
            (size, (top, left))
            for size, everything in whole.items()
            for top in range(size[0] - 15)
            for left in range(size[1] - 15)
            # Pixels to a rounding error; the first one rules most windows out.
            if np.abs(everything[top, left] - found[0, 0])[:3].max() <= 1
            and np.abs(window := everything[top : top + 16, left : left + 16] - found)[..., :3].max() <= 1
            and (window[..., 3] == 0).all()
        ]
        assert len(matches) == 1, f"seed {seed} matches {matches}"
        seen[matches[0][0]].add(matches[0][1])
    for (height, width), places in seen.items():
        tops, lefts = zip(*places)
        assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, height - 16, 0, width - 16)


def test_scales_and_flips_are_equally_likely():
    """Shares of 3,000 draws: each of eleven scales 1/11, mirrored 1/2."""
    # One bright column in a wide image: its width tells the scale, its side whether it was mirrored.
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:, :20] = 255
    label_map = (pixels[..., 0] > 0).astype(np.int32)
    transform = TrainingTransform(crop_size=100, color_jitter=False)
    # Below a scale of 1 the whole image is in the window.
    shares, mirrored, smaller = {}, 0, 0
    for seed in range(3000):
        result, labels = transform(Image.fromarray(pixels), label_map, np.random.default_rng(seed))
        side = (labels[:, 0] != 255).sum()
        if side < 100:
            smaller += 1
            mirrored += int(labels[0, 0] == 0)
            shares[side] = shares.get(side, 0) + 1
            # Labels are where the pixels are
            assert ((result[:side, :side, 0] > 127) == labels[:side, :side]).all()
    assert sorted(shares) == [50, 60, 70, 80, 90]
    assert all(count == pytest.approx(3000 / 11, rel=0.2) for count in shares.values()), shares
    assert mirrored / smaller == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("ignore_index", [255, 65535])
def test_padding(ignore_index):
    """Right and below: 128 in the image, the ignore index in the labels (one that 8 bits would cut)."""
    image, label_map = photo(30, 20)
    transform = TrainingTransform(crop_size=40, scales=(0.5,), ignore_index=ignore_index, **PLAIN)
    pixels, labels = transform(image, label_map, np.random.default_rng(0))
    assert pixels.shape == (40, 40, 3) and labels.shape == (40, 40)
    np.testing.assert_array_equal(pixels[:30, :20], np.asarray(image))  # shortest edge 20 already
    np.testing.assert_array_equal(labels[:30, :20], label_map)
    for padded, value in ((pixels, 128), (labels, ignore_index)):
        assert (padded[30:] == value).all() and (padded[:, 20:] == value).all()


def test_colours_do_not_touch_the_padding():
    """Padding is 128 whatever the brightness."""
    image, label_map = photo(30, 20)
    transform = TrainingTransform(crop_size=40, scales=(0.5,))
    results = [transform(image, label_map, np.random.default_rng(seed))[0] for seed in range(20)]
    assert all((pixels[30:] == 128).all() and (pixels[:, 20:] == 128).all() for pixels in results)
    assert len({pixels.tobytes() for pixels in results}) > 15


@pytest.mark.parametrize(
    ("size", "visible"),
    [
        # (height, width) of the image, and of what of it is in the window, at 640
        ((100, 1000), (256, 640)),  # 6400 would exceed 2560: 2560 x 256
        ((1, 1), (640, 640)),
        ((1, 4000), (1, 640)),
        ((4000, 1), (640, 1)),
        ((2, 3), (640, 640)),
        ((640, 640), (640, 640)),
    ],
)
def test_extreme_shapes(size, visible):
    """The longest edge is limited, and no side becomes 0."""
    transform = TrainingTransform(scales=(1.0,), flip=False)
    label_map = np.full(size, 7, np.int32)
    for seed in range(5):
        pixels, labels = transform(Image.new("RGB", size[::-1], (1, 2, 3)), label_map, np.random.default_rng(seed))
        assert pixels.shape == (640, 640, 3)
        assert (labels[: visible[0], : visible[1]] == 7).all() and (labels == 7).sum() == np.prod(visible)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size=0"),
        ({"longest_edge": -1}, "longest_edge=-1"),
        ({"scales": ()}, r"scales=\(\)"),
        ({"scales": (0.0, 1.0)}, "scales="),
    ],
)
def test_impossible_settings(arguments, message):
    """Named when they are set rather than in the first worker."""
    with pytest.raises(ValueError, match=message):
        TrainingTransform(**arguments)


def test_images_that_do_not_fit():
    """Transposed labels and grey images would otherwise train on nonsense, or fail inside Pillow."""
    image, label_map = photo(20, 30)
    transform = TrainingTransform(crop_size=16)
    with pytest.raises(ValueError, match=r"\(20, 30\).*\(30, 20\)"):
        transform(image, label_map.T, np.random.default_rng(0))
    with pytest.raises(ValueError, match="mode L"):
        transform(image.convert("L"), label_map, np.random.default_rng(0))


# --- colours


def hsv_jittered(rgb: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Pixel by pixel with Python's own colour conversion, not rounded."""
    changed = []
    for pixel in rgb.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        changed.append(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v))
    return np.reshape(changed, rgb.shape) * 255


COLOURS = np.random.default_rng(0).integers(0, 256, (40, 10, 3), dtype=np.uint8)


def jittered(**changes) -> np.ndarray:
    return np.asarray(ColorJitter(**changes)(Image.fromarray(COLOURS))).astype(float)


def test_no_jitter():
    """The neutral change is none at all, not even a rounding by way of HSV."""
    np.testing.assert_array_equal(jittered(), COLOURS)


@pytest.mark.parametrize("amount", [-32, -7.4, 32])
def test_brightness(amount):
    """An overflow would turn white to black."""
    np.testing.assert_array_equal(jittered(brightness=amount), np.rint(np.clip(COLOURS.astype(float) + amount, 0, 255)))


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.5])
def test_contrast(factor):
    """As in SSD: a factor of the values, not of their distance from the mean."""
    np.testing.assert_array_equal(jittered(contrast=factor), np.rint(np.clip(COLOURS * factor, 0, 255)))


@pytest.mark.parametrize("changes", [(0.5, 0.0), (1.5, 0.0), (1.0, 0.1), (1.0, -0.1), (1.3, 0.05), (0.6, -0.07)])
def test_saturation_and_hue(changes):
    """
    Against colorsys, but for 8-bit HSV, where one step of hue is up to 6 levels. Would catch channels in the wrong
    order, a hue in the wrong unit (18 of 180 steps is a tenth of a turn) or one that is cut, not wrapped, at red.
    """
    difference = np.abs(jittered(saturation=changes[0], hue=changes[1]) - hsv_jittered(COLOURS, *changes))
    assert difference.max() <= 12 and difference.mean() < 1, (difference.max(), difference.mean())


def test_order_of_contrast():
    """Contrast that cuts at 255 does not commute with saturation: both orders, as they are called."""
    first = np.rint(np.clip(COLOURS * 1.5, 0, 255))
    expected = {
        True: hsv_jittered(first, 0.5, 0.0),
        False: np.clip(np.rint(hsv_jittered(COLOURS, 0.5, 0.0)) * 1.5, 0, 255),
    }
    for contrast_first, values in expected.items():
        got = jittered(contrast=1.5, saturation=0.5, contrast_first=contrast_first)
        other = np.abs(got - expected[not contrast_first]).mean()
        assert np.abs(got - values).mean() < 1 < other


def test_draws_follow_the_recipe():
    """4,000 draws: each change half the time, over its whole range and uniformly, independently of the others."""
    rng = np.random.default_rng(0)
    draws = [ColorJitter.draw(rng) for _ in range(4000)]
    neutral = ColorJitter()
    applied = []
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18 / 180, 18 / 180),
    ):
        values = np.array([getattr(draw, name) for draw in draws])
        changed = values != getattr(neutral, name)
        applied.append(changed)
        assert changed.mean() == pytest.approx(0.5, abs=0.03), name
        quantiles = np.quantile(values[changed], [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(
            (quantiles - low) / (high - low), [0, 0.25, 0.5, 0.75, 1], atol=0.03, err_msg=f"{name} is not uniform"
        )
        assert low <= quantiles[0] and quantiles[-1] <= high, name
    applied.append(np.array([draw.contrast_first for draw in draws]))
    assert applied[-1].mean() == pytest.approx(0.5, abs=0.03)
    together = np.corrcoef(applied)
    assert np.abs(together - np.eye(5)).max() < 0.06, together


# --- batches


def test_batch():
    """Normalised with CLIP's figures on 0..255 values, channels first; labels as they are."""
    images = [np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8) for i in range(2)]
    label_maps = [np.random.default_rng(i).integers(0, 400, (64, 96)).astype(np.int32) for i in range(2)]
    label_maps[0][:5] = 65535
    collate = SegmentationCollator(SANImageProcessor(), ignore_index=65535)
    batch = collate([{"image": image, "label_map": labels} for image, labels in zip(images, label_maps)])

    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    mean = np.array([122.7709383, 116.7460125, 104.09373615])
    std = np.array([68.5005327, 66.6321579, 70.32316305])
    expected = (np.stack(images) - mean) / std
    np.testing.assert_allclose(batch["pixel_values"].permute(0, 2, 3, 1), expected, atol=1e-5)
    np.testing.assert_array_equal(batch["labels"], np.stack(label_maps))


def test_batch_of_different_sizes():
    """Padded as in inference: zeros after normalisation, to a multiple of 32; labels with the ignore index."""
    sizes = [(40, 50), (64, 20)]
    examples = [{"image": np.full((*size, 3), 9, np.uint8), "label_map": np.full(size, 3, np.int32)} for size in sizes]
    batch = SegmentationCollator(SANImageProcessor(ignore_index=0), ignore_index=255)(examples)
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["labels"].shape == (2, 64, 64)
    for pixels, labels, (height, width) in zip(batch["pixel_values"], batch["labels"], sizes):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[:height, :width] = True
        assert (pixels[:, ~inside] == 0).all() and (pixels[:, inside] != 0).all()
        assert (labels[~inside] == 255).all() and (labels[inside] == 3).all()


def test_a_row_of_pixels_is_an_image():
    """(H, W, 3) with H = 3 must not be taken for (3, H, W)."""
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    batch = SegmentationCollator(SANImageProcessor(size_divisor=1))(
        [{"image": image, "label_map": np.zeros((3, 40), np.int32)}]
    )
    assert batch["pixel_values"].shape == (1, 3, 3, 40)
    red = batch["pixel_values"][0, 0].numpy() * 68.5005327 + 122.7709383
    np.testing.assert_allclose(red, image[..., 0], atol=1e-3)


def test_batch_names_what_does_not_fit():
    """Which of the batch it was."""
    good = {"image": np.zeros((8, 8, 3), np.uint8), "label_map": np.zeros((8, 8), np.int32)}
    bad = {"image": np.zeros((8, 8, 3), np.uint8), "label_map": np.zeros((8, 9), np.int32)}
    with pytest.raises(ValueError, match="map 1.*same"):
        SegmentationCollator(SANImageProcessor())([good, bad])
