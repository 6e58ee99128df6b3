"""The embedded checkpoint: its files, its tokenizer, and its metrics on the picture book's test pages."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, AutoProcessor

from san_hf.cards import load_facts
from san_hf.hub import from_pretrained, resolve
from san_hf.modeling import SANForSemanticSegmentation, SANProcessor
from san_hf.picture_book.measure import measure, measure_label_maps


CHECKPOINT = Path(resolve("picture-book"))


@pytest.fixture(scope="module")
def embedded():
    return from_pretrained("picture-book")


def test_embedded_checkpoint_is_small():
    """Catches weights in single precision, or a forgotten training state, in the package."""
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 8e6, sizes
    assert max(sizes.values()) < 5e6, sizes


def test_embedded_checkpoint_has_no_code():
    """Catches code beside the weights, a second copy of the package's own, and a loader that looks for it there."""
    assert not list(CHECKPOINT.glob("*.py"))
    assert not [path.name for path in CHECKPOINT.glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForSemanticSegmentation.from_pretrained(CHECKPOINT, **options)
        processor = AutoProcessor.from_pretrained(CHECKPOINT, **options)
        assert type(model) is SANForSemanticSegmentation and type(processor) is SANProcessor
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert 'san_hf.from_pretrained("picture-book")' in card and "trust_remote_code" not in card


def test_embedded_checkpoint_loads_in_single_precision(embedded):
    """Catches the storage type leaking out: half precision is slow, or unsupported, on many CPUs."""
    model, _ = embedded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert isinstance(model, SANForSemanticSegmentation)


@pytest.mark.parametrize("text", ["a red car", "Ein Haus, größer", "猫 🐈 café", "naïve​zero", "\x00\x7f"])
def test_tokenizer_reads_any_text(embedded, text):
    """Catches a byte without a token: it would silently become an end-of-text, where CLIP reads off its embedding."""
    tokenizer = embedded[1].tokenizer
    ids = tokenizer(text).input_ids
    end = tokenizer.eos_token_id
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == end == len(tokenizer) - 1 == tokenizer.pad_token_id
    assert end not in ids[:-1]
    assert tokenizer(text.upper()).input_ids == ids or "ß" in text


def test_embedded_checkpoint_measures_as_its_card_says(embedded):
    """Catches results that no longer hold: changed weights, pages, model, processor or post-processing."""
    claimed = json.loads((CHECKPOINT / "results.json").read_text())
    assert claimed["test_pages"] == 300
    measured = measure(*embedded, 40)
    expected = {"base_miou": 67.44, "novel_miou": 63.10, "stuff_miou": 73.12, "pixel_accuracy": 83.07}
    assert measured == pytest.approx(expected, abs=0.5)
    card = (CHECKPOINT / "README.md").read_text()
    for name in ("base_miou", "novel_miou", "stuff_miou"):
        assert f"| {claimed[name]:.1f} |" in card
    assert load_facts("picture-book")["notice"] in card


@pytest.mark.slow
def test_embedded_checkpoint_measures_as_its_card_says_on_all_pages(embedded):
    """Catches the same on all test pages, by the model's and the processor's own calls."""
    model, processor = embedded
    claimed = json.loads((CHECKPOINT / "results.json").read_text())

    def segment(image):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()

    measured = measure_label_maps(segment, claimed["test_pages"])
    for name, value in measured.items():
        assert value == pytest.approx(claimed[name], abs=0.5), name
