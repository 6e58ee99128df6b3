"""Model cards, as the text they are."""

import pytest
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
