"""The training page's two scripts, as a reader runs them, on photographs of the reader's own."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from san_hf import from_pretrained
from san_hf.modeling.base_clip_san import clip_name
from tests.forks import Run
from tests.pages import blocks, run_in_a_fork
from tests.training.test_trainer import equal_points
from tests.training.training_runs import CLASSES, write_images


PAGE = Path(__file__).parents[2] / "san_hf" / "training" / "README.md"
TRAINER, ACCELERATE = (code for mark, language, code in blocks(PAGE) if mark == "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_images(folder / "my_photos", "train", 6)
    write_images(folder / "my_photos", "validation", 3)
    return folder


def check_trained(model) -> None:
    """The classes are the data's, the side adapter has learned something, and CLIP nothing."""
    start = from_pretrained("picture-book")[0].state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start.get(name, tensor))}
    assert {name for name in changed if name.startswith("model.side_adapter.")} and "no_object_embed" in changed
    assert not {name for name in changed if clip_name(name) is not None}
    assert list(model.config.id2label.values()) == CLASSES


def test_with_trainer(folder):
    """Catches a script that no longer runs, trains CLIP, or ends with a folder that nobody can load or push."""
    run_in_a_fork(TRAINER, folder)
    check_trained(from_pretrained(folder / "with-trainer")[0])
    card = ModelCard.load(folder / "with-trainer" / "README.md")
    assert "for 10 of 10 steps" in card.text and "| my_photos validation | 3 |" in card.text


def test_with_accelerate(folder):
    """Catches a loop that no longer runs, trains CLIP, or saves something else than what it trained."""
    run_in_a_fork(ACCELERATE, folder)
    check_trained(from_pretrained(folder / "my-san")[0])


def run_loop(folder: Path, batch_size: int) -> None:
    os.chdir(folder)
    torch.rand = equal_points
    exec(ACCELERATE.replace("steps, batch_size = 10, 2", f"steps, batch_size = 3, {batch_size}"), {})


@pytest.mark.slow
def test_accelerate_with_two_processes(folder):
    """Catches processes that train on the same images, or a loss that each divides by its own masks."""
    weights = []
    for processes in (1, 2):
        shutil.rmtree(folder / "my-san", ignore_errors=True)
        assert Run(run_loop, folder, 4 // processes, processes=processes).outcomes() == [None] * processes
        weights.append(from_pretrained(folder / "my-san")[0].state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
