"""Model folders that lack something or hold something else, and names that stand for no model."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import CLIPModel
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.hub import save_pretrained
from san_hf.hub.load import check_name, load_model
from san_hf.loading import ModelError
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from san_hf.training.config import ConfigError, ModelSection
from san_hf.training.model import build_model, check_start
from tests.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "san"
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    save_pretrained(SANForSemanticSegmentation(tiny_config()), SANProcessor(image_processor, tiny_tokenizer()), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "san")


def change(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
SETTINGS = {
    "padding_side": ("left", "padding_side is 'left'"),
    "truncation_side": ("left", "truncation_side is 'left'"),
    "model_max_length": (200, "model_max_length is 200, expected at most 77"),
    "eos_token": ("!", "ends texts with token"),
    "bos_token": ("!", "begins texts with token"),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_missing_files(folder, name):
    """A tokenizer or processor that Transformers makes up: class names of other tokens, images of another size."""
    (folder / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer|Can't load image processor"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_tokenizer(folder, name):
    """Prompts padded or cut on the left, or read off another token than the one they end with."""
    value, message = SETTINGS[name]
    change(folder / "tokenizer_config.json", lambda content: content.__setitem__(name, value))
    with pytest.raises(ModelError, match=message):
        load_model(folder, torch.float32)


def test_a_tokenizer_without_merges(folder):
    """Names spelt in letters: other tokens, though the vocabulary is whole."""
    change(
        folder / "tokenizer.json",
        lambda content: content["model"]["vocab"].update(sky=999) or content["model"].__setitem__("merges", []),
    )
    with pytest.raises(ModelError, match="its tokenizer has no merges"):
        load_model(folder, torch.float32)


def spell(content, lose):
    """Gives a tokenizer of letters the word sky, made by two merges, and loses a part."""
    vocabulary = content["model"]["vocab"]
    for token in ("sk", "sky</w>"):
        vocabulary[token] = len(vocabulary)
    content["model"]["merges"] = [["s", "k"], ["sk", "y</w>"]]
    lose(content["model"])


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lambda model: model["merges"].pop(), "has no merges for 1 of its tokens .sky</w>"),
        (lambda model: model["merges"].pop(0), "has no merges for 1 of its tokens .sk."),
        (lambda model: model.update(merges=[]), "has no merges;"),
    ],
)
def test_a_tokenizer_without_some_merges(folder, lose, message):
    """Catches names of other tokens where a list of merges was cut short: the words that it lost are spelt."""
    change(folder / "tokenizer.json", lambda content: spell(content, lose))
    with pytest.raises(ModelError, match=message):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("name", ["clip_image_scale", "fusion_layers", "bias_pooling", "clip_config"])
def test_configuration_that_would_be_guessed(folder, name):
    """The paper's value in place of the one that the weights were trained with."""
    change(folder / "config.json", lambda content: content.pop(name))
    with pytest.raises(ModelError, match=f"config.json: it lacks .*{name}"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, "Git LFS pointer"), ("<!DOCTYPE html><html>404</html>", "web page"), ("", "is empty")],
    ids=["pointer", "page", "empty"],
)
def test_something_else_in_place_of_a_file(folder, name, content, message):
    """Messages from the depths of a parser, which name neither the file nor what to do."""
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name} .*{message}") as error:
        load_model(folder, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_cut_short(folder, name):
    """The same of a download or copy that was interrupted."""
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ModelError, match=f"{name} .*cut short"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("part", ["", "clip_config.vision_config", "clip_config.text_config"])
@pytest.mark.parametrize("adapter_only", [False, True], ids=["whole", "adapter"])
def test_a_configuration_of_another_size(folder, tmp_path, part, adapter_only):
    """A model of hundreds of gigabytes that is made before its small weights are looked at."""
    if adapter_only:
        model = SANForSemanticSegmentation.from_pretrained(folder)
        clip = CLIPModel(model.config.clip_config)
        state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
        clip.load_state_dict({name: state[name] for name in clip.state_dict() if name in state}, strict=False)
        clip.save_pretrained(tmp_path / "clip")
        processor = SANProcessor.from_pretrained(folder)
        shutil.rmtree(folder)
        options = {"adapter_only": True, "base_model": str(tmp_path / "clip")}
        model.save_pretrained(folder, processor=processor, **options)

    def enlarge(config):
        for name in filter(None, part.split(".")):
            config = config[name]
        config |= {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 250}

    change(folder / "config.json", enlarge)
    with pytest.raises(ModelError, match="aren't of one model|hidden_size = 8192"):
        load_model(folder, torch.float32)


def test_changed_number_of_queries(folder):
    """Advice to get a folder again that is whole."""
    with pytest.raises(ModelError, match="num_queries can't be changed: .* num_queries=5, got 7"):
        load_model(folder, torch.float32, num_queries=7)


@pytest.mark.parametrize("name", ["picturebook", "Picture-Book", "san-vit-b16", "nobody/picture-book"])
def test_names_of_no_model(monkeypatch, name):
    """Half a minute of attempts to reach the Hub, and no hint at the name that was meant."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://someone:secret@127.0.0.1:9")  # nothing answers there
    meant = "san-vit-b-16" if "vit" in name else "picture-book"
    start = time.process_time()
    with pytest.raises(ModelError, match=f"Did you mean '{meant}'") as error:
        load_model(name, torch.float32)
    assert time.process_time() - start < 2 and "secret" not in str(error.value)


def test_a_name_that_is_spelt_right(monkeypatch):
    """Catches "Did you mean 'san-vit-b-16'?" for just this name, where it is the network that is missing."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be downloaded") as error:
        load_model("san-vit-b-16", torch.float32)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("name", ["NOTHING", "", ".hidden", "a/b/c", "x" * 300, "../no-such-folder", "file.pth"])
def test_names_are_refused_before_anything_is_loaded(monkeypatch, tmp_path, name):
    """Catches a second model, or data, that are loaded before somebody looks whether the first can exist at all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pth").touch()
    with pytest.raises(ModelError, match="There is no model|is a file, expected a folder"):
        check_name(name)
    with pytest.raises(ConfigError, match="model.checkpoint=.* can't be used"):
        check_start(ModelSection(checkpoint=name))


def test_nothing_to_compare_with(monkeypatch, folder):
    """Catches a measured model and opened data before it is said that the other one doesn't exist."""
    monkeypatch.setattr("san_hf.hub.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("san_hf.cli.evaluate.load_data", lambda *_: pytest.fail("data were opened"))
    arguments = ["--dataset", "x", "--model", str(folder), "--compare-with", "NOTHING", "--pictures", "1"]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 2 and "There is no model 'NOTHING'" in result.output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, value, message) for name, (value, message) in SETTINGS.items()),
        ("extra", None, "has 515 tokens, expected 514"),
    ],
)
def test_a_clip_with_another_tokenizer(tmp_path, name, value, message):
    """Catches a training from `model.clip` whose names become other tokens than those of CLIP's text tower."""
    CLIPModel(tiny_config().clip_config).save_pretrained(tmp_path)
    section = ModelSection(clip=str(tmp_path))
    tokenizer = tiny_tokenizer()
    data = SimpleNamespace(class_names=["sky", "grass"], ignore_index=255)
    tokenizer.save_pretrained(tmp_path)
    assert build_model(section, data)[0].config.id2label == {0: "sky", 1: "grass"}
    if name == "extra":
        tokenizer.add_tokens(["zzz"])
        tokenizer.save_pretrained(tmp_path)
    else:
        change(tmp_path / "tokenizer_config.json", lambda content: content.update({name: value}))
    with pytest.raises(ConfigError, match=rf"model\.clip=.* can't be used: .*{message}"):
        build_model(section, data)
