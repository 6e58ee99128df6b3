"""Large images in overlapping windows, whose scores are blended, so that no seam shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from san_hf.modeling.label_maps_san import MaskPrediction


class Side(NamedTuple):
    """One window along one side of an image: its pixels, and its share of each of them, (length,) float32."""

    place: slice
    shares: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """
    Windows over an image, along each side as many as are needed, evenly spaced.

    Args:
        size: of a window's side, in pixels; where the image's is shorter, it is the image's.
        overlap: pixels that neighbours share at least.

    Raises:
        ValueError: no such windows.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Got windows of {self.size} pixels, expected at least 1.")
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(
                f"Got an overlap of {self.overlap} pixels for windows of {self.size}, expected 0 to {self.size // 2}."
            )

    def along(self, length: int) -> list[Side]:
        """
        The windows along a side of `length` pixels. A window's share rises over the pixels that it has in common with
        the one before, and falls again; those of all windows add up to 1 at each pixel.
        """
        size = min(self.size, length)
        gaps = -(-(length - size) // (self.size - self.overlap))  # one less than there are windows
        starts = [round(number * (length - size) / gaps) for number in range(gaps + 1)] if gaps else [0]
        shares = torch.zeros(len(starts), length)
        for number, start in enumerate(starts):
            window = shares[number, start : start + size].fill_(1)
            if number and (common := starts[number - 1] + size - start) > 0:
                window[:common] *= _ramp(common)
            if number < gaps and (common := start + size - starts[number + 1]) > 0:
                window[size - common :] *= _ramp(common).flip(0)
        shares /= shares.sum(0)
        places = [slice(start, start + size) for start in starts]
        return [Side(place, own[place]) for place, own in zip(places, shares)]


def windows_of(tile: int | None, overlap: int | None) -> Windows | None:
    """
    Windows by their side and overlap, an eighth of it by default; `None` without a side.

    Raises:
        ValueError: no such windows, or an overlap of none.
    """
    if tile is None:
        if overlap is not None:
            raise ValueError(f"Got overlap={overlap} without tile, the windows' size.")
        return None
    return Windows(tile, tile // 8 if overlap is None else overlap)


class Cell(NamedTuple):
    """
    Pixels along one side that the same windows cover.

    Attributes:
        place: of the image.
        windows: the covering windows' numbers.
    """

    place: slice
    windows: list[int]


def cells_of(sides: list[Side], longest: int | None = None) -> Iterator[Cell]:
    """A side's pixels by the windows that cover them, in order, `longest` of them at once."""
    edges = sorted({edge for side in sides for edge in (side.place.start, side.place.stop)})
    for start, stop in zip(edges, edges[1:]):
        covering = [
            number for number, side in enumerate(sides) if side.place.start <= start and stop <= side.place.stop
        ]
        for first in range(start, stop, longest or stop - start):
            yield Cell(slice(first, min(first + (longest or stop), stop)), covering)


def blend_part(
    prediction: MaskPrediction, row: Side, row_cell: Cell, column: Side, column_cell: Cell
) -> MaskPrediction:
    """A window's prediction for the pixels of a cell, with its share of them where other windows have one, too."""
    rows, columns = (
        slice(cell.place.start - side.place.start, cell.place.stop - side.place.start)
        for side, cell in ((row, row_cell), (column, column_cell))
    )
    alone = len(row_cell.windows) == len(column_cell.windows) == 1
    device = prediction.mask_logits.device
    shares = None if alone else (row.shares[rows].to(device), column.shares[columns].to(device))
    return prediction.part(rows, columns, shares)


def _ramp(length: int) -> torch.Tensor:
    """(length,) from almost 0 to almost 1."""
    return (torch.arange(length) + 0.5) / length
