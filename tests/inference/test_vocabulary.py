"""Class names and their embeddings: order, synonyms, expansion, and the file that keeps them."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from san_hf.inference import Vocabulary, VocabularyError
from san_hf.inference.vocabulary import split_synonyms, text_tower_digest
from san_hf.vocabularies import load_vocabulary


NAMES = ["sky", "red boat, striped boat", "grass"]
TEMPLATES = ["a photo of a {}.", "the {}"]


def encode(model, processor, names=NAMES, **options) -> Vocabulary:
    return Vocabulary.encode(model, processor, names, templates=TEMPLATES, **options)


def test_embeddings_are_the_models(model, processor):
    """Catches names in another order, prompts of other templates, and embeddings that aren't the text tower's."""
    vocabulary = encode(model, processor)
    with torch.no_grad():
        expected = model.get_class_embeds(**processor(text=NAMES, prompt_templates=TEMPLATES))
    assert torch.equal(vocabulary.class_embeds, expected)
    assert vocabulary.class_names == tuple(NAMES)
    assert (vocabulary.num_labels, vocabulary.has_other, vocabulary.threshold) == (3, False, None)


def test_each_prompt_once(model, processor, passes):
    """Catches a synonym of two classes, or a name of the expansion that is there already, that is encoded twice."""
    names = ["sky", "red boat, striped boat", "Red boat; water"]
    vocabulary = encode(model, processor, names, synonyms=True, expand=["Sky", "mountain"])
    assert passes["prompts"] == 5 * len(TEMPLATES)  # sky, red boat, striped boat, water, mountain
    assert vocabulary.class_names == (*names, "other")
    assert vocabulary.class_of_row == (0, 1, 1, 2, 2, 3)
    assert torch.equal(vocabulary.class_embeds[1], vocabulary.class_embeds[3])


def test_merging_synonyms(model, processor):
    """Catches logits that are summed, or that go to a neighbour's class."""
    vocabulary = encode(model, processor, synonyms=True, expand=["mountain", "sea"])
    logits = torch.randn(2, 5, 4 + 2 + 1)
    merged = vocabulary.merge_synonyms(logits)
    expected = torch.stack([logits[..., group].amax(-1) for group in ([0], [1, 2], [3], [4], [5], [6])], dim=-1)
    assert torch.equal(merged, expected)
    assert encode(model, processor).merge_synonyms(logits) is logits


def test_synonyms_by_class(model, processor):
    """Catches a mapping of synonyms whose words replace the name, or go to another class."""
    vocabulary = encode(model, processor, ["tv", "cat"], synonyms={"tv": ["television", "TV"]})
    assert vocabulary.class_names == ("tv", "cat") and vocabulary.class_of_row == (0, 0, 1)
    (alone,) = encode(model, processor, ["television"]).class_embeds
    torch.testing.assert_close(vocabulary.class_embeds[1], alone)
    assert split_synonyms("television, tv; telly ,") == ["television", "tv", "telly"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "at least one class name"),
        ("cat, dog", {}, r"a list of class names: \['cat', 'dog'\]"),
        ("cat, dog", {"synonyms": True}, r"a list of class names: \['cat', 'dog'\]"),
        (["cat", "Cat"], {}, "expected each name once"),
        (["cat", ";"], {"synonyms": True}, "Class 1, ';', has no word"),
        (["cat"], {"synonyms": {"dog": ["hound"]}}, "synonyms for 'dog'"),
        (["cat", "Other"], {"expand": "coco"}, "a class of the name 'other'"),
        (["cat", "other"], {"threshold": 0.5}, "a class of the name 'other'"),
        (["tv"], {"synonyms": {"tv": "television"}}, "Got synonyms of 'tv'='television', expected a list"),
        ({"cat", "dog"}, {}, "Got a set as class_names"),
        (["they\u2019re", "they're"], {}, "which are one to the tokenizer"),
        (["cat"], {"expand": "everything"}, "Can't expand by 'everything'"),
        (["cat"], {"threshold": 1.5}, "threshold=1.5"),
    ],
)
def test_names_that_are_no_vocabulary(model, processor, names, options, message):
    """Catches names that are passed over, and errors that don't say which."""
    with pytest.raises(ValueError, match=message):
        encode(model, processor, names, **options)


def test_expansion_and_threshold_have_an_other(model, processor):
    """Catches an expansion by the wrong names, and a threshold without a label for what is below it."""
    by_name = encode(model, processor, ["cat", "sky-other"], expand="coco-stuff")
    assert by_name.class_names == ("cat", "sky-other", "other") and by_name.num_labels == 2
    others = [name for name in load_vocabulary("coco-stuff-only") if name not in ("cat", "sky-other")]
    assert torch.equal(by_name.class_embeds, encode(model, processor, ["cat", "sky-other", *others]).class_embeds)
    assert encode(model, processor, ["cat"], threshold=0.5).class_names == ("cat", "other")


def test_kept_in_a_file(model, processor, tmp_path):
    """Catches a fact of the vocabulary that the file loses, and embeddings that change on the way."""
    for options in ({}, {"synonyms": True, "expand": ["sea"], "threshold": 0.25}):
        vocabulary = encode(model, processor, **options)
        vocabulary.save(tmp_path / "names.safetensors")
        loaded = Vocabulary.load(tmp_path / "names.safetensors", model)
        assert torch.equal(loaded.class_embeds, vocabulary.class_embeds)
        facts = [
            {name: value for name, value in vars(v).items() if name != "class_embeds"} for v in (loaded, vocabulary)
        ]
        assert facts[0] == facts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["names.safetensors"]


def test_another_text_tower_is_refused(model, processor, tmp_path):
    """Catches embeddings of another model, and the same model in half precision that is taken for another."""
    file = tmp_path / "names.safetensors"
    encode(model, processor).save(file)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.text_projection.weight[0, 0] += 1
    with pytest.raises(VocabularyError, match="of another text tower"):
        Vocabulary.load(file, other)
    with torch.no_grad():
        other.text_projection.weight.copy_(model.text_projection.weight)
        other.model.visual_projection.weight += 1  # not the text tower's
    half = copy.deepcopy(other).bfloat16()
    for same in (other, half):
        assert Vocabulary.load(file, same).class_names == tuple(NAMES)
    assert text_tower_digest(half) == text_tower_digest(model)


def test_files_that_are_no_vocabulary(model, tmp_path):
    """Catches stack traces, and another kind of file that is taken for one."""
    with pytest.raises(VocabularyError, match="There is no vocabulary '.*nothing'"):
        Vocabulary.load(tmp_path / "nothing", model)
    (tmp_path / "text").write_text("cat\ndog\n")
    with pytest.raises(VocabularyError, match="can't be read as a vocabulary"):
        Vocabulary.load(tmp_path / "text", model)
    save_file({"class_embeds": torch.zeros(2, 16)}, tmp_path / "tensors")
    with pytest.raises(VocabularyError, match="its format is None"):
        Vocabulary.load(tmp_path / "tensors", model)


def test_of_a_model(model, processor):
    """Catches a carried vocabulary in another order, and one that is made up where there is none."""
    with pytest.raises(ValueError, match="carries no class names"):
        Vocabulary.of_model(model)
    carrying = copy.deepcopy(model)
    carrying.set_vocabulary(NAMES, **processor(text=NAMES, prompt_templates=TEMPLATES))
    vocabulary = Vocabulary.of_model(carrying)
    assert vocabulary.class_names == tuple(NAMES)
    assert torch.equal(vocabulary.class_embeds, encode(model, processor).class_embeds)
