"""Position embeddings of a square grid, resized for the grid of an image."""

import math

import torch
import torch.nn.functional as F


KEPT_GRIDS = 4


def resize_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Bicubic resizing of position embeddings.

    A grid of the same size is no special case: bicubic resizing to the same size is exact to the bit, and a test of the
    size would bake it into exported programs.

    Args:
        positions: (1, side * side, C), row by row.
        grid: (height, width).

    Returns:
        (1, height * width, C).
    """
    side = math.isqrt(positions.shape[1])
    square = positions.transpose(1, 2).unflatten(2, (side, side))  # (1, C, side, side)
    return F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class PositionResizer:
    """
    [`resize_positions`], which keeps what it made for the latest `KEPT_GRIDS` sizes, on a CPU and without gradients.

    What is kept counts only while the embeddings are equal to those that it was made of. Comparing them takes a tenth
    of the time of resizing, and no version number tells of every change to a parameter. On other devices it would make
    the program wait, and resizing is quick there.
    """

    def __init__(self):
        self._kept: tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor]] | None = None

    def __reduce__(self):
        return type(self), ()  # neither copies nor pickles of a model have to carry what is kept

    def __call__(self, positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See [`resize_positions`]. The result may be kept: it isn't to be changed in place."""
        if not self._may_keep(positions):
            return resize_positions(positions, grid)
        made_of, resized = self._kept or (positions[:0], {})
        if made_of.dtype != positions.dtype or not torch.equal(made_of, positions):
            made_of, resized = positions.detach().clone(), {}
        if grid not in resized:
            with torch.inference_mode(False), torch.no_grad():  # tensors that any later call can use
                latest = list(resized.items())[-(KEPT_GRIDS - 1) :]
                resized = {**dict(latest), grid: resize_positions(made_of, grid)}
            self._kept = made_of, resized  # replaced, never changed: other threads may be reading
        return resized[grid]

    @staticmethod
    def _may_keep(positions: torch.Tensor) -> bool:
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_traced or type(positions) not in (torch.Tensor, torch.nn.Parameter) or positions.device.type != "cpu":
            return False
        learns = torch.is_grad_enabled() and positions.requires_grad
        return not learns and not torch.is_autocast_enabled("cpu")  # which decides about the result's dtype
