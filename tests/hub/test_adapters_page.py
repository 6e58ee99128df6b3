"""The page about side adapters, typed as it stands: with a small CLIP under the names of OpenAI's."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from typer.testing import CliRunner

from san_hf import SANForSemanticSegmentation, from_pretrained
from san_hf.cli import app
from san_hf.conversion import RELEASES, clip_tokenizer, export_checkpoint
from san_hf.modeling.adapter_folder_san import lora_layers
from tests.hub.conftest import ALIAS
from tests.pages import blocks
from tests.training.training_runs import CLASSES, write_images


PAGE = Path(__file__).parents[2] / "san_hf" / "hub" / "ADAPTERS.md"
# A training of the page's recipe would take hours here.
QUICK = [
    *("training.steps=2", "training.batch_size=2", "augmentation.crop_size=64", "model.image_size=64"),
    *("data.workers=0", "evaluation.pictures=0"),
]


@pytest.fixture
def place(hub, small_config, tmp_path, monkeypatch):
    """A reader's folder, and CLIPs on the Hub: one is that of the reader's checkpoint, the other isn't."""
    monkeypatch.chdir(tmp_path)
    clips = {}
    for name in ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"):
        clips[name] = CLIPModel(small_config.clip_config)
        clips[name].save_pretrained(tmp_path / "clip")
        clip_tokenizer().save_pretrained(tmp_path / "clip")
        hub.commit(name, {file.name: file.read_bytes() for file in (tmp_path / "clip").iterdir()})
    model = SANForSemanticSegmentation(small_config)
    clip, own = clips["openai/clip-vit-base-patch16"].state_dict(), model.state_dict()
    trained = "vision_model.embeddings.position_embedding.weight"
    with torch.no_grad():
        for name in clip.keys() - {trained}:
            own.get(name, own.get(f"model.{name}")).copy_(clip[name])
    patches = (small_config.clip_vision_config.hidden_size, 3, *[small_config.clip_vision_config.patch_size] * 2)
    monkeypatch.setitem(RELEASES, ALIAS, dataclasses.replace(RELEASES[ALIAS], patch_embedding=patches))
    export_checkpoint(model, tmp_path / "san_vit_b_16.pth")
    write_images(tmp_path / "my_photos", "train", 4)
    write_images(tmp_path / "my_photos", "validation", 2)
    Image.open(tmp_path / "my_photos" / "train" / "images" / "000.png").save(tmp_path / "photo.jpg")
    return tmp_path


def test_the_page_runs(hub, place):
    """Catches commands and code on the page that don't work, or that do something else than it says."""
    for mark, language, code in blocks(PAGE):
        if mark == "refused":
            with pytest.raises(ValueError, match=r"isn't the CLIP .* SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
                exec(code, {})
        elif language == "python":
            assert mark == "hub"
            exec(code, variables := {})
        else:
            assert (mark, language) == ("hub", "bash")
            for line in code.splitlines():
                words = shlex.split(line)
                assert words.pop(0) == "san-hf"
                words += QUICK if words[0] == "train" else []
                result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
                assert result.exit_code == 0, f"{line}\n{result.output}"

    for folder in ("streets", "coco-stuff", "runs/streets/best", "runs/streets/final", "streets-lora"):
        assert not (place / folder / "model.safetensors").exists()
        config = json.loads((place / folder / "config.json").read_text())
        assert config["base_model_name_or_path"] == "openai/clip-vit-base-patch16"
        assert config["base_model_revision"] == hub.sha("openai/clip-vit-base-patch16")
    listed = CliRunner().invoke(app, ["adapters", "runs/"]).output
    assert "runs/streets/best" in listed and f"3: {', '.join(CLASSES)}" in listed
    assert "side_adapter.safetensors" in hub.repositories["you/streets"][-1]
    assert list(from_pretrained("you/streets")[0].config.id2label.values()) == CLASSES
    several = variables["several"]
    assert several.active_side_adapter == "lora" and lora_layers(several)
    assert all("vision_model" in name for name, _ in several.named_modules() if name.endswith(".lora_A"))
