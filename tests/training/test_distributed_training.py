"""Several processes: their gradients are those of one process with all of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from san_hf.modeling import SANForSemanticSegmentation
from tests.tiny import randomized, relative_difference, tiny_config
from tests.training.training_runs import Run


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


def gradients(shares: list[list[int]], labelled: list[bool]) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the trainable parameters, where process r has the images shares[r]."""
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
    own = {name: value[shares[rank]] for name, value in batch.items()}
    loss = wrapped(**own, class_embeds=class_embeds).loss
    loss.backward()
    found = {name: value.grad.numpy() for name, value in model.named_parameters() if value.requires_grad}
    return {"loss": loss.detach().numpy(), **found}


@pytest.mark.parametrize(
    ("shares", "labelled"),
    [
        ([[0, 1], [2, 3]], [True] * 4),
        # Uneven, as the last batch of a pass may be.
        ([[0, 1], [2]], [True] * 3),
        # A process whose images show nothing, and none of them showing anything.
        ([[0, 1], [2]], [True, True, False]),
        ([[0], [1]], [False, False]),
    ],
)
def test_two_processes_equal_one(shares, labelled):
    """
    Catches losses that each process normalises by its own masks and weights, as the library's criterion does the
    class loss, and a number of masks divided by the number of processes twice; and a parameter without gradient where
    a batch has no masks, which would stop DistributedDataParallel.
    """
    (expected,) = Run(gradients, [sum(shares, [])], labelled).outcomes()
    outcomes = Run(gradients, shares, labelled, processes=2).outcomes()
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
    mean = sum(found["loss"] for found in outcomes) / 2
    assert mean == pytest.approx(expected["loss"], rel=1e-6)
