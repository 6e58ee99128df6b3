"""A model of one's own on the Hub: everything in one repository, and back from there."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from san_hf.hub import from_pretrained, push_to_hub, save_pretrained
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from tests.tiny import tiny_config, tiny_tokenizer


FACTS = {
    "title": "SAN for gardens",
    "base_model": "someone/clip",
    "training": "An afternoon.",
    "results": [{"dataset": "Gardens", "mIoU": 12.3}],
    "results_note": "Measured on 20 gardens, in percent.",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SANForSemanticSegmentation(tiny_config()).eval()


@pytest.fixture(scope="module")
def processor():
    size = {"shortest_edge": 64, "longest_edge": 256}
    return SANProcessor(image_processor=SANImageProcessor(size=size), tokenizer=tiny_tokenizer())


def test_push_and_load(hub, model, processor):
    """Catches an upload without processor, code or card, and weights that come back changed."""
    commit = push_to_hub(model, processor, "someone/gardens", facts=FACTS, token="hf_secret", commit_message="Garden")
    assert hub.sha("someone/gardens") in commit.commit_url
    files = hub.repositories["someone/gardens"][-1]
    assert {"config.json", "model.safetensors", "modeling_san.py", "processing_san.py", "tokenizer.json"} <= set(files)
    assert 'from_pretrained("someone/gardens"' in files["README.md"].decode()

    back, processor_back = from_pretrained("someone/gardens")
    inputs = processor_back(images=Image.new("RGB", (70, 50), "green"), text=["cat", "grass"], return_tensors="pt")
    expected = processor(images=Image.new("RGB", (70, 50), "green"), text=["cat", "grass"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(back(**inputs).class_queries_logits, model(**expected).class_queries_logits)

    # A second time: the same repository, one commit more.
    push_to_hub(model, processor, "someone/gardens", facts=FACTS, token="hf_secret")
    assert len(hub.repositories["someone/gardens"]) == 3


def test_push_refused(hub, model, processor):
    """Catches a failed upload that looks like one that worked."""
    with pytest.raises(HfHubHTTPError):
        push_to_hub(model, processor, "someone/gardens", token="hf_secret", revision="no-such-branch")


def test_the_cards_example_runs(model, processor, tmp_path, monkeypatch):
    """Catches a card whose code fails or labels the picture wrongly: the first thing a reader tries."""
    save_pretrained(model, processor, tmp_path / "gardens")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 50), "green").save("photo.jpg")
    card = ModelCard.load(tmp_path / "gardens" / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["label_map"].shape == (50, 70) and names["label_map"].dtype == torch.int64
    assert 0 <= names["label_map"].min() and names["label_map"].max() < 3


def test_where_the_card_says_it_is(model, processor, tmp_path, monkeypatch):
    """Catches a path of this machine in a card, and an example that loads another folder than the card's."""
    monkeypatch.chdir(tmp_path)
    for folder, name in (("runs/mine/best", "runs/mine/best"), (tmp_path / "absolute", "absolute"), ("a/../b", "b")):
        save_pretrained(model, processor, folder)
        text = (tmp_path / folder / "README.md").read_text()
        assert f'from_pretrained("{name}"' in text and str(tmp_path) not in text
