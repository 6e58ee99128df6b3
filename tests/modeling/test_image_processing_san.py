"""Images and label maps in, label maps out. Sizes are (height, width)."""

import json
import resource
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from san_hf.modeling import SANImageProcessor, SANImageProcessorPil
from tests.forks import Run


FIXTURES = Path(__file__).parents[1] / "fixtures"
RESIZE_CASES = json.loads((FIXTURES / "resize" / "shapes.json").read_text())
# CLIP's mean and std on the scale 0..255
MEAN = np.array([122.7709383, 116.7460125, 104.09373615], dtype=np.float32)[:, None, None]
STD = np.array([68.5005327, 66.6321579, 70.32316305], dtype=np.float32)[:, None, None]


def photo(height=40, width=60, seed=0) -> Image.Image:
    """Smooth colours, so that resampling keeps them apart from noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.BICUBIC)


def processor(**kwargs):
    return SANImageProcessorPil(**({"size": {"shortest_edge": 40, "longest_edge": 160}} | kwargs))


def unnormalized(inputs) -> np.ndarray:
    """The first image's bytes, (3, H, W), read back from pixel values."""
    height, width = inputs.image_sizes[0]
    return np.rint(inputs.pixel_values[0, :, :height, :width].numpy() * STD + MEAN).astype(np.uint8)


# Images in


@pytest.mark.parametrize("name", RESIZE_CASES)
def test_resized_sizes(name):
    """Another rounding, or a cap on the longest edge applied to the wrong side, shifts every mask."""
    case = RESIZE_CASES[name]
    size = {"shortest_edge": case["shortest_edge"], "longest_edge": case["longest_edge"]}
    image = np.zeros((*case["in"], 3), np.uint8)
    assert processor()(image, size=size).image_sizes.tolist() == [case["out"]]


def resized_pixels(image_processor_class):
    """For each reference case, the pixels of our resize and those expected, (H, W, 3) uint8."""
    images = load_file(FIXTURES / "resize" / "images.safetensors")
    for name in RESIZE_CASES:
        if f"{name}.out" in images:
            index, shortest, longest = name.split(".")
            inputs = image_processor_class(
                size={"shortest_edge": int(shortest), "longest_edge": int(longest)},
                do_rescale=False,
                do_normalize=False,
                do_pad=False,
            )(Image.fromarray(images[f"{index}.image"].numpy()))
            yield inputs.pixel_values[0].permute(1, 2, 0), images[f"{name}.out"]


def test_resized_pixels_are_the_originals():
    """Another filter, or an antialias off, changes what the model sees: expected bit for bit."""
    cases = list(resized_pixels(SANImageProcessorPil))
    assert len(cases) == 4
    for ours, expected in cases:
        assert torch.equal(ours, expected)


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_torchvision_resizes_alike():
    """torchvision's antialiased uint8 resize rounds its weights otherwise than PIL: one level in under 1 % of bytes."""
    assert SANImageProcessor().backend == "torchvision"
    for ours, expected in resized_pixels(SANImageProcessor):
        difference = (ours.int() - expected.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01


def test_pixel_values():
    """Normalisation must be the original's, (x - mean) / std of 0..255, to the last bit of float32 but one."""
    image = photo()
    inputs = processor(do_pad=False)(image)
    expected = (np.asarray(image, dtype=np.float32).transpose(2, 0, 1) - MEAN) / STD
    assert inputs.pixel_values.dtype == torch.float32
    np.testing.assert_allclose(inputs.pixel_values[0].numpy(), expected, rtol=0, atol=3e-7)


def test_padding():
    """Zeros come after normalisation (black before it would not be zero), right and bottom, up to a multiple of 32."""
    images = [photo(40, 60), photo(70, 40)]
    inputs = processor()(images)
    assert inputs.pixel_values.shape == (2, 3, 96, 64)
    assert inputs.image_sizes.tolist() == [[40, 60], [70, 40]] and inputs.image_sizes.dtype == torch.int64
    for index, (height, width) in enumerate(inputs.image_sizes.tolist()):
        pixels = inputs.pixel_values[index].clone()
        alone = processor(do_pad=False)(images[index]).pixel_values[0]
        assert torch.equal(pixels[:, :height, :width], alone)
        pixels[:, :height, :width] = 0
        assert not pixels.any()


def test_switches():
    """Each step can be left out, by the call or for good, and a fixed size be asked for."""
    image = photo(50, 70)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)
    off = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}
    assert torch.equal(processor()(image, **off).pixel_values[0], pixels)
    assert torch.equal(processor(**off)(image).pixel_values[0], pixels)
    rescaled = processor(**off | {"do_rescale": True})(image).pixel_values[0]
    torch.testing.assert_close(rescaled, pixels / 255)
    assert processor(do_pad=False)(image, size={"height": 30, "width": 20}).pixel_values.shape == (1, 3, 30, 20)
    assert processor(size=45, do_pad=False)(image).image_sizes.tolist() == [[45, 63]]
    assert processor()(image, size_divisor=50).pixel_values.shape == (1, 3, 50, 100)
    assert processor()(image, pad_size={"height": 99, "width": 98}).pixel_values.shape == (1, 3, 99, 98)
    assert isinstance(processor()(image, return_tensors=None).pixel_values[0], np.ndarray)


def variants():
    """One picture in the forms it may come in."""
    image = photo()
    array = np.asarray(image)
    first = array.transpose(2, 0, 1)
    return {
        "array": array,
        "channels first": first,
        "tensor": torch.tensor(array),
        "tensor, channels first": torch.tensor(first),
        "batch": array[None],
        "list": [image],
        "nested list": [[image]],
        "int64": array.astype(np.int64),
        "float 0..255": array.astype(np.float32),
        "float16 tensor": torch.tensor(array).half(),
        "opaque alpha": image.convert("RGBA"),
        "16-bit array": array.astype(np.uint16) * 257,
    }


@pytest.mark.parametrize("form", variants())
def test_forms_of_an_image(form):
    """Whichever form an image comes in, the model must see the same picture."""
    expected = processor()(photo())
    inputs = processor()(variants()[form])
    assert torch.equal(inputs.pixel_values, expected.pixel_values)
    assert torch.equal(inputs.image_sizes, expected.image_sizes)


def grey_images():
    grey = photo().convert("L")
    sixteen = (np.asarray(grey).astype(np.uint16) * 257).astype("<u2")
    return {
        "L": grey,
        "LA": grey.convert("LA"),
        "P": grey.convert("P"),
        "I": Image.fromarray(np.asarray(grey).astype(np.int32)),
        "I, 16-bit": Image.fromarray(sixteen.astype(np.int32)),
        "I;16": Image.fromarray(sixteen),
        "F": Image.fromarray(np.asarray(grey).astype(np.float32)),
        "array": np.asarray(grey),
        "array, one channel": np.asarray(grey)[..., None],
    }


@pytest.mark.parametrize("mode", grey_images())
def test_grey_and_16_bit_images(mode):
    """PIL's own conversion to RGB clips 16-bit pixels to white; a palette's indices are no colours."""
    expected = processor()(photo().convert("L").convert("RGB"))
    assert torch.equal(processor()(grey_images()[mode]).pixel_values, expected.pixel_values)


def test_transparency_is_laid_on_white():
    """What is under a transparent pixel is often black, and never meant to be seen. Arrays as PIL images."""
    image = photo().convert("RGBA")
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    image.putalpha(Image.fromarray(alpha))
    palette = Image.new("P", (60, 40), 3)
    palette.info["transparency"] = 3
    for form in (image, np.asarray(image)):
        pixels = unnormalized(processor()(form))
        assert (pixels[..., :30] == 255).all()
        np.testing.assert_array_equal(pixels[..., 30:], np.asarray(photo()).transpose(2, 0, 1)[..., 30:])
    assert (unnormalized(processor()(palette)) == 255).all()


def test_cmyk():
    """A print's four inks are no RGB and alpha."""
    image = photo().convert("CMYK")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(unnormalized(processor()(image)), expected)


def test_floats_of_0_to_1():
    """With do_rescale=False they are taken as they are; rescaled once more they would be a black picture: refused."""
    array = np.asarray(photo()).astype(np.float32) / 255
    inputs = processor()(array, do_rescale=False)
    torch.testing.assert_close(inputs.pixel_values, processor()(photo()).pixel_values, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"image 0: got floats in .*, expected 0..255; .* pass do_rescale=False"):
        processor()(array)


@pytest.mark.parametrize(
    "size, resized", [((1, 1), [40, 40]), ((1, 4000), [1, 160]), ((9000, 1), [160, 1]), ((2, 3), [40, 60])]
)
def test_tiny_and_thin_images(size, resized):
    """A side that rounds to 0 pixels must stay at 1; a single pixel is an image, and one row no channel of grey."""
    image = np.full((*size, 3), 200, np.uint8)
    for given in (image, Image.fromarray(image)):
        inputs = processor()(given)
        assert inputs.image_sizes.tolist() == [resized]
        assert (unnormalized(inputs) == 200).all()


BAD_IMAGES = {
    "no images": ([], "Got no images"),
    "0 pixels": (Image.new("RGB", (0, 5)), r"image 0: got the shape \(5, 0, 3\)"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), "got the shape"),
    "a number": (3, "image 0: got int 3, expected a PIL image"),
    "none in a list": ([photo(), None], "image 1: got NoneType"),
    "two channels": (np.zeros((8, 9, 2), np.uint8), r"got the shape \(8, 9, 2\), expected 1, 3 or 4 channels"),
    "channels first or last": (np.zeros((3, 9, 3), np.uint8), r"got the shape \(3, 9, 3\), .*input_data_format"),
    "five dimensions": (np.zeros((1, 1, 1, 8, 9), np.uint8), "got the shape"),
    "nan": (np.full((8, 9, 3), np.nan, np.float32), "NaN or infinite"),
    "infinite tensor": (torch.full((3, 8, 9), torch.inf), "NaN or infinite"),
    "beyond 255": (np.full((8, 9, 3), 256), "got pixels in 256..256, expected 0..255"),
    "negative": (np.full((8, 9, 3), -1.0), "got pixels in -1.0..-1.0"),
    "bool": (np.zeros((8, 9, 3), bool), "type bool"),
    "text": (np.full((8, 9, 3), "a"), "type <U1"),
    "no such file": ("no_such_file.png", "image 0: Incorrect image source"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_images(what):
    """Each is refused with which image it is and what is wrong with it, not from the depths, nor by a guess."""
    image, message = BAD_IMAGES[what]
    with pytest.raises(ValueError, match=message):
        processor()(image)


def test_bad_files(tmp_path, monkeypatch):
    """Truncated files must not become half grey pictures, nor NumPy's object arrays; bombs must not fill the memory."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("noise.png", "noise.jpg"):
        path = tmp_path / name
        noise.save(path)
        data = path.read_bytes()
        assert processor()(path).image_sizes.tolist() == [[40, 40]]
        path.write_bytes(data[: len(data) // 2])
        for given in (str(path), Image.open(path)):
            with pytest.raises(ValueError, match="Cannot use image 1: .*truncated"):
                processor()([noise, given])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="Cannot use image 0: cannot identify image file"):
        processor()(tmp_path / "text.png")
    noise.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    with pytest.raises(ValueError, match="Cannot use image 0: .*decompression bomb"):
        processor()(tmp_path / "bomb.png")


def test_exif_orientation(tmp_path):
    """A file is opened upright, as Transformers' load_image does; a PIL image is the caller's, and taken as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    path = tmp_path / "turned.png"
    photo(40, 60).save(path, exif=exif)
    assert processor()(path).image_sizes.tolist() == [[60, 40]]
    assert processor()(Image.open(path)).image_sizes.tolist() == [[40, 60]]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"size": {"shortest_edge": 0}}, r"size\['shortest_edge'\]=0, expected a whole number"),
        ({"size": -5}, r"size\['shortest_edge'\]=-5"),
        ({"size": (64, 0)}, r"size\['width'\]=0"),
        ({"size": {"shortest_edge": 10**9}}, r"size=.*'shortest_edge': 1000000000.* pixels, expected at most"),
        ({"size": {"height": 10**7, "width": 10**7}}, "pixels, expected at most 67,108,864"),
        ({"pad_size": {"height": 10**7, "width": 10**7}}, "Got pad_size=.* pixels, expected at most"),
        ({"pad_size": {"height": 32, "width": 32}}, r"Got pad_size=\(32, 32\) for images of up to"),
        ({"pad_size": {"shortest_edge": 32}}, "Got pad_size=.*expected 'height' and 'width'"),
        ({"size_divisor": 10**9}, "size_divisor=1000000000, which makes .* pixels, expected at most"),
        ({"size_divisor": 0}, "Got size_divisor=0, expected a whole number"),
        ({"rescale_factor": float("nan")}, "Got rescale_factor=nan, expected a finite number above 0"),
        ({"image_std": [0.2, 0.0, 0.2]}, "Got image_std=.* expected finite numbers above 0"),
        ({"image_mean": [0.2, float("inf"), 0.2]}, "Got image_mean=.* expected finite numbers,"),
        ({"size": {"max_height": 5, "max_width": 5}}, "expected 'shortest_edge'"),
        ({"do_center_crop": True, "crop_size": 20}, "do_center_crop=True"),
        ({"image_mean": [0.5, 0.5]}, "3 channels and image_mean of 2"),
        ({"do_convert_rgb": False}, "4 channels and image_mean of 3"),
        ({"do_pad": False}, "different sizes"),
    ],
)
def test_bad_settings(kwargs, message):
    """Settings that do not fit each other or the images."""
    with pytest.raises(ValueError, match=message):
        processor()([photo(40, 60).convert("RGBA"), photo(70, 40)], **kwargs)


# Label maps in


def checkerboard(height=40, width=60) -> np.ndarray:
    rows, columns = np.indices((height, width)) // 10
    return (rows * 7 + columns).astype(np.uint8)


def test_labels_follow_their_image():
    """Nearest neighbour (a blend of two classes is a third), the image's own resize, ignored in the padding."""
    labels = checkerboard()
    inputs = processor(size={"shortest_edge": 80, "longest_edge": 400})([photo(), photo(60, 40)], [labels, labels.T])
    assert inputs.labels.shape == (2, 128, 128) and inputs.labels.dtype == torch.int64
    expected = torch.full((2, 128, 128), 255)
    expected[0, :80, :120] = torch.from_numpy(labels).repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected[1, :120, :80] = expected[0, :80, :120].T
    assert torch.equal(inputs.labels, expected)


def label_map_forms():
    labels = checkerboard()
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0] * 256)
    return {
        "array": labels,
        "int64": labels.astype(np.int64),
        "tensor": torch.from_numpy(labels),
        "batch": labels[None],
        "PIL": Image.fromarray(labels),
        "palette": palette,
        "I;16": Image.fromarray(labels.astype(np.uint16)),
        "I": Image.fromarray(labels.astype(np.int32)),
    }


@pytest.mark.parametrize("form", label_map_forms())
def test_forms_of_a_label_map(form):
    """Labels are the pixel values, never the colours of a palette, in every form."""
    given = label_map_forms()[form]
    inputs = processor(do_pad=False)(photo(), given)
    assert torch.equal(inputs.labels[0], torch.from_numpy(checkerboard()).long())


def test_16_bit_labels():
    """Through 8 bits, 846 and 65535 would be 78 and 255."""
    labels = np.full((40, 60), 846, np.uint16)
    labels[:5] = 65535
    inputs = processor(ignore_index=65535)(photo(), labels)
    assert set(inputs.labels.unique().tolist()) == {846, 65535}
    assert (inputs.labels[0, 40:] == 65535).all()


def test_reduce_labels():
    """0 is unlabelled and 1 the first class; what was ignored stays so, rather than becoming class 254."""
    labels = np.tile(np.array([0, 1, 2, 255], np.uint8), (40, 15))
    inputs = processor(do_pad=False)(photo(), labels, do_reduce_labels=True)
    assert inputs.labels[0, 0, :4].tolist() == [255, 0, 1, 255]


@pytest.mark.parametrize(
    "maps, message",
    [
        (np.zeros((60, 40), np.uint8), r"map 0 has the size \(60, 40\), its image \(40, 60\)"),
        ([checkerboard()] * 2, "Got 2 segmentation maps for 1 images"),
        (photo(), r"map 0: got the shape \(40, 60, 3\), expected one label per pixel"),
        (np.zeros((40, 60), np.float32), "map 0: got values of the type float32"),
        (np.full((40, 60), -1), "map 0: got labels in -1..-1"),
        ("labels.png", "Cannot use segmentation map 0"),
        (3, "map 0: got int 3"),
    ],
)
def test_bad_label_maps(maps, message):
    """A label map of another image, a picture in place of one, or values that are no labels."""
    with pytest.raises(ValueError, match=message):
        processor()(photo(), maps)


def test_save_and_load(tmp_path):
    """Every setting comes back, through the class and the Auto class, and the folder names the plain class."""
    saved = SANImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, ignore_index=7, size_divisor=16)
    saved.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "SANImageProcessor"
    for loaded in (SANImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, SANImageProcessor)
        assert loaded.to_dict() == saved.to_dict()
        assert (loaded.size["shortest_edge"], loaded.ignore_index, loaded.size_divisor) == (48, 7, 16)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">i8", "<u2", "=i4", ">u4"])
def test_byte_orders(dtype):
    """The same numbers in another byte order: another image, other labels, or an error."""
    image_processor = processor(size=64)
    pixels = np.random.default_rng(0).integers(0, 200, (64, 64, 3))
    label_map = np.random.default_rng(1).integers(0, 9, (64, 64))
    scale = 257 if dtype.endswith("u2") else 1  # 16-bit images have 16-bit values
    got = image_processor((pixels * scale).astype(dtype), label_map.astype(dtype))
    expected = image_processor(pixels.astype(np.uint8), label_map)
    assert torch.equal(got.pixel_values, expected.pixel_values) and torch.equal(got.labels, expected.labels)
    floats = image_processor(pixels.astype(">f4"))
    assert torch.equal(floats.pixel_values, expected.pixel_values)


def test_big_endian_files(tmp_path):
    """16-bit grey TIFF as microscopes and satellites write it, bright and dark."""
    for brightest in (65535, 199):
        pixels = np.linspace(0, brightest, 64 * 64).astype(np.uint16).reshape(64, 64)
        means = []
        for order, prefix in (("<", b"II*\0"), (">", b"MM\0*")):
            # Width, height, bits, no compression, black is zero, offset, rows in the strip, bytes in it.
            tags = {256: 64, 257: 64, 258: 16, 259: 1, 262: 1, 273: 110, 278: 64, 279: 64 * 64 * 2}
            entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
            header = prefix + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)
            assert len(header) == 110
            (tmp_path / "image.tif").write_bytes(header + pixels.astype(order + "u2").tobytes())
            means.append(processor(do_normalize=False, do_pad=False)(tmp_path / "image.tif").pixel_values.mean().item())
        assert means[0] == means[1] == pytest.approx(brightest / 2 / 65535, abs=0.002)


def test_label_maps_in_other_forms():
    """One channel last, nested lists, batches of either: the label map itself."""
    pixels, labels = np.zeros((2, 40, 60, 3), np.uint8), np.random.default_rng(0).integers(0, 5, (2, 40, 60))
    expected = processor()(list(pixels), list(labels)).labels
    for form in (labels[..., None], labels.tolist(), list(labels[..., None]), [labels[0].tolist(), labels[1]]):
        assert torch.equal(processor()(pixels, form).labels, expected)
    for form in (labels[0], labels[0][..., None], labels[0].tolist(), labels[0][..., None].tolist()):
        assert torch.equal(processor()(pixels[0].tolist(), form).labels, expected[:1])
    with pytest.raises(ValueError, match="rows differ in length"):
        processor()(pixels[0], [[0, 1], [0]])


@pytest.mark.parametrize(
    "size", [160, {"shortest_edge": 160}, {"shortest_edge": 160, "longest_edge": 640}, (160, 160), [160, 160]]
)
def test_size_set_later(size):
    """A size in any form that is set on a processor there is: an AttributeError in post-processing."""
    image_processor = processor()
    image_processor.size = size
    outputs = outputs_of([(160, 160)], image_sizes=None)
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, [(80, 80)])
    assert labels.shape == (80, 80)
    assert image_processor(photo(80, 80)).image_sizes.tolist() == [[160, 160]]
    with pytest.raises(ValueError, match="Got size="):
        image_processor.size = "large"


# Label maps out


def outputs_of(sizes, padded=None, num_classes=5, num_queries=12, stride=16, scale=4.0, **kwargs):
    """Smooth random masks; `padded` overrides the padded size that `sizes` make."""
    batch_size = len(sizes)
    height, width = padded or [-(-max(sides) // 32) * 32 for sides in zip(*sizes)]
    coarse = torch.randn(batch_size, num_queries, 4, 5)
    masks = (F.interpolate(coarse, size=(height // stride, width // stride), mode="bicubic") - 0.5) * scale
    classes = torch.randn(batch_size, num_queries, num_classes + 1) * 6
    fields = {"class_queries_logits": classes, "masks_queries_logits": masks, "image_sizes": torch.tensor(sizes)}
    fields |= {"padded_sizes": torch.tensor([[height, width]] * batch_size)}
    fields |= {"patch_sizes": torch.tensor([[stride, stride]] * batch_size)}
    return SimpleNamespace(**(fields | kwargs))


def dense_scores(outputs, padded, target_sizes):
    """The definition, written out: score maps (C, H, W) of each image, in full."""
    scores = []
    for index, target in enumerate(target_sizes):
        masks, (height, width) = outputs.masks_queries_logits[index][None].float(), outputs.image_sizes[index].tolist()
        masks = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
        masks = F.interpolate(masks, size=target, mode="bilinear", align_corners=False)[0].sigmoid()
        probabilities = outputs.class_queries_logits[index].float().softmax(-1)[:, :-1]
        scores.append(torch.einsum("qc,qhw->chw", probabilities, masks))
    return scores


@pytest.mark.parametrize("name", ["tiny_b16", "tiny_l14"])
def test_scores_of_the_original(name):
    """The original's score map at another size than the input, from its own logits."""
    folder = FIXTURES / "golden" / name
    taps, meta = load_file(folder / "io.safetensors"), json.loads((folder / "meta.json").read_text())
    padded = torch.tensor([[-(-side // 32) * 32 for side in meta["image_hw"]]])
    outputs = SimpleNamespace(
        class_queries_logits=taps["class_logits"],
        masks_queries_logits=taps["mask_logits"],
        image_sizes=torch.tensor([meta["image_hw"]]),
        padded_sizes=padded,
        patch_sizes=padded // torch.tensor(taps["mask_logits"].shape[-2:]),
    )
    (result,) = SANImageProcessor().post_process_semantic_segmentation(
        outputs, [meta["output_hw"]], return_segmentation_scores=True
    )
    expected = taps["sem_seg"]
    assert (result.segmentation_scores - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(result.segmentation, expected.argmax(0))


@pytest.mark.parametrize("scale", [0.1, 4.0, 30.0])
@pytest.mark.parametrize("num_classes", [2, 300])
def test_label_maps_of_a_padded_batch(num_classes, scale):
    """
    Against the definition written out, for images that grow, shrink and stretch: catches a crop or resize in the wrong
    order or to the wrong size, seams between tiles, and a class left out that should have won.
    """
    sizes, targets = [(60, 96), (96, 40)], [(130, 201), (50, 77)]
    outputs = outputs_of(sizes, num_classes=num_classes, scale=scale)
    expected = dense_scores(outputs, (96, 96), targets)
    labels = SANImageProcessor().post_process_semantic_segmentation(outputs, targets)
    results = SANImageProcessor().post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    for label_map, result, scores in zip(labels, results, expected, strict=True):
        assert label_map.dtype == torch.int64
        torch.testing.assert_close(result.segmentation_scores, scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))
        # The label must be of the best score, or of one that rounding makes its equal
        assert (scores.gather(0, label_map[None])[0] >= scores.amax(0) - 1e-5).all()
        assert scale < 1 or len(label_map.unique()) > 1


def test_equal_scores_give_the_first_class():
    """As argmax does, whatever is left out on the way."""
    outputs = outputs_of([(64, 64)], class_queries_logits=torch.zeros(1, 12, 9))
    (labels,) = SANImageProcessor().post_process_semantic_segmentation(outputs)
    assert not labels.any()


@pytest.mark.parametrize("num_labels", [2, 5, 7])
def test_expanded_vocabulary(num_labels):
    """Classes beyond the caller's own are one "other": after them, and never one of them. All own: no other."""
    outputs, targets = outputs_of([(64, 90)], num_classes=7), [(70, 80)]
    image_processor = SANImageProcessor()
    (every,) = image_processor.post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, targets, num_labels=num_labels)
    assert len(every.segmentation.unique()) > 2
    assert torch.equal(labels, every.segmentation.clamp(max=num_labels))
    (result,) = image_processor.post_process_semantic_segmentation(
        outputs, targets, return_segmentation_scores=True, num_labels=num_labels
    )
    scores = every.segmentation_scores
    if num_labels < 7:
        scores = torch.cat((scores[:num_labels], scores[num_labels:].amax(0, keepdim=True)))
    torch.testing.assert_close(result.segmentation_scores, scores)
    assert torch.equal(result.segmentation, labels)


def confidence_of(scores: torch.Tensor) -> torch.Tensor:
    """(H, W), by its definition, from the scores of all classes (C, H, W)."""
    return scores.amax(0) / scores.sum(0).clamp(min=1)


LOW, HIGH = -30.0, 30.0
CONFIDENCES = {  # mask logits of each query, (of the class, of no object) of each query, number of classes, expected
    "one query that is sure": ([HIGH], [(HIGH, 0.0)], 3, 1.0),
    "no query": ([LOW] * 5, [(HIGH, 0.0)] * 5, 3, 0.0),
    "no object": ([HIGH] * 5, [(0.0, HIGH)] * 5, 3, 0.0),
    "half a mask": ([0.0], [(HIGH, 0.0)], 3, 0.5),
    "many queries that agree": ([HIGH] * 100, [(HIGH, 0.0)] * 100, 3, 1.0),
    "many queries that doubt": ([HIGH] * 100, [(0.0, LOW)] * 100, 4, 0.25),
    "one class": ([HIGH], [(0.0, 0.0)], 1, 0.5),
    "one class, many queries": ([HIGH] * 100, [(0.0, 0.0)] * 100, 1, 1.0),
    "thousands of classes that are alike": ([HIGH] * 100, [(0.0, LOW)] * 100, 5000, 1 / 5000),
    "one of thousands of classes": ([HIGH] * 100, [(HIGH, 0.0)] * 100, 5000, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CONFIDENCES)
def test_confidence_is_between_0_and_1(case, dtype):
    """Catches a confidence beyond 1 where queries overlap, one that depends on how many of them there are, and half
    precision that adds them up to something else."""
    masks, classes, num_classes, expected = CONFIDENCES[case]
    class_logits = torch.zeros(1, len(masks), num_classes + 1)
    class_logits[0, :, 0], class_logits[0, :, -1] = torch.tensor(classes).T
    mask_logits = torch.tensor(masks)[None, :, None, None].expand(1, -1, 4, 4)
    outputs = outputs_of(
        [(64, 64)], class_queries_logits=class_logits.to(dtype), masks_queries_logits=mask_logits.to(dtype)
    )
    (result,) = SANImageProcessor().post_process_semantic_segmentation(outputs, [(50, 60)], return_confidence=True)
    confidence = result.confidence
    assert confidence.dtype == torch.float32 and confidence.shape == (50, 60)
    assert confidence.min() >= 0 and confidence.max() <= 1
    torch.testing.assert_close(confidence, torch.full_like(confidence, expected), rtol=1e-4, atol=1e-6)


def test_confidence_is_the_best_classes():
    """Catches a confidence of another class than the label's, also where classes are one "other"."""
    outputs, targets = outputs_of([(64, 90)], num_classes=7), [(70, 80)]
    image_processor = SANImageProcessor()
    for num_labels in (None, 3):
        (result,) = image_processor.post_process_semantic_segmentation(
            outputs, targets, return_segmentation_scores=True, return_confidence=True, num_labels=None
        )
        (merged,) = image_processor.post_process_semantic_segmentation(
            outputs, targets, return_confidence=True, num_labels=num_labels
        )
        expected = confidence_of(result.segmentation_scores)
        torch.testing.assert_close(result.confidence, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged.confidence, expected, rtol=1e-5, atol=1e-6)
        assert merged.segmentation_scores is None


@pytest.mark.parametrize("num_labels", [None, 4, 7])
def test_threshold(num_labels):
    """Pixels whose confidence is lower are "other", with scores asked for or not; the rest is as without."""
    outputs, targets = outputs_of([(64, 90)], num_classes=7), [(70, 80)]
    image_processor = SANImageProcessor()
    (every,) = image_processor.post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    best, other = confidence_of(every.segmentation_scores), 7 if num_labels is None else num_labels
    threshold = best.median().item() + 1e-4
    options = {"num_labels": num_labels, "threshold": threshold}
    expected = torch.where(best < threshold, other, every.segmentation.clamp(max=other))
    (labels,) = image_processor.post_process_semantic_segmentation(outputs, targets, **options)
    (result,) = image_processor.post_process_semantic_segmentation(
        outputs, targets, return_segmentation_scores=True, **options
    )
    assert 0.2 < (labels == other).float().mean() < 1
    assert torch.equal(labels, expected)
    assert torch.equal(result.segmentation, expected)
    (none,) = image_processor.post_process_semantic_segmentation(outputs, targets, threshold=0.0)
    assert torch.equal(none, every.segmentation)


def test_target_sizes():
    """Lists, tuples and tensors say the same; without, label maps are of the model's input, without its padding."""
    outputs = outputs_of([(60, 96), (96, 40)])
    post_process = SANImageProcessor().post_process_semantic_segmentation
    listed = post_process(outputs, [(30, 40), (50, 60)])
    for sizes in ([[30, 40], [50, 60]], torch.tensor([[30, 40], [50, 60]]), np.array([[30, 40], [50, 60]])):
        assert all(map(torch.equal, post_process(outputs, sizes), listed))
    assert [tuple(labels.shape) for labels in post_process(outputs)] == [(60, 96), (96, 40)]


def test_sizes_the_outputs_do_not_carry():
    """Code that knows only target sizes gets the same labels: sizes in the model follow from the processor's rule."""
    targets = [(30, 50), (90, 61)]
    image_processor = processor()
    sizes = [image_processor(np.zeros((*target, 3), np.uint8)).image_sizes[0].tolist() for target in targets]
    outputs = outputs_of(sizes)
    expected = image_processor.post_process_semantic_segmentation(outputs, targets)
    del outputs.image_sizes
    assert all(map(torch.equal, image_processor.post_process_semantic_segmentation(outputs, targets), expected))

    # Made by another processor, which resized to squares: nothing says where the images are.
    squares = outputs_of([(64, 64)] * 2, image_sizes=None)
    with pytest.raises(ValueError, match=r"without image_sizes, and a padded input of \(64, 64\)"):
        image_processor.post_process_semantic_segmentation(squares, targets)
    whole = image_processor.post_process_semantic_segmentation(squares)
    squares.image_sizes = squares.padded_sizes
    assert all(map(torch.equal, whole, image_processor.post_process_semantic_segmentation(squares)))


def test_half_precision_and_gradients():
    """bfloat16 outputs are scored in float32; outputs of a training step do not drag their graph along."""
    outputs = outputs_of([(64, 64)])
    outputs.masks_queries_logits = outputs.masks_queries_logits.bfloat16().requires_grad_()
    outputs.class_queries_logits = outputs.class_queries_logits.bfloat16().requires_grad_()
    (result,) = SANImageProcessor().post_process_semantic_segmentation(
        outputs, [(90, 80)], return_segmentation_scores=True
    )
    assert result.segmentation_scores.dtype == torch.float32 and not result.segmentation_scores.requires_grad
    torch.testing.assert_close(
        result.segmentation_scores, dense_scores(outputs, (64, 64), [(90, 80)])[0].detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("patch_size", [14, 16])
def test_patch_sizes(patch_size):
    """
    Masks of whole patches, whatever remains of the padded input beside them: stretched over all of it, each patch would
    be a fraction of a pixel too large, and everything to the right and below would move.
    """
    outputs = outputs_of([(90, 120)], stride=patch_size)
    (result,) = SANImageProcessor().post_process_semantic_segmentation(
        outputs, [(90, 120)], return_segmentation_scores=True
    )
    covered = [cells * patch_size for cells in outputs.masks_queries_logits.shape[-2:]]
    height, width = min(90, covered[0]), min(120, covered[1])
    inside = SimpleNamespace(**(vars(outputs) | {"image_sizes": torch.tensor([[height, width]])}))
    expected = dense_scores(inside, covered, [(height, width)])[0]
    torch.testing.assert_close(result.segmentation_scores[:, :height, :width], expected, rtol=1e-5, atol=1e-6)
    rest = F.pad(expected, (0, 120 - width, 0, 90 - height), mode="replicate")
    torch.testing.assert_close(result.segmentation_scores, rest, rtol=1e-5, atol=1e-6)


class PatchColours(torch.nn.Module):
    """Stands for a SAN: two queries, dark and bright, each of whose masks shows the brightness of a patch's middle."""

    def forward(self, pixel_values, image_sizes=None, patch=8):
        grey = pixel_values.mean(1)[:, patch // 2 :: patch, patch // 2 :: patch]
        grey = grey[:, : pixel_values.shape[2] // patch, : pixel_values.shape[3] // patch]
        batch = len(pixel_values)
        return SimpleNamespace(
            class_queries_logits=torch.tensor([[9.0, 0, 0], [0, 9.0, 0]]).expand(batch, 2, 3),
            masks_queries_logits=torch.stack([-grey, grey], dim=1) * 20,
            image_sizes=image_sizes,
            padded_sizes=torch.tensor([pixel_values.shape[-2:]] * batch),
            patch_sizes=torch.tensor([[patch, patch]] * batch),
        )


@pytest.mark.parametrize("size", [(160, 160), (200, 200), (160, 240), (161, 163)])
@pytest.mark.parametrize(
    "options",
    [{}, {"pad_size": {"height": 256, "width": 264}}, {"size_divisor": 128}, {"size_divisor": None}, {"do_pad": False}],
)
def test_padding_for_one_call(size, options):
    """
    Label maps moved or stretched after a padding that is not the processor's own: the picture is dark above and
    bright below, so the border is at half of its height; or the right half of a collator's own padding.
    """
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[size[0] // 2 :] = 255
    image_processor = processor(size={"shortest_edge": min(size), "longest_edge": 4 * max(size)})
    inputs = image_processor(pixels, **options)
    labels = image_processor.post_process_semantic_segmentation(PatchColours()(**inputs), [size])[0]
    assert abs(int((labels[:, 80] == 1).int().argmax()) - size[0] // 2) <= 4  # half a patch
    assert not labels[: size[0] // 2 - 4].any() and labels[size[0] // 2 + 5 :].all()

    # A collator's own padding: the outputs know it, whoever made it.
    inputs["pixel_values"] = F.pad(inputs["pixel_values"], (0, 40, 0, 24))
    again = image_processor.post_process_semantic_segmentation(PatchColours()(**inputs), [size])[0]
    assert (again != labels).float().mean() < 0.06


@pytest.mark.parametrize(
    "changes, kwargs, message",
    [
        ({}, {"target_sizes": [(5, 5)]}, "Got 1 target_sizes for outputs of 2 images"),
        ({}, {"target_sizes": [(5, 5), (0, 5)]}, "Got target_sizes=.*at least 1"),
        ({}, {"target_sizes": [(5, 5, 3)] * 2}, "Got target_sizes="),
        ({"image_sizes": torch.tensor([[64, 64]])}, {}, "Got 1 image_sizes for outputs of 2 images"),
        ({"image_sizes": torch.tensor([[64, 200]] * 2)}, {}, r"image of \(64, 200\).*larger than the padded input"),
        ({"padded_sizes": torch.tensor([[64, 96]] * 2)}, {}, r"input of \(64, 96\) in patches of \(16, 16\) does not"),
        ({"padded_sizes": None}, {}, "Got outputs without padded_sizes: where an image lies"),
        ({"padded_sizes": None, "patch_sizes": None}, {}, "without padded_sizes and patch_sizes"),
        ({"masks_queries_logits": None}, {}, "Got SimpleNamespace as outputs, expected the model's"),
        ({}, {"target_sizes": [(10**6, 10**6), (5, 5)]}, "1,000,000,000,000 pixels, expected at most"),
        ({"masks_queries_logits": torch.full((2, 6, 4, 4), torch.nan)}, {}, "Image 0: masks_queries_logits has NaN"),
        ({"class_queries_logits": torch.full((2, 6, 6), torch.inf)}, {}, "Image 0: class_queries_logits has NaN"),
        ({}, {"num_labels": 0}, r"Got num_labels=0, expected 1..5"),
        ({}, {"num_labels": 6}, r"Got num_labels=6, expected 1..5"),
    ],
)
def test_bad_outputs_and_sizes(changes, kwargs, message):
    """What does not fit together gives no label map: it would be a wrong one."""
    outputs = outputs_of([(64, 64)] * 2, **changes)
    with pytest.raises(ValueError, match=message):
        SANImageProcessor().post_process_semantic_segmentation(outputs, **kwargs)


def peak_memory(height, width, num_classes) -> tuple[float, float]:
    """Peak resident memory of a process that only makes a label map, before it does and at its end, in GB."""
    torch.manual_seed(0)
    masks = torch.nn.functional.interpolate(torch.randn(1, 100, 8, 10), size=(40, 54), mode="bicubic") * 4
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(1, 100, num_classes + 1) * 3,
        masks_queries_logits=masks,
        image_sizes=torch.tensor([[640, 853]]),
        padded_sizes=torch.tensor([[640, 864]]),
        patch_sizes=torch.tensor([[16, 16]]),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (labels,) = SANImageProcessor().post_process_semantic_segmentation(outputs, [(height, width)])
    assert labels.shape == (height, width)
    return before / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
def test_memory():
    """847 classes on a third of a megapixel, 1.1 GB as float scores: a dense map, even in half, would show."""
    ((before, after),) = Run(peak_memory, 500, 666, 847).outcomes()
    assert after - before < 0.25


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("num_classes", [847, 10_000])
def test_memory_of_large_photos(num_classes):
    """12 megapixels, with 847 classes (41 GB as float scores) and with 10,000: under 2.5 GB more than before."""
    ((before, after),) = Run(peak_memory, 3000, 4000, num_classes).outcomes()
    assert after - before < 2.5
