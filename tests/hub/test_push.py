"""A model of one's own on the Hub: everything in one repository, in one commit or not at all, and back from there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from transformers import CLIPModel
from typer.testing import CliRunner

from san_hf.cli import app
from san_hf.hub import PushError, from_pretrained, push_folder, push_to_hub, save_pretrained
from san_hf.hub.adapters import list_side_adapters
from san_hf.loading import ModelError
from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from tests.tiny import tiny_config, tiny_tokenizer


FACTS = {
    "title": "SAN for gardens",
    "base_model": "someone/clip",
    "license": "cc-by-4.0",
    "training": "An afternoon.",
    "results": [
        {
            "dataset": "Gardens",
            "dataset_id": "me/gardens",
            "config": "small",
            "images": 20,
            "mIoU": 12.3,
            "mIoU (paper)": 9.5,
        }
    ],
    "results_note": "Measured on 20 gardens, in percent.",
}
PAGE = Path(__file__).parents[2] / "san_hf" / "hub" / "README.md"
TOKEN = "hf_thisisverysecret"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SANForSemanticSegmentation(tiny_config()).eval()


@pytest.fixture(scope="module")
def processor():
    size = {"shortest_edge": 64, "longest_edge": 256}
    return SANProcessor(image_processor=SANImageProcessor(size=size), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP in a folder of this machine."""
    folder = tmp_path_factory.mktemp("base") / "clip"
    torch.manual_seed(0)
    CLIPModel(tiny_config().clip_config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def garden(model, processor, tmp_path):
    """A model's folder, with a card of results."""
    folder = tmp_path / "private place" / "gardens"
    folder.parent.mkdir()
    save_pretrained(model, processor, folder, facts=FACTS)
    return folder


@pytest.fixture
def adapter(clip, processor, tmp_path):
    """A side adapter's folder on a CLIP in a folder, and the whole model beside it."""
    fields = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64}
    names = ("fusion_layers", "recognition_layer", "deep_supervision_layers", "mask_embed_dim", "decoder_hidden_size")
    config = tiny_config().to_dict()
    model = SANForSemanticSegmentation.from_clip(
        str(clip), **{name: config[name] for name in (*fields, *names, "num_queries", "image_size", "patch_size")}
    )
    folder = tmp_path / "adapter"
    save_pretrained(model, processor, folder, facts=FACTS | {"base_model": None}, adapter_only=True)
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The client waits longer and longer before it tries again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def last(hub, repository: str) -> dict[str, bytes]:
    return hub.repositories[repository][-1]


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def assert_nothing_of_this_machine(files: dict[str, bytes], *places) -> None:
    for name, content in files.items():
        for place in (*places, TOKEN):
            assert str(place).encode() not in content, name


@pytest.mark.parametrize("way", ["function", "method", "folder", "command"])
def test_every_way_uploads_the_same(hub, garden, tmp_path, way, monkeypatch):
    """Catches a way to the Hub that leaves out processor, code, card or results, or that names this machine."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (garden / "optimizer.pt").write_bytes(b"1")
    (garden / "training_args.bin").write_bytes(str(tmp_path).encode())
    if way == "folder":
        commit = push_folder(garden, "someone/gardens", private=True, token=TOKEN)
        assert hub.sha("someone/gardens") in commit.commit_url and hub.private["someone/gardens"]
    elif way == "command":
        result = CliRunner().invoke(app, ["push", str(garden), "gardens", "--private"])
        assert result.exit_code == 0 and hub.sha("someone/gardens") in result.output, result.output
    else:
        model, processor = from_pretrained(garden)
        if way == "method":
            model.push_to_hub("gardens", token=TOKEN)
        else:
            push_to_hub(model, processor, "someone/gardens", token=TOKEN)
    files = last(hub, "someone/gardens")
    assert len(hub.repositories["someone/gardens"]) == 2  # made, and one commit
    expected = {path.relative_to(garden).as_posix() for path in garden.rglob("*") if path.is_file()}
    assert set(files) == expected - {"optimizer.pt", "training_args.bin"}
    assert {"config.json", "model.safetensors", "modeling_san.py", "tokenizer.json"} <= set(files)
    for name in files:
        if name not in ("README.md", "config.json", "tokenizer_config.json"):
            assert files[name] == (garden / name).read_bytes(), name
    assert json.loads(files["config.json"]) == json.loads((garden / "config.json").read_bytes())
    own = (garden / "README.md").read_text(encoding="utf-8")
    assert files["README.md"].decode() == own.replace('"gardens"', '"someone/gardens"')
    assert card_of(files).data.eval_results[0].metric_value == 12.3 and "| Gardens | 20 | 12.3 | 9.5 |" in own
    assert_nothing_of_this_machine(files, tmp_path)


def test_loads_again(hub, model, processor):
    """Catches weights that come back changed."""
    push_to_hub(model, processor, "someone/gardens", facts=FACTS, token=TOKEN, commit_message="Garden")
    back, processor_back = from_pretrained("someone/gardens")
    inputs = processor_back(images=Image.new("RGB", (70, 50), "green"), text=["cat", "grass"], return_tensors="pt")
    expected = processor(images=Image.new("RGB", (70, 50), "green"), text=["cat", "grass"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(back(**inputs).class_queries_logits, model(**expected).class_queries_logits)


def test_result_files(hub, garden):
    """Catches results that the Hub can't read, or two definitions of mIoU that it takes for one."""
    push_folder(garden, "someone/gardens")
    files = last(hub, "someone/gardens")
    (plain,) = yaml.safe_load(files[".eval_results/gardens.yaml"])
    (paper,) = yaml.safe_load(files[".eval_results/gardens_paper.yaml"])
    assert plain == {"dataset": {"id": "me/gardens", "task_id": "small"}, "value": 12.3}
    assert paper["value"] == 9.5 and paper["notes"].startswith("mIoU (paper): ")


def test_a_branch(hub, garden):
    """Catches a push to a branch that lands on main, and an example that loads another branch's model."""
    push_folder(garden, "someone/gardens", revision="dev")
    assert last(hub, "someone/gardens") == {}
    text = hub.branches["someone/gardens", "dev"][-1]["README.md"].decode()
    assert text.count('from_pretrained("someone/gardens", revision="dev"') == 2


# --- the card stays with its weights


def change(model) -> None:
    with torch.no_grad():
        model.no_object_embed.add_(1)


@pytest.mark.parametrize("place", ["elsewhere", "there"])
@pytest.mark.parametrize("adapter_only", [False, True])
def test_card_of_changed_weights(hub, garden, adapter, tmp_path, place, adapter_only):
    """Catches results, licence or picture of other weights that are claimed for these, and results that get lost."""
    source = adapter if adapter_only else garden
    model, processor = from_pretrained(source)
    change(model)
    folder = source if place == "there" else tmp_path / "changed"
    if place == "there":
        model.save_pretrained(folder, adapter_only=adapter_only)  # as Trainer does
    else:
        save_pretrained(model, processor, folder, adapter_only=adapter_only)
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.eval_results is None and card.data.license is None and "model-index" not in text
    assert re.search(r"^## Results of the (model it started from|weights before)$", text, re.M)
    assert "not of the weights here" in text and "| Gardens | 20 | 12.3 | 9.5 |" in text and "An afternoon." in text
    assert not (folder / ".eval_results").exists()
    # Once more: it is said once.
    model.save_pretrained(folder, adapter_only=adapter_only)
    assert (folder / "README.md").read_text(encoding="utf-8").count("not of the weights here") == 1


@pytest.mark.parametrize("what", ["config", "processor", "vocabulary"])
def test_card_of_another_function(garden, tmp_path, what):
    """Catches results that are kept where the same weights compute something else."""
    model, processor = from_pretrained(garden, **({"clip_image_scale": 0.25} if what == "config" else {}))
    if what == "processor":
        processor.image_processor.size = {"shortest_edge": 32, "longest_edge": 64}
    elif what == "vocabulary":
        names = ["cat", "grass"]
        model.set_vocabulary(names, **processor(text=names, return_tensors="pt"))
    save_pretrained(model, processor, tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.eval_results is None and "## Results of the model it started from" in text


def test_card_of_the_same_weights(garden, tmp_path):
    """Catches results that get lost where a model is saved again as it is, in whatever dtype holds its values."""
    (garden / "README.md").write_text(
        (garden / "README.md").read_text(encoding="utf-8") + "\nMy own words. ![](prediction.png)\n", encoding="utf-8"
    )
    Image.new("RGB", (4, 4)).save(garden / "prediction.png")
    model, processor = from_pretrained(garden)
    for again in (model, model.double()):
        save_pretrained(again, processor, tmp_path / "again" / str(again.dtype), model_id="me/again")
        folder = tmp_path / "again" / str(again.dtype)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text == (garden / "README.md").read_text(encoding="utf-8").replace('"gardens"', '"me/again"')
        assert (folder / ".eval_results" / "gardens.yaml").is_file() and (folder / "prediction.png").is_file()
    save_pretrained(model.half(), processor, tmp_path / "half")  # other values
    assert ModelCard.load(tmp_path / "half" / "README.md").data.eval_results is None


@pytest.mark.slow
def test_card_of_a_repository(hub, garden):
    """Catches a base on the Hub that isn't named, and a model that is pushed back and forgets its results."""
    push_folder(garden, "someone/gardens")
    model, _ = from_pretrained("someone/gardens")
    model.push_to_hub("someone/same")
    assert last(hub, "someone/same")["README.md"] == last(hub, "someone/gardens")["README.md"].replace(
        b'"someone/gardens"', b'"someone/same"'
    )
    change(model)
    model.push_to_hub("someone/changed")
    card = card_of(last(hub, "someone/changed"))
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/gardens", "finetune")
    assert card.data.eval_results is None and card.text.lstrip().startswith("# changed")


def test_pushing_over_another_model(hub, garden, adapter, clip):
    """Catches weights, results and pictures of the model before that stay in the repository."""
    (garden / "README.md").write_text(
        (garden / "README.md").read_text(encoding="utf-8") + "![](prediction.png)", encoding="utf-8"
    )
    Image.new("RGB", (4, 4)).save(garden / "prediction.png")
    push_folder(garden, "someone/gardens")
    hub.commit("someone/gardens", {"notes.txt": b"mine", ".eval_results/by-others.yaml": b"[]"})
    push_folder(garden, "someone/gardens", commit_message="The same weights")
    assert ".eval_results/by-others.yaml" in last(hub, "someone/gardens")
    push_clip(hub, clip)
    push_folder(adapter, "someone/gardens", base_model="someone/clip")
    files = last(hub, "someone/gardens")
    assert "side_adapter.safetensors" in files and "notes.txt" in files
    assert not {"model.safetensors", "prediction.png", ".eval_results/by-others.yaml"} & set(files)


# --- side adapters


def push_clip(hub, clip) -> None:
    hub.commit("someone/clip", {path.name: path.read_bytes() for path in clip.iterdir()})


def test_adapter_on_a_folder(hub, adapter, clip, tmp_path):
    """Catches a side adapter on the Hub whose base is a folder of this machine, or another CLIP than it says."""
    with pytest.raises(ValueError, match=r"base_model='owner/name' \(--base"):
        push_folder(adapter, "someone/adapter")
    result = CliRunner().invoke(app, ["push", str(adapter), "someone/adapter"])
    assert result.exit_code == 2 and "--whole" in result.output and "someone/adapter" not in hub.repositories

    torch.manual_seed(1)
    CLIPModel(tiny_config().clip_config).save_pretrained(tmp_path / "other")
    hub.commit("someone/other", {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()})
    with pytest.raises(ValueError, match="SHA-256"):
        push_folder(adapter, "someone/adapter", base_model="someone/other")
    assert "someone/adapter" not in hub.repositories

    push_clip(hub, clip)
    push_folder(adapter, "someone/adapter", base_model="someone/clip")
    files = last(hub, "someone/adapter")
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "someone/clip"
    card = card_of(files)
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/clip", "adapter")
    assert card.data.eval_results[0].metric_value == 12.3 and 'from_pretrained("someone/adapter"' in card.text
    assert "model.safetensors" not in files
    assert_nothing_of_this_machine(files, tmp_path, clip.parent)
    assert torch.equal(
        from_pretrained("someone/adapter")[0].no_object_embed, from_pretrained(adapter)[0].no_object_embed
    )


def test_a_base_that_others_have(hub, adapter, clip):
    """A push that is refused only after the model was written again, with the name of a temporary folder."""
    for base in (str(clip), "./clip"):
        with pytest.raises(ValueError, match=re.escape(f"Got the base {base!r}")):
            push_folder(adapter, "someone/adapter", base_model=base)
    result = CliRunner().invoke(app, ["push", str(adapter), "someone/adapter", "--base", "someone/nothing"])
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "'someone/nothing'" in result.output
    assert "someone/adapter" not in hub.repositories


@pytest.mark.slow
def test_the_other_form(hub, adapter, clip, tmp_path):
    """Catches a whole model whose card says that CLIP isn't there, or names the folder its CLIP was in."""
    push_folder(adapter, "someone/whole", adapter_only=False)
    files = last(hub, "someone/whole")
    assert "model.safetensors" in files and "side_adapter.safetensors" not in files
    text = files["README.md"].decode()
    assert "The whole model, CLIP included" in text and "without the CLIP" not in text and "12.3" in text
    assert_nothing_of_this_machine(files, tmp_path, clip.parent)
    push_clip(hub, clip)
    model, _ = from_pretrained("someone/whole")
    model.push_to_hub("someone/adapter", adapter_only=True, base_model="someone/clip")
    text = last(hub, "someone/adapter")["README.md"].decode()
    assert "without the CLIP under it" in text and "12.3" in text


@pytest.mark.slow
def test_lora_beside_an_adapter(hub, adapter, clip):
    """Catches LoRA weights that are left behind, or whose configuration has the folder they came from."""
    push_clip(hub, clip)
    model, _ = from_pretrained(adapter)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.push_to_hub("someone/lora", adapter_only=True, base_model="someone/clip")
    files = last(hub, "someone/lora")
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= set(files)
    assert_nothing_of_this_machine(files, adapter.parent, clip.parent)
    assert ".eval_results/gardens.yaml" not in files
    back, _ = from_pretrained("someone/lora")
    back.push_to_hub("someone/again", adapter_only=True)
    assert last(hub, "someone/again")["README.md"].count(b"not of the weights here") == 1


# --- what isn't to get out


@pytest.mark.parametrize("what", ["path", "token"])
def test_what_isnt_to_get_out(hub, garden, monkeypatch, what):
    """Catches a path of this machine or an access token in a card that is published."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = f"Images are in {garden.parent}/images" if what == "path" else f"token={TOKEN}"
    (garden / "README.md").write_text(f"# Mine\n\n{text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="README.md, line 3, has") as error:
        push_folder(garden, "someone/gardens")
    assert TOKEN not in str(error.value) and "someone/gardens" not in hub.repositories


def test_own_words_are_kept(hub, garden):
    """Catches a card that was written by hand and is replaced."""
    (garden / "README.md").write_text("# Mine\n\nAll by myself.\n", encoding="utf-8")
    push_folder(garden, "someone/gardens")
    assert last(hub, "someone/gardens")["README.md"] == b"# Mine\n\nAll by myself.\n"


def test_a_picture_is_asked_for(hub, garden, tmp_path):
    """Catches private images on the Hub that nobody chose, and where they were taken."""
    picture = tmp_path / "shown.jpg"
    exif = Image.Exif()
    exif[0x010F] = "camera of someone"
    Image.new("RGB", (8, 6), "green").save(picture, exif=exif)
    (garden / "own.png").write_bytes(b"private")
    push_folder(garden, "someone/gardens")
    assert not any(name.endswith((".png", ".jpg")) for name in last(hub, "someone/gardens"))
    push_folder(garden, "someone/gardens", picture=picture)
    files = last(hub, "someone/gardens")
    assert b"camera" not in files["prediction.png"] and files["prediction.png"].startswith(b"\x89PNG")
    assert files["README.md"].count(b"](prediction.png)") == 1 and not (garden / "prediction.png").exists()


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "processor_config.json", "tokenizer_config.json", "README.md"]
)
def test_incomplete_folders(hub, garden, missing):
    """Catches half a model on the Hub."""
    (garden / missing).unlink()
    with pytest.raises(ValueError, match=f"no complete model folder: it has no .*{missing}"):
        push_folder(garden, "someone/gardens")
    assert "someone/gardens" not in hub.repositories


def test_folders_that_are_none(tmp_path, garden):
    """Catches a stack trace for a mistyped folder, and weights that are none."""
    for folder in (tmp_path / "nowhere", tmp_path):
        result = CliRunner().invoke(app, ["push", str(folder), "me/mine"])
        assert (
            result.exit_code == 2 and "expected a model's folder" in result.output and "Traceback" not in result.output
        )
    (garden / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        push_folder(garden, "me/mine")


@pytest.mark.parametrize("name", ["a/b/c", "me/", "../mine", "me/my san"])
def test_names_that_are_none(hub, garden, name):
    """Catches a repository's name that is refused with a stack trace."""
    result = CliRunner().invoke(app, ["push", str(garden), name])
    assert result.exit_code == 2 and "owner/name" in result.output and "Traceback" not in result.output


def test_the_page_runs(hub, garden, monkeypatch):
    """Catches commands and code on the page about the Hub that don't work."""
    monkeypatch.chdir(garden.parent)
    garden.rename("my-san")
    blocks = re.findall(r"<!-- test: hub -->\n```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "python"]
    for language, code in blocks:
        if language == "python":
            exec(code, {})
        else:
            result = CliRunner().invoke(app, shlex.split(code)[1:])
            assert result.exit_code == 0, result.output
        assert "model.safetensors" in last(hub, "me/my-san") and hub.private["me/my-san"]
        hub.commit("me/my-san", {}, set(last(hub, "me/my-san")))


# --- a Hub that fails


@pytest.mark.parametrize(
    ("request_", "answer", "message"),
    [
        ("POST api/repos/create", 401, "hf auth login"),
        ("POST api/repos/create", 403, "may not write"),
        ("POST api/repos/create", 500, "Run the same again"),
        ("POST api/models/someone/gardens/preupload", 404, "no such owner"),
        ("POST someone/gardens.git/info/lfs", 403, "may not write"),
        ("PUT storage/", 403, "may not write"),
        ("POST api/models/someone/gardens/commit", 500, "Run the same again"),
        ("POST api/models/someone/gardens/commit", 409, "run the same again"),
        ("POST api/models/someone/gardens/commit", "drop", "Either nothing or all of it"),
        ("POST api/repos/create", "drop", "Run the same again"),
    ],
)
def test_a_hub_that_fails(hub, garden, monkeypatch, request_, answer, message):
    """Catches half a push, an error without advice, a token in a message, and a failure that ends as success."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.failures[request_] = [answer] * 20
    result = CliRunner().invoke(app, ["push", str(garden), "someone/gardens"])
    assert result.exit_code == 2 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1 and TOKEN not in result.output
    assert hub.repositories.get("someone/gardens", [{}]) == [{}]
    # The same again is all it takes; what has arrived isn't sent twice.
    hub.failures.clear()
    stored = set(hub.storage)
    hub.requests.clear()
    push_folder(garden, "someone/gardens")
    assert {"config.json", "model.safetensors"} <= set(last(hub, "someone/gardens"))
    assert len([request for request in hub.requests if request.startswith("PUT storage/")]) == 1 - len(stored)


@pytest.mark.parametrize("answer", [500, 503, "drop"])
def test_a_large_file_that_breaks_off(hub, garden, answer):
    """Catches a push that gives up where the storage fails once."""
    hub.failures["PUT storage/"] = [answer]
    push_folder(garden, "someone/gardens")
    assert last(hub, "someone/gardens")["model.safetensors"] == (garden / "model.safetensors").read_bytes()


def test_who_may_write(hub, garden, monkeypatch, caplog):
    """Catches a refusal that looks like success, and a token in logs or errors."""
    hub.writers.add(TOKEN)
    with pytest.raises(PushError, match="401.*hf auth login"):
        push_folder(garden, "someone/gardens", token="hf_ofsomebodyelse")
    caplog.set_level("DEBUG")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_folder(garden, "someone/gardens")
    assert TOKEN not in caplog.text and last(hub, "someone/gardens")


def test_without_a_network(connect, garden):
    """Catches a push without a connection that says nothing of what to do."""
    connect("http://127.0.0.1:9", offline=False)
    with pytest.raises(PushError, match="could not be pushed to http://127.0.0.1:9/someone/gardens"):
        push_folder(garden, "someone/gardens")
    connect("http://user:password@127.0.0.1:9", offline=True)
    with pytest.raises(PushError) as error:
        push_folder(garden, "someone/gardens")
    assert "password" not in str(error.value)


# --- the example


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
    assert card.data.license is None and "Nothing is said here about training data, licence and results" in card.text


def test_where_the_card_says_it_is(model, processor, tmp_path, monkeypatch):
    """Catches a path of this machine in a card, and an example that loads another folder than the card's."""
    monkeypatch.chdir(tmp_path)
    for folder, name in (("runs/mine/best", "runs/mine/best"), (tmp_path / "absolute", "absolute"), ("a/../b", "b")):
        save_pretrained(model, processor, folder)
        text = (tmp_path / folder / "README.md").read_text()
        assert f'from_pretrained("{name}"' in text and str(tmp_path) not in text


def test_adapters_of_a_repository(hub, model, tmp_path):
    """Adapters that are missed, sizes of other files, or weights that are downloaded for a list."""
    config = {"base_model_name_or_path": "someone/clip", "base_model_sha256": "a" * 64, "base_model_revision": "b" * 40}
    named = config | {"vocabulary_size": 2, "id2label": {"0": "road", "1": "car"}, "lora_folder": "lora"}
    card = b"---\nmodel-index:\n- name: x\n  results: []\n---\n"
    files = {
        "config.json": json.dumps(config).encode(),
        "side_adapter.safetensors": b"1" * 70,
        "README.md": card,
        "streets/config.json": json.dumps(named).encode(),
        "streets/side_adapter.safetensors": b"2" * 50,
        "streets/lora/adapter_model.safetensors": b"3" * 8,
        "whole/model.safetensors": b"4" * 9,
    }
    hub.commit("someone/adapters", files)
    first, second = list_side_adapters("someone/adapters")
    assert (first.name, first.size, first.base, first.revision) == ("someone/adapters", 70, "someone/clip", "b" * 40)
    assert (first.classes, first.lora, first.results, first.sha256) == ([], False, [], "a" * 64)
    assert (second.name, second.size, second.classes) == ("someone/adapters:streets", 58, ["road", "car"])
    assert second.lora
    hub.commit("someone/none", {"README.md": b"nothing"})
    with pytest.raises(ModelError, match="'someone/none' holds no side adapter"):
        list_side_adapters("someone/none")
    # One without any among others is no error.
    listed = CliRunner().invoke(app, ["adapters", "someone/none", "someone/adapters"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and listed.stdout.count("SHA-256") == 2


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/nothing", None, "'someone/nothing' is no folder here, and as a repository .* check the name"),
        ("someone/none", "deadbeef", "at revision 'deadbeef' it can't be listed: .* check the name"),
        ("./nowhere", None, "There is no model './nowhere': no folder of that name"),
        ("", None, "There is no model ''"),
        ("weights.safetensors", None, "is a file, expected a folder"),
        ("picture-book", None, "'picture-book' holds no side adapter"),
    ],
)
def test_adapters_that_are_none(hub, tmp_path, monkeypatch, name, revision, message):
    """Seven lines about a repository where a folder's name was mistyped, or a stack trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"1")
    hub.commit("someone/none", {"README.md": b"nothing"})
    options = [] if revision is None else ["--revision", revision]
    result = CliRunner().invoke(app, ["adapters", name, *options], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and re.search(message, result.output) and result.output.count("\n") == 1, result.output
