"""Side adapters on the command line: made of a checkpoint, used by the other commands, listed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from typer.testing import CliRunner

from san_hf import SANForSemanticSegmentation, SANProcessor
from san_hf.cli import app
from san_hf.conversion import clip_tokenizer, export_checkpoint
from san_hf.hub import save_pretrained
from san_hf.modeling import SANImageProcessor
from tests.tiny import segmenting_model, tiny_config, tiny_tokenizer


INNER = ("vision_model.", "visual_projection.")


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def clip_of(model) -> CLIPModel:
    """The CLIP under a SAN, with other position embeddings: a model's own are trained."""
    clip = CLIPModel(model.config.clip_config)
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    clip.load_state_dict({name: state[name] for name in clip.state_dict() if name in state}, strict=False)
    torch.nn.init.zeros_(clip.vision_model.embeddings.position_embedding.weight)
    return clip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model that finds more than one class, in two folders: whole, and without its CLIP."""
    root = tmp_path_factory.mktemp("adapter")
    model = segmenting_model()
    clip_of(model).save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "clip")
    processor = SANProcessor(SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}), tiny_tokenizer())
    save_pretrained(model, processor, root / "whole")
    model.set_base_model(str(root / "clip"))
    facts = {"title": "Tiny", "results": [{"dataset": "CamVid val", "mIoU": 41.5}]}
    save_pretrained(model, processor, root / "below" / "adapter", adapter_only=True, facts=facts)
    return root


def test_segment_takes_an_adapter(adapter, photo, tmp_path):
    """A command that loads models in a way of its own, which doesn't know adapters."""
    photo.save(tmp_path / "photo.png")
    maps = []
    for name in ("whole", "below/adapter"):
        output = tmp_path / name.replace("/", "-")
        arguments = (
            "--model",
            adapter / name,
            "--classes",
            "cat, grass, sky",
            "--output",
            output,
            "--templates",
            "imagenet",
        )
        result = invoke("segment", tmp_path / "photo.png", "--format", "png-labels", *arguments)
        assert result.exit_code == 0, result.output
        maps.append(np.asarray(Image.open(next(output.glob("*.png")))))
    assert len(np.unique(maps[0])) > 1 and np.array_equal(*maps)


def test_an_adapter_of_a_checkpoint(tmp_path):
    """A base that isn't compared, or options that don't reach the conversion."""
    config = tiny_config()
    text = config.clip_text_config
    text.vocab_size, text.bos_token_id, text.eos_token_id, text.pad_token_id = 49408, 49406, 49407, 49407
    torch.manual_seed(0)
    model = SANForSemanticSegmentation(config).eval()
    export_checkpoint(model, tmp_path / "san.pth")
    config.save_pretrained(tmp_path / "config")
    clip = clip_of(model)
    clip.save_pretrained(tmp_path / "clip")
    clip_tokenizer(77).save_pretrained(tmp_path / "clip")
    common = ("convert", tmp_path / "san.pth", tmp_path / "adapter", "--config", tmp_path / "config", "--adapter-only")

    result = invoke(*common)
    assert result.exit_code == 2 and "go together" in result.output and result.output.count("\n") == 1
    with torch.no_grad():
        clip.text_projection.weight[0, 0] += 0.5
    clip.save_pretrained(tmp_path / "other")
    result = invoke(*common, "--base", tmp_path / "other")
    assert result.exit_code == 2 and "1 of " in result.output and "text_projection.weight" in result.output
    assert "at most 0.5" in result.output and not (tmp_path / "adapter").exists()

    result = invoke(*common, "--base", tmp_path / "clip")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len(SANProcessor.from_pretrained(tmp_path / "adapter").tokenizer) == 49408


def test_list(adapter):
    """Adapters below a folder that are missed, whole models taken for adapters, results that were never measured."""
    result = invoke("adapters", adapter, "--format", "json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.output)
    saved = json.loads((adapter / "below" / "adapter" / "config.json").read_text())
    assert found["name"] == str(adapter / "below" / "adapter") and found["base"] == str(adapter / "clip")
    assert found["sha256"] == saved["base_model_sha256"] and len(found["sha256"]) == 64
    assert found["size"] == (adapter / "below" / "adapter" / "side_adapter.safetensors").stat().st_size
    assert found["results"] == ["CamVid val: mIoU 41.5"] and found["classes"] == [] and found["lora"] is False
    printed = invoke("adapters", adapter / "below")
    assert printed.exit_code == 0
    for text in (found["sha256"], "CamVid val: mIoU 41.5", found["base"], "0.1 MB"):
        assert text in printed.output
    result = invoke("adapters", adapter / "whole")
    assert result.exit_code == 2 and "holds no side adapter" in result.output and result.output.count("\n") == 1
