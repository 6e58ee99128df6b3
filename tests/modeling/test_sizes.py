"""No image size is special: nothing of the forward pass, nor of a program exported from it, is bound to one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from san_hf.modeling.clip_recognition_san import max_pool
from san_hf.modeling.positions_san import PositionResizer, resize_positions
from tests.tiny import relative_difference


# (batch, height, width): the side adapter's grid and CLIP's that position embeddings are laid out for (64 x 64), sides
# that no grid divides, more and fewer images.
SIZES = [(1, 64, 64), (3, 40, 120), (2, 65, 47), (4, 128, 100), (1, 200, 72)]


class VisionOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model.encode_images(pixel_values)
        return outputs.masks_queries_logits, outputs.mask_embeds, outputs.attention_bias


@torch.no_grad()
def test_exported_program_runs_at_other_sizes_and_batches(model):
    """A size or a batch that the trace bakes in; an operator that exporters can't take for sizes they don't know."""
    model = VisionOnly(model)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 56, 88),), dynamic_shapes=(sizes,))
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("adaptive_max_pool" in name or "fill_diagonal" in name for name in operators)
    exported = program.module()
    for batch, height, width in SIZES:
        pixel_values = torch.randn(batch, 3, height, width)
        for got, expected in zip(exported(pixel_values), model(pixel_values)):
            assert relative_difference(got, expected) <= 1e-5, (batch, height, width)


@pytest.mark.parametrize("size", [(40, 54), (7, 11), (3, 5), (1, 2)])
@pytest.mark.parametrize("grid", [(20, 27), (32, 43), (3, 5), (1, 1), (1, 2)])
def test_exported_max_pooling_is_the_stock_one(size, grid, monkeypatch):
    """A window that begins or ends a row too early or too late."""
    maps = torch.randn(2, 3, *size)
    expected = F.adaptive_max_pool2d(maps, grid)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(max_pool(maps, grid), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_of_their_own_size_are_unchanged_to_the_bit(dtype):
    positions = torch.randn(1, 64, 24).to(dtype)
    assert torch.equal(resize_positions(positions, (8, 8)), positions)
    assert resize_positions(positions, (5, 11)).shape == (1, 55, 24)


@pytest.fixture
def counted(monkeypatch):
    """The grids that positions were resized for."""
    grids = []

    def resize(positions, grid):
        grids.append(grid)
        return resize_positions(positions, grid)

    monkeypatch.setattr("san_hf.modeling.positions_san.resize_positions", resize)
    return grids


def test_positions_of_a_repeated_size_are_kept(counted):
    """Resizing for each image, or keeping every size that ever was."""
    resize, positions = PositionResizer(), torch.nn.Parameter(torch.randn(1, 64, 24))
    with torch.inference_mode():
        first = resize(positions, (5, 11))
        assert torch.equal(first, resize_positions(positions, (5, 11)))
        assert resize(positions, (5, 11)) is first and resize(positions, (7, 7)).shape == (1, 49, 24)
    with torch.no_grad():
        assert resize(positions, (5, 11)) is first and counted == [(5, 11), (7, 7)]
        for width in range(2, 6):
            resize(positions, (2, width))
        assert resize(positions, (5, 11)) is not first
    first.requires_grad_()  # what inference made can be used where gradients are computed


@pytest.mark.parametrize(
    "change",
    [
        lambda positions: positions.data.mul_(2),  # which no version counter sees
        lambda positions: torch.optim.SGD([positions], lr=1.0).step(),
        lambda positions: positions.data.__setitem__((0, 63, 23), 9.0),
        lambda positions: setattr(positions, "data", positions.data.bfloat16()),
        lambda positions: setattr(positions, "data", torch.randn(1, 16, 24)),
    ],
    ids=["data", "step", "one", "dtype", "grid"],
)
def test_changed_positions_are_resized_anew(change):
    """Embeddings of before a training step, of another adapter or of another dtype."""
    resize, positions = PositionResizer(), torch.nn.Parameter(torch.randn(1, 64, 24))
    positions.grad = torch.ones_like(positions)
    with torch.no_grad():
        resize(positions, (5, 11))
    change(positions)
    with torch.no_grad():
        got, expected = resize(positions, (5, 11)), resize_positions(positions, (5, 11))
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_positions_that_learn_are_not_kept(counted):
    resize, positions = PositionResizer(), torch.nn.Parameter(torch.randn(1, 64, 24))
    with torch.no_grad():
        resize(positions, (5, 11))
    resize(positions, (5, 11)).sum().backward()
    assert positions.grad is not None and len(counted) == 2


@torch.no_grad()
def test_kept_positions_do_not_travel(model, pixel_values):
    """Checkpoints, copies or pickles that grow with use."""
    model.encode_images(pixel_values)
    names = set(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model.side_adapter.resize is not model.model.side_adapter.resize
        assert set(other.state_dict()) == names
        assert torch.equal(other.encode_images(pixel_values).mask_embeds, model.encode_images(pixel_values).mask_embeds)
