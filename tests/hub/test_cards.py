"""Model cards, as the text they are."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from san_hf.cards import load_facts, render_card
from san_hf.conversion import RELEASES


RELEASED = {
    "san-vit-b-16": {"ADE20K-847": 10.21, "Pascal Context-459": 16.71, "Pascal VOC-20": 93.95},
    "san-vit-large-14": {"ADE20K-847": 12.96, "ADE20K-150": 31.93, "COCO-Stuff val2017": 45.57},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    """Catches metadata the Hub can't read, a figure in the text that isn't the one in it, an undefined metric."""
    facts = load_facts(name)
    card = ModelCard(str(render_card(facts, f"someone/{name}", provenance="From the release.")))
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("mit", "transformers")
    assert data["pipeline_tag"] == "image-segmentation"
    assert data["base_model"].startswith("openai/clip-vit") and data["datasets"] == ["coco-stuff"]
    assert {"open-vocabulary", "semantic-segmentation", "san"} <= set(data["tags"])
    figures = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert len(figures) == 6 and figures.items() >= RELEASED[name].items()
    for dataset, value in figures.items():
        assert f"| {dataset} | {value} |" in card.text
    for metric in facts["results"][0].keys() - {"dataset"}:
        assert f"- **{metric}**: " in card.text
    assert f'from_pretrained("someone/{name}"' in card.text and "From the release." in card.text
    assert "@inproceedings{xu2023side" in card.text and "{{" not in card.text and "\n\n\n" not in card.text
    assert "- **fwIoU**" not in card.text or "fwIoU" in facts["results"][0]


def test_every_release_has_facts():
    """Catches a release that is known to the converter, but not to the cards."""
    assert all(load_facts(name)["title"] for name in RELEASES)
    with pytest.raises(KeyError, match="no facts about 'san-vit-h'.*san-vit-b-16"):
        load_facts("san-vit-h")


def test_weights_nobody_compared():
    """Catches published results lent to other weights: in the text without a warning, or in the metadata at all."""
    card = render_card(load_facts("san-vit-b-16"), "mine", facts_are_of_these_weights=False)
    assert "> **The sizes are those of SAN ViT-B/16" in card.text and "was not checked" in card.text
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert card.text.index("was not checked") < card.text.index("| ADE20K-150 | 27.56 |")


def test_only_what_is_known():
    """Catches a card that claims results or a base nobody stated, and facts that are dropped for a typing mistake."""
    card = render_card({"title": "Mine"}, "someone/mine")
    assert "No results were measured" in card.text and "ADE20K" not in card.text and "None" not in str(card)
    assert "base_model" not in str(card)
    with pytest.raises(ValueError, match="Unknown facts for a model card: result; known are"):
        render_card({"title": "Mine", "result": []}, "someone/mine")


@pytest.mark.parametrize(
    "names", [("街景", "夜景"), ("VOC 20", "voc-20"), ("Straße", "Stra e"), ("a: b", "a - b"), ("|", "-")]
)
def test_results_of_two_data_sets(names):
    """Catches two data sets whose results the Hub takes for those of one, and a name that breaks table or metadata."""
    rows = [{"dataset": name, "mIoU": 10.5 * number} for number, name in enumerate(names, start=1)]
    card = render_card({"title": "mine", "results": rows}, "me/mine")
    index = yaml.safe_load(str(card).split("---")[1])["model-index"][0]["results"]
    assert [(r["dataset"]["name"], [m["value"] for m in r["metrics"]]) for r in index] == list(
        zip(names, ([10.5], [21.0]))
    )
    assert len({result["dataset"]["type"] for result in index}) == 2
    for name, value in zip(names, (10.5, 21.0)):
        assert f"| {name.replace('|', chr(92) + '|')} | {value} |" in card.text


def test_names_of_any_letters():
    """Catches class names that the example's code spells otherwise, and a title that becomes HTML."""
    names = ["天空", "people's car", 'a "b": c|d', "R\\T"]
    card = render_card({"title": "<b>mine</b>: _x_", "sample_classes": names}, 'me/"mine"')
    (listed,) = re.findall(r"text=(\[.*\]), return", card.text)
    assert ast.literal_eval(listed) == names and "天空" in listed and "people's" in listed
    assert r"# \<b\>mine\</b\>: \_x\_" in card.text and 'from_pretrained("me/\\"mine\\""' in card.text


@pytest.mark.parametrize(
    ("facts", "metadata", "text"),
    [
        ({}, None, "No licence was named for these weights"),
        ({"license": "cc-by-nc-4.0"}, "cc-by-nc-4.0", "The licence of these weights: cc-by-nc-4.0."),
        ({"license": "mit"}, "mit", "\nMIT."),
    ],
)
def test_licence(facts, metadata, text):
    """Catches a licence that nobody chose."""
    card = render_card({"title": "mine"} | facts, "me/mine")
    assert card.data.license == metadata and text in card.text
    lent = render_card(load_facts("san-vit-b-16"), "mine", facts_are_of_these_weights=False)
    assert lent.data.license is None
