"""The one path: images and a vocabulary in, label maps out; and how often each tower is asked."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from san_hf.images import ImageError
from san_hf.inference import Predictor, Segmenter, Vocabulary, VocabularyError


NAMES = ["cat", "grass", "sky", "red boat"]


@pytest.fixture(scope="module")
def predictor(model, processor):
    return Predictor(model, processor)


@pytest.fixture(scope="module")
def vocabulary(predictor):
    return predictor.vocabulary(NAMES)


def by_hand(model, processor, image, **options):
    """Transformers' way: processor, model, post-processing."""
    with torch.inference_mode():
        outputs = model(**processor(images=image, text=NAMES))
    (label_map,) = processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(image.height, image.width)], **options
    )
    return label_map


def test_label_maps_are_the_models(model, processor, predictor, vocabulary, images):
    """Catches other preprocessing, embeddings, sizes or post-processing than the model's own, in batches of sizes."""
    labels_seen: set[int] = set()
    for got, image in zip(predictor(images, vocabulary), images, strict=True):
        expected = by_hand(model, processor, image)
        assert got.dtype == torch.int64 and got.shape == (image.height, image.width)
        labels_seen.update(expected.unique().tolist())
        assert (got != expected).float().mean() < 0.005  # a sum of floats may differ in its last digit
    assert len(labels_seen) > 2


def test_company_changes_nothing(predictor, vocabulary, images):
    """Catches images that are padded to the size of others, and results in another order than the images."""
    for index, together in enumerate(predictor(images, vocabulary)):
        (alone,) = predictor([images[index]], vocabulary)
        assert (together != alone).sum() <= 2
    assert [image.target_size for image in predictor.encode(images)] == [(i.height, i.width) for i in images]


def test_new_words_cost_no_vision_pass(predictor, vocabulary, images, passes):
    """Catches an encoded image that goes through the model again, and words that are encoded again for each image."""
    encoded = predictor.encode(images)
    assert passes == {"images": len(images), "prompts": 0}
    first = predictor.classify(encoded, vocabulary)
    assert passes == {"images": len(images), "prompts": 0}
    others = predictor.vocabulary(["dog", "sea"])
    prompts = passes["prompts"]
    second = predictor.classify(encoded, others)
    assert passes == {"images": len(images), "prompts": prompts} and prompts == 2 * 14
    for got, expected in zip((*first, *second), (*predictor(images, vocabulary), *predictor(images, others))):
        assert torch.equal(got, expected)


def test_each_image_once_per_view(model, processor, vocabulary, images, passes, monkeypatch):
    """Catches a view that is processed or encoded twice."""
    processed = []
    call = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *args, **kwargs: processed.append(1) or call(self, *args, **kwargs)
    )
    Predictor(model, processor)(images, vocabulary)
    assert passes["images"] == len(processed) == len(images)
    Predictor(model, processor, augment=True)(images[:2], vocabulary)
    assert passes["images"] == len(processed) == len(images) + 2 * 12


def test_mirrored_views_are_turned_back(model, processor, vocabulary, images):
    """Catches a mirrored view whose left is added to the right: mirroring an image must mirror its label map."""
    predictor = Predictor(model, processor, augment=True)
    image = images[0]
    (plain,), (mirrored,) = predictor([image], vocabulary), predictor([ImageOps.mirror(image)], vocabulary)
    assert (plain != mirrored.flip(-1)).sum() <= 2
    assert (plain != mirrored).sum() > 100


def test_expansion_and_threshold(model, processor, predictor, images):
    """Catches classes of the expansion that are no "other", and a threshold that isn't on the confidence's scale."""
    more = ["dog", "sea"]
    expanded = predictor.vocabulary(NAMES[:2], expand=NAMES[2:])
    (got,) = predictor([images[0]], expanded)
    expected = by_hand(model, processor, images[0], num_labels=2)
    assert (got != expected).sum() <= 2 and (got == 2).any()
    vocabulary = predictor.vocabulary([*NAMES, *more], threshold=0.6)
    with torch.inference_mode():
        outputs = model(**processor(images=images[0], text=[*NAMES, *more]))
    (result,) = processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(images[0].height, images[0].width)], return_confidence=True
    )
    best = result.confidence
    (got,) = predictor([images[0]], vocabulary)
    sure = (best - 0.6).abs() > 1e-4
    assert ((got == 6) == (best < 0.6))[sure].all()


def test_the_models_own_vocabulary(model, processor, images, passes):
    """Catches a carried vocabulary that isn't used, or is kept when the model gets another."""
    carrying = copy.deepcopy(model)
    predictor = Predictor(carrying, processor)
    with pytest.raises(ValueError, match="carries no class names"):
        predictor(images)
    for names in (NAMES, NAMES[::-1]):
        carrying.set_vocabulary(names, **processor(text=names))
        prompts = passes["prompts"]
        (got,) = predictor(images[:1])
        assert passes["prompts"] == prompts
        assert torch.equal(got, predictor(images[:1], predictor.vocabulary(names))[0])


def test_outputs_that_are_not_finite(model, processor, images):
    """Catches a label map made of NaN."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.logit_scale.fill_(torch.inf)
    predictor = Predictor(broken, processor)
    with pytest.raises(ValueError, match="NaN or infinite values.*bfloat16"):
        predictor(images[:1], predictor.vocabulary(NAMES))


def test_segmenter_takes_any_image(model, processor, images, tmp_path):
    """Catches a kind of image that gives another label map, and lists and iterators in another order."""
    segmenter = Segmenter(model, processor, NAMES)
    image = images[0]
    image.save(tmp_path / "image.png")
    expected = segmenter(image).label_map
    pixels = np.asarray(image)
    same = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        image.convert("RGBA"),
    ]
    for other in same:
        segmentation = segmenter(other)
        assert np.array_equal(segmentation.label_map, expected)
        assert segmentation.image.size == image.size and segmentation.class_names == NAMES
    for batch_size in (1, 2, 8):
        results = segmenter(images, batch_size=batch_size)
        assert [r.image.size for r in results] == [i.size for i in images]
        assert (results[0].label_map != expected).sum() <= 2
    assert segmenter([]) == []


def test_iterators_are_read_as_they_go(model, processor, images):
    """Catches an endless stream of images that is read to its end before the first result."""
    segmenter = Segmenter(model, processor, NAMES)
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield images[0]

    results = segmenter(stream(), batch_size=2)
    next(results), next(results), next(results)
    assert len(read) == 4


def test_segmenter_with_a_vocabulary(model, processor, images, tmp_path, passes):
    """Catches a given vocabulary that is encoded again, and options that are silently passed over."""
    vocabulary = Vocabulary.encode(model, processor, NAMES, expand=["sea"])
    vocabulary.save(tmp_path / "names.safetensors")
    prompts = passes["prompts"]
    segmenter = Segmenter(model, processor, Vocabulary.load(tmp_path / "names.safetensors", model))
    assert segmenter(images[0]).class_names == [*NAMES, "other"] and segmenter(images[0]).expanded
    assert passes["prompts"] == prompts
    with pytest.raises(ValueError, match="Only class names that are given can be expanded"):
        Segmenter(model, processor, vocabulary, expand="coco")
    by_file = Segmenter(model, processor, str(tmp_path / "names.safetensors"), threshold=0.5, other="rest")
    assert by_file.class_names == [*NAMES, "rest"] and by_file.vocabulary.threshold == 0.5
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.text_projection.weight += 1
    for refused in (vocabulary, tmp_path / "names.safetensors"):
        with pytest.raises(VocabularyError, match="of another text tower"):
            Segmenter(other, processor, refused)


def test_colours_travel_with_a_vocabulary(model, processor, images, tmp_path):
    """Catches colours of a vocabulary's file that don't reach the drawing, or that come before the caller's own."""
    Vocabulary.encode(model, processor, NAMES, colors={"cat": "red", "sky": "blue"}).save(tmp_path / "v.safetensors")
    colors = Segmenter(model, processor, tmp_path / "v.safetensors", colors={"sky": "lime"})(images[0]).colors
    assert colors[[NAMES.index("cat"), NAMES.index("sky")]].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_confidence_of_a_segmentation(model, processor, images, tmp_path):
    """Catches a confidence that isn't post-processing's, of another size, or that its file loses."""
    segmenter = Segmenter(model, processor, NAMES, confidence=True)
    for image, got in zip(images[1:3], segmenter(images[1:3])):
        with torch.inference_mode():
            outputs = model(**processor(images=image, text=NAMES))
        (result,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(image.height, image.width)], return_confidence=True
        )
        assert got.confidence.dtype == np.float32 and got.confidence.shape == got.label_map.shape
        np.testing.assert_allclose(got.confidence, result.confidence, atol=1e-4)
    assert got.save(tmp_path / "image")[-1].name == "image.confidence.png"
    with Image.open(tmp_path / "image.confidence.png") as file:
        np.testing.assert_allclose(np.asarray(file) / 65535, got.confidence, atol=1e-5)
    without = Segmenter(model, processor, NAMES)(images[2])
    assert without.confidence is None and without != got
    assert len(without.save(tmp_path / "without")) == 4
    with pytest.raises(ValueError, match="confidence=True"):
        without.save(tmp_path / "without", ["confidence"])


def test_images_that_cannot_be_read(model, processor, tmp_path):
    """Catches stack traces of Pillow, and errors without a reason."""
    segmenter = Segmenter(model, processor, NAMES)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for image, message in (
        (tmp_path / "nothing.png", "there is no such file"),
        (tmp_path / "text.png", "not an image"),
        (tmp_path / "empty.png", "the file is empty"),
        (np.zeros((5, 5, 2), np.uint8), "can't be read"),
        (np.full((5, 5, 3), 300.0), "expected 0..255"),
        ("http://127.0.0.1:9/photo.png", "can't be fetched"),
    ):
        with pytest.raises(ImageError, match=message):
            segmenter(image)
    with pytest.raises(ValueError, match="batch_size=0"):
        segmenter([Image.new("RGB", (64, 64))], batch_size=0)
