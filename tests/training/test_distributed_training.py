"""Several processes, and several batches for one step: their gradients are those of one large batch."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from san_hf.modeling import SANForSemanticSegmentation
from san_hf.training import train
from tests.forks import Run
from tests.tiny import randomized, relative_difference, tiny_config
from tests.training.training_runs import configure, read_log, write_images, write_model


IGNORE = 255


def make_batch(images: int, labelled: list[bool]) -> dict[str, torch.Tensor]:
    """Random pixels; label maps of 1 to 3 classes, or without any label."""
    generator = torch.Generator().manual_seed(5)
    pixel_values = torch.randn(images, 3, 64, 64, generator=generator, dtype=torch.float64)
    labels = torch.full((images, 64, 64), IGNORE)
    for index in range(images):
        if labelled[index]:
            for stripe in range(index + 1):
                labels[index, stripe * 16 : stripe * 16 + 12] = (index + stripe) % 4
    return {"pixel_values": pixel_values, "labels": labels}


def equal_points(*size: int, **kwargs) -> torch.Tensor:
    """Instead of torch.rand: the same points for every mask, wherever it stands in a batch."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand_like_original(*size[1:], generator=generator).expand(size).clone()


def gradients(shares: list[list[list[int]]], labelled: list[bool]) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the trainable parameters, where process r accumulates the batches shares[r]."""
    torch.rand_like_original, torch.rand = torch.rand, equal_points
    # Double precision: in single, what cancels in some gradients leaves more than the limit below.
    model = randomized(tiny_config()).double()
    assert isinstance(model, SANForSemanticSegmentation)
    class_embeds = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    batch, rank, wrapped = make_batch(len(labelled), labelled), 0, model
    if len(shares) > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        wrapped = DistributedDataParallel(model)
    parts = [{name: value[part] for name, value in batch.items()} for part in shares[rank]]
    counts = None
    if len(parts) > 1:
        counts = torch.stack([model.count_targets(part["labels"]) for part in parts]).sum(0)
        if len(shares) > 1:
            torch.distributed.all_reduce(counts)
    loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        own = wrapped(**part, class_embeds=class_embeds, target_counts=counts).loss / len(parts)
        own.backward()
        loss += own.detach()
    found = {name: value.grad.numpy() for name, value in model.named_parameters() if value.requires_grad}
    return {"loss": loss.detach().numpy(), **found}


@pytest.mark.parametrize(
    ("shares", "labelled"),
    [
        ([[[0, 1]], [[2, 3]]], [True] * 4),
        # Uneven, as the last batch of a pass may be.
        ([[[0, 1]], [[2]]], [True] * 3),
        # A process whose images show nothing, and none of them showing anything.
        ([[[0, 1]], [[2]]], [True, True, False]),
        ([[[0]], [[1]]], [False, False]),
        # Accumulated: in one process, unevenly and with a batch that shows nothing, and in two.
        ([[[0], [1], [2, 3]]], [True] * 4),
        ([[[0, 1], [2]]], [True, True, False]),
        ([[[0], [1]], [[2], [3]]], [True] * 4),
    ],
)
def test_parts_equal_one_batch(shares, labelled):
    """
    Catches losses that each batch normalises by its own masks and weights, as the library's criterion does the class
    loss over processes and all of them over accumulated batches, and a number of masks divided by the number of
    processes twice; and a parameter without gradient where a batch has no masks, which would stop
    DistributedDataParallel.
    """
    images = [image for parts in shares for part in parts for image in part]
    (expected,) = Run(gradients, [[images]], labelled).outcomes()
    outcomes = Run(gradients, shares, labelled, processes=len(shares)).outcomes()
    assert isinstance(expected, dict), expected
    for rank, found in enumerate(outcomes):
        assert isinstance(found, dict), found
        assert found.keys() == expected.keys()
        largest = max(
            (relative_difference(torch.tensor(found[name]), torch.tensor(expected[name])), name)
            for name in expected
            if name != "loss" and abs(expected[name]).max() > 1e-6
        )
        assert largest[0] < 1e-5, f"process {rank}: {largest}"
    mean = sum(found["loss"] for found in outcomes) / len(outcomes)
    assert mean == pytest.approx(expected["loss"], rel=1e-6)


def first_step(root, output, *options: str) -> dict:
    """The log's first line, of a training whose loss looks at the same points whatever the batches."""
    torch.rand_like_original, torch.rand = torch.rand, equal_points
    train(configure(root, output, "training.steps=1", "data.validation_split=null", *options))
    return read_log(output)[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_own_training_accumulates_one_batch(tmp_path, processes):
    """Another loss or gradient in the log of a run whose batches are split: one image in five has no labels."""
    write_model(tmp_path / "model")
    write_images(tmp_path / "data", "train", 10)
    whole, parts = (
        Run(
            first_step, tmp_path, tmp_path / f"run-{number}", "training.batch_size=8",
            f"training.gradient_accumulation={number}", processes=processes if number > 1 else 1,
        ).outcomes()[0]
        for number in (1, 4)
    )  # fmt: skip
    assert isinstance(whole, dict) and isinstance(parts, dict), (whole, parts)
    names = [name for name in whole if "loss" in name or name == "grad_norm"]
    assert len(names) == 8
    assert {name: parts[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-5)
