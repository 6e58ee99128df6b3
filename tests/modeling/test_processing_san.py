"""Class names and images in, model inputs out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.utils import logging

from san_hf import load_vocabulary
from san_hf.conversion.tokenizer import clip_tokenizer
from san_hf.modeling import SANImageProcessor, SANProcessor


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture
def processor(tokenizer) -> SANProcessor:
    return SANProcessor(SANImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}), tokenizer)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture
def warnings_of_transformers(caplog):
    """Its loggers keep to themselves unless asked to propagate."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def prompts(processor, inputs, index=0) -> list[str]:
    """The prompts of one class, read back from its token ids."""
    return processor.tokenizer.batch_decode(inputs.input_ids[index], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["tiny_b16", "tiny_l14"])
def test_token_ids_of_the_original(name):
    """Templates in another order, names altered, or another tokenizer: other classifiers. Only the padding is ours."""
    meta = json.loads((GOLDEN / name / "meta.json").read_text())
    expected = load_file(GOLDEN / name / "io.safetensors")["token_ids"].transpose(0, 1).long()
    processor = SANProcessor(SANImageProcessor(), clip_tokenizer())
    inputs = processor(text=meta["vocabulary"])
    length = inputs.input_ids.shape[-1]
    assert torch.equal(inputs.input_ids * inputs.attention_mask, expected[..., :length])
    assert not expected[..., length:].any()
    assert inputs.attention_mask.sum(-1).max() == length  # padded to the longest prompt and no further
    assert torch.equal(inputs.attention_mask, inputs.attention_mask.sort(-1, descending=True).values)


def test_images_and_text(processor, photo):
    """One call must give what its two halves give."""
    maps = np.ones((40, 50), np.uint8)
    both = processor(images=photo, text=["cat", "grass"], segmentation_maps=maps)
    assert set(both) == {"pixel_values", "image_sizes", "labels", "input_ids", "attention_mask"}
    halves = {**processor(text=["cat", "grass"]), **processor.image_processor(photo, maps)}
    for key, value in halves.items():
        assert torch.equal(both[key], value)
    assert set(processor.model_input_names) == set(both) - {"labels"}
    arrays = processor(images=photo, text=["cat"], return_tensors=None)
    assert isinstance(arrays.input_ids, np.ndarray) and isinstance(arrays.pixel_values, list)


def test_arguments_reach_the_image_processor(processor, photo):
    """Settings for one call, for the images' half."""
    inputs = processor(images=photo, text=["cat"], size={"height": 20, "width": 30}, do_pad=False)
    assert inputs.pixel_values.shape == (1, 3, 20, 30)
    inputs = processor(images=photo, images_kwargs={"size_divisor": 50})
    assert inputs.pixel_values.shape == (1, 3, 50, 50)


def test_prompt_templates(tokenizer, tmp_path):
    """The templates are part of a checkpoint: kept by it, overridden by a call, in their order."""
    templates = ["a {} here.", "{}", "{x} {} {"]
    processor = SANProcessor(SANImageProcessor(), tokenizer, prompt_templates=templates)
    expected = ["a cat here .", "cat", "{ x } cat {"]
    assert prompts(processor, processor(text=["dog", "cat"]), 1) == expected
    processor.save_pretrained(tmp_path)
    for loaded in (SANProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.prompt_templates == templates
        assert prompts(loaded, loaded(text=["cat"])) == expected
        assert loaded(text=["cat"], prompt_templates="vild").input_ids.shape[1] == 14
    assert processor(text=["cat"], prompt_templates="imagenet").input_ids.shape[1] == 80
    assert SANProcessor(SANImageProcessor(), tokenizer)(text=["cat"]).input_ids.shape[1] == 14


def test_save_and_load(processor, photo, tmp_path):
    """A saved processor does the same, whichever of the classes loads it."""
    processor.save_pretrained(tmp_path)
    expected = processor(images=photo, text=["cat", "dog house"])
    for loaded in (SANProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, SANProcessor)
        inputs = loaded(images=photo, text=["cat", "dog house"])
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "name",
    ["{}", "{0}", "{name!r:>9}", "50 % {", "\N{CAT FACE} cat", "\u732b", "C++ (programming)", "a, b and c", "%s"],
)
def test_odd_names(processor, name):
    """Braces must not be formatted, nor characters lost: the prompt holds the name's own tokens."""
    inputs = processor(text=["cat", f"  {name}\n"], prompt_templates=["the {} ."])
    expected = processor.tokenizer(f"the {name} .")["input_ids"]
    assert inputs.input_ids[1][inputs.attention_mask[1] == 1].tolist() == expected


def test_order_and_case(processor):
    """Labels count in the caller's order; the tokenizer lower-cases by itself."""
    names = ["zebra", "ant", "Moth"]
    inputs = processor(text=names, prompt_templates=["{}"])
    assert [prompts(processor, inputs, index)[0] for index in range(3)] == ["zebra", "ant", "moth"]
    assert torch.equal(processor(text=tuple(names), prompt_templates=["{}"]).input_ids, inputs.input_ids)


def test_too_long_names(processor, warnings_of_transformers):
    """Cut to the tokenizer's 77 tokens, with the end-of-text token that CLIP pools at, and never silently."""
    long_name = "word " * 300
    with warnings_of_transformers.at_level("WARNING"):
        inputs = processor(text=["cat", long_name, "dog"])
    (message,) = [record.getMessage() for record in warnings_of_transformers.records]
    assert "'word word" in message and "more than 77 tokens" in message
    assert inputs.input_ids.shape == (3, 14, 77)
    assert (inputs.input_ids[1, :, -1] == processor.tokenizer.eos_token_id).all()
    assert (inputs.input_ids[1, :, 0] == processor.tokenizer.bos_token_id).all()


def test_names_that_just_fit(processor, warnings_of_transformers):
    """77 tokens are not too many."""
    with warnings_of_transformers.at_level("WARNING"):
        inputs = processor(text=["a" * 75], prompt_templates=["{}"])
    assert inputs.attention_mask.sum() == 77 and not warnings_of_transformers.records


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat, grass", r"Got text='cat, grass', expected a list of class names: \['cat', 'grass'\]"),
        ([], "Got an empty list for text"),
        (["cat", " \n"], "Got a blank class name at position 1"),
        (["cat", ""], "Got a blank class name at position 1"),
        (["cat", "dog", "cat"], "Got the class name 'cat' at the positions 0 and 2"),
        (["traffic light", "Traffic  light "], "'traffic light' and 'Traffic  light ', .* at the positions 0 and 1"),
        (["caf\u00e9", "cafe\u0301"], "which are one to the tokenizer, at the positions 0 and 1"),
        (["they\u2019re", "they're"], "which are one to the tokenizer"),
        (["salt & pepper", "salt &amp; pepper"], "which are one to the tokenizer"),
        (["sky", "\uff33\uff2b\uff39"], "which are one to the tokenizer"),
        (["u.s.a", "u.s. a"], "'u.s.a' and 'u.s. a', which have the same tokens"),
        (["far " * 99 + "sky", "far " * 99 + "grass"], "which have the same tokens"),
        (["cat", "&nbsp;\ufeff"], "Got a blank class name at position 1"),
        (["sky&lt;|endoftext|&gt;"], "the tokenizer's own '<|endoftext|>'".replace("|", r"\|")),
        ({"sky", "grass"}, r"Got a set as text, expected a list: .* sorted\(names\)\?"),
        (frozenset(["sky"]), "Got a frozenset as text"),
        ({0: "sky", 1: "grass"}, r"Got a dict as text, .* list\(mapping.values\(\)\)\?"),
        (b"sky", "Got b'sky' as text"),
        (7, "Got 7 as text"),
        (["a" * 10_001], "Got a class name of 10,001 letters at position 0"),
        (["cat", 3], "Got 3 at position 1"),
        (["cat", None], "Got None at position 1"),
        ([["cat"], ["dog"]], r"Got \['cat'\] at position 0"),
        (["cat<|endoftext|>dog"], "the tokenizer's own '<|endoftext|>'".replace("|", r"\|")),
    ],
)
def test_bad_names(processor, photo, text, message):
    """Each would be a vocabulary other than the caller meant."""
    with pytest.raises(ValueError, match=message):
        processor(images=photo, text=text)


@pytest.mark.parametrize(
    "templates, message",
    [
        ("villd", r"Got prompt_templates='villd', expected one of \['vild', 'imagenet'\]"),
        ("a photo of a {}", "or a list of templates"),
        ([], "Got no prompt templates"),
        (["a photo"], "Got the prompt template 'a photo'"),
        (["{} and {}"], "Got the prompt template '{} and {}'"),
        ([3], "Got the prompt template 3"),
    ],
)
def test_bad_templates(processor, templates, message):
    """A template without a place for the name makes all classes the same. Refused before it is saved, too."""
    with pytest.raises(ValueError, match=message):
        processor(text=["cat"], prompt_templates=templates)
    with pytest.raises(ValueError, match=message):
        SANProcessor(processor.image_processor, processor.tokenizer, prompt_templates=templates)


def test_nothing_to_do(processor, photo):
    """Half a request."""
    with pytest.raises(ValueError, match="neither images nor text"):
        processor()
    with pytest.raises(ValueError, match="segmentation maps without images"):
        processor(text=["cat"], segmentation_maps=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="expansion without text"):
        processor(images=photo, expansion=["dog"])


def test_labels_outside_the_vocabulary(processor, photo):
    """They would train nothing or the wrong class; classes of the expansion have no labels. Ignored pixels are fine."""
    labels = np.zeros((40, 50), np.uint8)
    labels[:20], labels[20:25] = 2, 255
    processor(images=photo, text=["cat", "dog", "cow"], segmentation_maps=labels)
    with pytest.raises(ValueError, match=r"map 1 has the labels \[2\], expected 0..1 for 2 class names, or 255"):
        processor(
            images=[photo, photo], text=["cat", "dog"], segmentation_maps=[labels // 255, labels], expansion=["cow"]
        )
    with pytest.raises(ValueError, match=r"map 0 has the labels \[255\]"):
        processor(images=photo, text=["cat", "dog", "cow"], segmentation_maps=labels, ignore_index=7)


def test_expansion(processor):
    """The caller's names keep their labels; what they already name does not compete with itself."""
    text, coco = ["Grass", "unicorn"], load_vocabulary("coco-stuff")
    names = SANProcessor.expand(text, coco)
    assert names[:3] == ["Grass", "unicorn", "person"] and len(names) == 172 and "grass" not in names
    expanded = processor(text=text, expansion=coco, prompt_templates=["{}"])
    assert torch.equal(expanded.input_ids, processor(text=names, prompt_templates=["{}"]).input_ids)
    with pytest.raises(ValueError, match="Got expansion='person', expected a list"):
        processor(text=text, expansion="person")


def test_ten_thousand_names(processor):
    """One tokenizer call, not one per name: seconds."""
    inputs = processor(text=[f"thing {index}" for index in range(10_000)], prompt_templates=["a {}", "the {}"])
    assert inputs.input_ids.shape[:2] == (10_000, 2)
    assert prompts(processor, inputs, 9_999) == ["a thing 9 9 9 9", "the thing 9 9 9 9"]


def test_post_processing_is_the_image_processors(processor):
    """Offered where the outputs are: same labels, every argument handed on."""
    outputs = type("Outputs", (), {})()
    outputs.class_queries_logits = torch.randn(1, 5, 4) * 5
    outputs.masks_queries_logits = torch.randn(1, 5, 4, 6) * 5
    outputs.image_sizes = torch.tensor([[64, 90]])
    outputs.padded_sizes, outputs.patch_sizes = torch.tensor([[64, 96]]), torch.tensor([[16, 16]])
    (ours,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(30, 40)], num_labels=1)
    (expected,) = processor.image_processor.post_process_semantic_segmentation(outputs, [(30, 40)], num_labels=1)
    assert torch.equal(ours, expected) and ours.max() == 1


def test_ignore_index_among_the_classes(processor):
    """A class whose pixels would count as unlabelled, without a word, in all of training."""
    names, label_map = [f"thing {index}" for index in range(300)], np.full((64, 64), 255)
    arguments = {"text": names, "segmentation_maps": label_map, "prompt_templates": ["a {}"]}
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="ignore index 255 is also one of the 300 classes"):
        processor(image, **arguments)
    assert (processor(image, **arguments, ignore_index=-100).labels[:, :64, :64] == 255).all()
    assert (processor(image, **arguments, ignore_index_is_class=True).labels == 255).all()
    with pytest.raises(ValueError, match="ignore index 3 is also one"):
        processor(image, text=names[:4], segmentation_maps=label_map, ignore_index=3)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (["sky", "grass"], np.zeros((64, 64, 3), np.uint8), "Got an image as text: the image comes first"),
        ("sky", [np.zeros((64, 64, 3), np.uint8)], "Got an image as text: the image comes first"),
        (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), int), "label maps go to segmentation_maps"),
    ],
)
def test_arguments_in_each_others_place(processor, images, text, message):
    """A message about pixels that are no strings, or names that are no files."""
    with pytest.raises(ValueError, match=message):
        processor(images, text)
