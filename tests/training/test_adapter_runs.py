"""Runs that write what they train, without the CLIP under it."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel

from san_hf import SANForSemanticSegmentation
from san_hf.modeling.base_clip_san import clip_name
from san_hf.training.config import ConfigError
from san_hf.training.loop import train
from tests.forks import Run
from tests.tiny import tiny_config, tiny_tokenizer
from tests.training.training_runs import configure, read_log, write_root


SHORT = ("training.steps=4", "training.batch_size=2", "checkpoints.every=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_root(tmp_path_factory.mktemp("adapter-runs"), training=5, validation=2)
    torch.manual_seed(0)
    CLIPModel(tiny_config().clip_config).save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    # A SAN on that CLIP that doesn't know it, as a converted release doesn't.
    model = SANForSemanticSegmentation.from_pretrained(folder / "model")
    clip = CLIPModel.from_pretrained(folder / "clip").state_dict()
    inner = ("vision_model.", "visual_projection.")
    model.load_state_dict({f"model.{k}" if k.startswith(inner) else k: v for k, v in clip.items()}, strict=False)
    model.save_pretrained(folder / "model")
    return folder


def run(root, output, *overrides, resume=False, processes=1):
    config = configure(root, output, *SHORT, *overrides)
    outcomes = Run(train, config, resume, processes=processes).outcomes()
    assert all(outcome == output / "final" for outcome in outcomes), outcomes
    return output


@pytest.fixture(scope="module")
def whole(root):
    return run(root, root / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_adapters_is_the_same_run(root, whole, tmp_path, processes):
    """CLIP in a checkpoint after all; a resumed run whose CLIP was filled at random; another training."""
    only = ("checkpoints.adapter_only=true", f"model.base={root / 'clip'}")
    output = run(root, tmp_path / "run", *only, processes=processes)
    for folder in ("final", "best"):
        assert (output / folder / "side_adapter.safetensors").is_file()
        assert not (output / folder / "model.safetensors").exists()
    expected = SANForSemanticSegmentation.from_pretrained(whole / "final").state_dict()
    got = SANForSemanticSegmentation.from_pretrained(output / "final").state_dict()
    assert got.keys() == expected.keys()
    if processes == 1:
        assert read_log(output) == read_log(whole)
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), name
    checkpoint = output / "checkpoints" / "step-00000002" / "model.safetensors"
    with safe_open(checkpoint, "pt") as file:
        names = {name.removeprefix("module.") for name in file.keys()}
    assert names == set(load_file(output / "final" / "side_adapter.safetensors"))
    assert not any(map(clip_name, names))

    resumed = shutil.copytree(output, tmp_path / "resumed")
    for path in ("final", "best", "checkpoints/step-00000004"):
        shutil.rmtree(resumed / path)
    run(root, resumed, *only, resume=True, processes=processes)
    assert read_log(resumed) == read_log(output)
    for name, tensor in SANForSemanticSegmentation.from_pretrained(resumed / "final").state_dict().items():
        assert torch.equal(tensor, got[name]), name


def test_refused_before_the_first_step(root, tmp_path):
    """A run whose end can't be written, found at its end."""
    for overrides, message in (
        ((), r"checkpoints\.adapter_only: .*model\.base=openai/clip"),
        ((f"model.base={tmp_path / 'none'}",), r"none.*\(model\.base\)"),
        (("model.freeze_clip=false",), r"checkpoints\.adapter_only.*freeze_clip"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(configure(root, tmp_path / "run", *SHORT, "checkpoints.adapter_only=true", *overrides))
        assert not (tmp_path / "run").exists()


def test_an_adapter_to_start_from(root, whole, tmp_path):
    """An adapter's folder that `model.checkpoint` can't take, or whose base has to be said again."""
    model = SANForSemanticSegmentation.from_pretrained(whole / "final")
    model.save_pretrained(tmp_path / "start", adapter_only=True, base_model=str(root / "clip"))
    config = ("checkpoints.adapter_only=true", f"model.checkpoint={tmp_path / 'start'}")
    output = run(root, tmp_path / "run", *config)
    again = run(root, tmp_path / "whole", f"model.checkpoint={whole / 'final'}")
    assert read_log(output) == read_log(again)
