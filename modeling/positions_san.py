"""Position embeddings of a square grid, resized for the grid of an image."""

import math

import torch
import torch.nn.functional as F


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
