"""Class names and their embeddings: order, synonyms, expansion, and the file that keeps them."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from san_hf.data import DataError
from san_hf.data.class_names import is_class_list, read_class_names
from san_hf.inference import Vocabulary, VocabularyError
from san_hf.inference.embeddings_cache import text_tower_digest
from san_hf.inference.vocabulary import split_synonyms
from san_hf.vocabularies import load_vocabulary
from san_hf.vocabularies.files import write_vocabulary
from tests.tiny import relative_difference


NAMES = ["sky", "red boat, striped boat", "grass"]
TEMPLATES = ["a photo of a {}.", "the {}"]


def encode(model, processor, names=NAMES, **options) -> Vocabulary:
    return Vocabulary.encode(model, processor, names, templates=TEMPLATES, **options)


def test_embeddings_are_the_models(model, processor):
    """Catches names in another order, prompts of other templates, and embeddings that aren't the text tower's."""
    vocabulary = encode(model, processor)
    with torch.no_grad():
        expected = model.get_class_embeds(**processor(text=NAMES, prompt_templates=TEMPLATES))
    assert relative_difference(vocabulary.class_embeds, expected) < 1e-6
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
        (["cat"], {"threshold": float("nan")}, "threshold=nan"),
        (["cat"], {"threshold": "0.5"}, "threshold='0.5'"),
        (["cat"], {"average_synonyms": True}, "average_synonyms without synonyms"),
        (["cat"], {"other": "background"}, "without an expansion or a threshold"),
        (["cat"], {"other": "Cat", "threshold": 0.5}, "a class of the name 'Cat'"),
        (["cat"], {"colors": {"cat": "no colour"}}, "as the colour of 'cat'"),
        (["cat"], {"expand": "nowhere.txt"}, "'nowhere.txt' can't be read"),
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
    everything = {"synonyms": True, "expand": ["sea"], "threshold": 0.25, "other": "rest", "colors": {"sky": "skyblue"}}
    for options in ({}, everything, everything | {"average_synonyms": True}):
        vocabulary = encode(model, processor, **options)
        vocabulary.save(tmp_path / "names.safetensors")
        loaded = Vocabulary.load(tmp_path / "names.safetensors", model)
        assert torch.equal(loaded.class_embeds, vocabulary.class_embeds)
        facts = [
            {name: value for name, value in vars(v).items() if name != "class_embeds"} for v in (loaded, vocabulary)
        ]
        assert facts[0] == facts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["names.safetensors"]


def test_what_a_vocabulary_remembers(model, processor):
    """Catches words of another class, templates other than those that were used, and colours that aren't parsed."""
    vocabulary = encode(model, processor, synonyms=True, expand=["sea"], colors={"sky": "#87ceeb"})
    assert vocabulary.words == (("sky",), ("red boat", "striped boat"), ("grass",), ("sea",))
    assert vocabulary.templates == tuple(TEMPLATES)
    assert vocabulary.colors == {"sky": (135, 206, 235)}
    assert encode(model, processor).words == tuple((name,) for name in NAMES)


def test_averaged_synonyms(model, processor):
    """Catches a mean that mixes classes, isn't normalised, or still merges logits."""
    best = encode(model, processor, synonyms=True, expand=["sea"])
    mean = encode(model, processor, synonyms=True, average_synonyms=True, expand=["sea"])
    assert mean.class_of_row is None and mean.words == best.words
    expected = torch.stack([best.class_embeds[rows].mean(0) for rows in ([0], [1, 2], [3], [4])])
    torch.testing.assert_close(mean.class_embeds, torch.nn.functional.normalize(expected, dim=-1))


def test_options_without_the_text_tower(model, processor, passes):
    """Catches a threshold, a name or a colour that is lost, replaces what was there before, or is encoded again."""
    plain = encode(model, processor)
    prompts = passes["prompts"]
    with_threshold = plain.with_options(threshold=0.5, colors={"sky": "red"})
    assert with_threshold.class_names == (*NAMES, "other") and with_threshold.num_labels == 3
    named = with_threshold.with_options(other="background", colors={"grass": "green"})
    assert named.class_names == (*NAMES, "background") and named.threshold == 0.5
    assert named.colors == {"sky": (255, 0, 0), "grass": (0, 128, 0)}
    assert named.with_options(threshold=0.2).class_names == named.class_names
    assert passes["prompts"] == prompts
    with pytest.raises(ValueError, match="without an expansion or a threshold"):
        plain.with_options(other="background")


def test_a_file_is_taken_for_class_names(model, processor, tmp_path):
    """Catches a reader of class names that doesn't know the file, or takes "other" for a class."""
    file = tmp_path / "names.safetensors"
    encode(model, processor, expand=["sea"]).save(file)
    assert is_class_list(str(file)) and read_class_names(file) == NAMES
    assert encode(model, processor, str(file)).class_names == tuple(NAMES)
    assert encode(model, processor, ["cat"], expand=file).words == (("cat",), *((name,) for name in NAMES))
    with pytest.raises(DataError, match="There is no vocabulary"):
        read_class_names(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="ends in .safetensors"):
        encode(model, processor).save(tmp_path / "names.json")


BROKEN = {
    "class_names": [[], "abc", ["cat", "cat", "dog"], [1, 2, 3], ["cat"], None],
    "num_labels": [0, 2, 4, -1, 3.0, True, None],
    "has_other": [True, 0, None],
    "class_of_row": [[0, 1], [0, 0, 1], [1, 2, 3], [0, 2, 3], [2, 1, 0], ["0", "1", "2"], [], 5],
    "threshold": [0.5, 2, "0.5", True],
    "text_digest": ["", "abc", None, 5],
    "words": [[["cat"]], [["cat"], ["dog"], []], [["cat"], ["dog"], "bird"], 5],
    "templates": [["no place"], "vild", [5], 5],
    "colors": [{"sky": "nothing"}, ["sky"], {"sky": [1, 2]}],
    "more": [1],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in BROKEN.items() for value in values])
def test_broken_entries_are_refused(model, processor, tmp_path, entry, value):
    """Catches stack traces, and a file whose entries don't fit one another or its embeddings."""
    vocabulary = encode(model, processor)
    file = tmp_path / "names.safetensors"
    write_vocabulary(file, vocabulary.facts() | {entry: value}, vocabulary.class_embeds)
    with pytest.raises(VocabularyError, match=r"^'.*names.safetensors' can't be read as a vocabulary: .*\.$") as raised:
        Vocabulary.load(file, model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "embeds", [torch.zeros(3), torch.zeros(3, 0), torch.full((3, 4), torch.nan), torch.ones(3, 4, dtype=torch.int64)]
)
def test_broken_embeddings_are_refused(model, processor, tmp_path, embeds):
    """Catches embeddings that make every pixel not a number."""
    file = tmp_path / "names.safetensors"
    write_vocabulary(file, encode(model, processor).facts(), embeds)
    with pytest.raises(VocabularyError, match="its embeddings"):
        Vocabulary.load(file, model)


def test_a_file_of_any_size_is_not_read(model, tmp_path):
    """Catches a checkpoint of many GB that is read before it is refused. The file takes no room on the disk."""
    with open(tmp_path / "names.safetensors", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VocabularyError, match="expected at most"):
        Vocabulary.load(tmp_path / "names.safetensors", model)


def test_files_of_the_first_format(model, processor, tmp_path):
    """Catches a vocabulary that an earlier version wrote, without words, templates and colours, and that is refused."""
    vocabulary = encode(model, processor)
    facts = {name: value for name, value in vocabulary.facts().items() if name not in ("words", "templates", "colors")}
    metadata = {"format": "san_hf.vocabulary.1", "vocabulary": json.dumps(facts)}
    save_file({"class_embeds": vocabulary.class_embeds}, tmp_path / "names.safetensors", metadata)
    assert Vocabulary.load(tmp_path / "names.safetensors", model).class_names == tuple(NAMES)


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
    assert relative_difference(vocabulary.class_embeds, encode(model, processor).class_embeds) < 1e-6
