"""The label map of an image from its masks and class probabilities: two ways to the same labels.

On a processor, tile by tile, without what can't win there; on an accelerator, strip by strip, without waiting for it.
Memory does not grow with the number of classes: the scores of all classes and pixels never exist at once, unless they
are asked for.
Shapes: Q queries, C classes, h x w the masks' grid, H x W the label map. Sizes are (height, width), in pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Up to so many classes, computing all of their scores in a tile costs less than finding out which can be left out.
FEW_CLASSES = 24
# (height, width): small enough that few classes can win anywhere in a tile, large enough to keep the processor busy;
# and larger where there are few classes anyway.
TILE, TILE_OF_FEW_CLASSES = (32, 24), (40, 40)
# Of the highest score: more than the rounding error of a sum over queries.
MARGIN = 1e-4
# Masks and scores of a strip, 4 bytes each: 16 MB for a processor's cache; few and large operators for an accelerator.
VALUES_AT_ONCE, VALUES_AT_ONCE_ON_ACCELERATOR = 2**22, 2**29


@dataclass(frozen=True)
class MaskPrediction:
    """
    Prediction of the model for one image, or for one view of it in test-time augmentation.

    Attributes:
        mask_logits: (Q, h, w) float32.
        probabilities: (C, Q) float32, of each class for each query; the no-object class is dropped.
        height_weights: (H, h) float32, what each row of the label map takes from each row of the masks.
        width_weights: (W, w) float32, the same for columns.
        shares: of the view in the sum of all, where it isn't that of each: for rows (H,) and columns (W,), 0..1. At
            each pixel the products of the two add up to 1 over the views.
    """

    mask_logits: torch.Tensor
    probabilities: torch.Tensor
    height_weights: torch.Tensor
    width_weights: torch.Tensor
    shares: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of the label map."""
        return len(self.height_weights), len(self.width_weights)

    @classmethod
    def from_logits(
        cls,
        mask_logits: torch.Tensor,
        class_logits: torch.Tensor,
        patch_size: tuple[int, int],
        image_size: tuple[int, int],
        target_size: tuple[int, int],
        mirrored: bool = False,
    ) -> "MaskPrediction":
        """
        Args:
            mask_logits: (Q, h, w), over the whole padded input.
            class_logits: (Q, C + 1), no-object last.
            patch_size: of the model's input that one pixel of the masks stands for.
            image_size: of the image inside that input, at the top left.
            target_size: of the label map.
            mirrored: whether the input was mirrored left to right; the label map is not.

        Raises:
            ValueError: logits that are not finite, on a CPU. On an accelerator this would wait for them: see `check`.
        """
        mask_logits, class_logits = mask_logits.float(), class_logits.float()
        height_weights, width_weights = (
            interpolation_weights(*sides, device=mask_logits.device)
            for sides in zip(mask_logits.shape[-2:], patch_size, image_size, target_size)
        )
        # What is at the left of a mirrored view belongs to the right.
        width_weights = width_weights.flip(0) if mirrored else width_weights
        prediction = cls(mask_logits, class_logits.softmax(-1)[:, :-1].T, height_weights, width_weights)
        if mask_logits.device.type == "cpu":
            prediction.check()
        return prediction

    def part(
        self, rows: slice, columns: slice, shares: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> "MaskPrediction":
        """The same for a rectangle of the label map, as a share of what several predict for it."""
        return replace(
            self, height_weights=self.height_weights[rows], width_weights=self.width_weights[columns], shares=shares
        )

    def on_cpu(self) -> "MaskPrediction":
        """The same, in memory of the CPU's that is shared with nothing, such as the rest of a batch."""
        names = ("mask_logits", "probabilities", "height_weights", "width_weights")
        return replace(self, **{name: getattr(self, name).to("cpu", copy=True) for name in names})

    def check(self) -> None:
        """
        Raises:
            ValueError: the logits that this was made of are not finite.
        """
        named = {"masks_queries_logits": self.mask_logits, "class_queries_logits": self.probabilities}
        for name, values in named.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"{name} has NaN or infinite values, expected finite ones: check the pixel values, and in half "
                    "precision use bfloat16 rather than float16."
                )


def interpolation_weights(cells: int, patch: int, cropped: int, target: int, device: torch.device) -> torch.Tensor:
    """
    (target, cells) float32: what each target pixel takes from each mask pixel along one axis.

    Bilinear resizing treats the axes apart and is linear on each, as is cropping. The resize to the padded input,
    the crop and the resize to the target are thus one matrix per axis, whose columns are what becomes of a single 1.
    Where the input isn't a whole number of patches, its last pixels are in none, and take what is beside them.
    """
    unit = torch.eye(cells, dtype=torch.float32, device=device)[None]
    unit = F.interpolate(unit, size=cells * patch, mode="linear", align_corners=False)[..., :cropped]
    if unit.shape[-1] < cropped:
        unit = F.pad(unit, (0, cropped - unit.shape[-1]), mode="replicate")
    return F.interpolate(unit, size=target, mode="linear", align_corners=False)[0].T


class LabelledPixels(NamedTuple):
    """
    What an image's pixels are.

    Attributes:
        labels: (H, W), int64 unless another type was asked for. On an accelerator -1 where a score is NaN, as the
            logits weren't finite: see [`MaskPrediction.check`].
        confidence: (H, W) float32, 0..1, of the class with the highest score, if it was asked for: that score, divided
            by the sum of the scores of all classes where this is more than 1. A score itself is a sum over queries and
            has no upper bound. The confidences of a pixel's classes thus add up to 1 where the queries cover it fully,
            and to less where they don't or hold it for no object.
        scores: (C, H, W) float32, at least 0, if they were asked for: (`num_labels` + 1, H, W) where classes are
            summed up as "other", whose score is that of the best of them.
        views: what all of this was computed from, for [`class_scores`].
    """

    labels: torch.Tensor
    confidence: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    views: tuple[MaskPrediction, ...] = ()


class Area(NamedTuple):
    """
    A rectangle of the label map. All scores are sums over views.

    Attributes:
        place: its rows and columns.
        best: (height, width) int64, the class of the highest score; or one class, of all its pixels.
        best_scores: (height, width), that score; or `None`, as `all_scores`.
        all_scores: (height, width), the sum of the scores of all classes.
    """

    place: tuple[slice, slice]
    best: torch.Tensor | int
    best_scores: torch.Tensor | None = None
    all_scores: torch.Tensor | None = None


def label_pixels(
    views: Sequence[MaskPrediction],
    num_labels: int | None = None,
    threshold: float | None = None,
    return_scores: bool = False,
    return_confidence: bool = True,
    dtype: torch.dtype = torch.int64,
    dense: bool | None = None,
) -> LabelledPixels:
    """
    The label map of one image from the predictions of one view of it or more.

    A class's score at a pixel is the sum over queries of the class's probability times the mask's, averaged over the
    views (all alike, or each by its shares): a sum over the queries of all views. The label is the class of the highest
    score, the first of equal ones.

    Args:
        views: of the same image; for the same classes and label map.
        num_labels: later classes are one "other" label with this number.
        threshold: pixels whose confidence is lower get the "other" label, `num_labels` or else C.
        return_scores: whether to return the scores as well.
        return_confidence: whether to return the confidence as well.
        dtype: of the labels, for whoever knows that a smaller one holds them all.
        dense: whether to compute all scores, strip by strip, in operators whose number and shapes depend on the sizes
            alone, so that nothing waits for an accelerator; `None` for an accelerator only. Otherwise tiles are looked
            at one by one, and few scores are computed in each. Scores that are to be returned are all computed.
    """
    height, width = views[0].target_size
    probabilities = _probabilities(views)
    num_classes = len(probabilities)
    other = num_labels if num_labels is not None and num_labels < num_classes else None
    confident = return_confidence or threshold is not None
    labels = torch.empty(height, width, dtype=dtype, device=probabilities.device)
    confidence = probabilities.new_empty(height, width) if return_confidence else None
    scores = None
    if return_scores:
        scores = probabilities.new_empty(num_classes if other is None else other + 1, height, width)

    if dense is None:
        dense = probabilities.device.type != "cpu"
    dense |= return_scores or any(view.shares is not None for view in views)
    total = _total(views)
    for area in _strips(views, probabilities, confident, scores) if dense else _tiles(views, probabilities, confident):
        best = area.best
        if area.best_scores is not None and area.all_scores is not None:
            # Beyond 1 by rounding only.
            area_confidence = (area.best_scores / area.all_scores.clamp_(min=total)).clamp_(max=1)
            if confidence is not None:
                confidence[area.place] = area_confidence
            if threshold is not None:
                best = torch.where(area_confidence < threshold, num_classes, best)
        if num_labels is not None:
            best = best.clamp(max=num_labels) if isinstance(best, torch.Tensor) else min(best, num_labels)
        labels[area.place] = best
    return LabelledPixels(labels, confidence, None if scores is None else scores.div_(total), tuple(views))


def class_scores(views: Sequence[MaskPrediction], labels: Sequence[int], num_labels: int | None = None) -> torch.Tensor:
    """
    The scores of some labels at all pixels, as confidences: a pixel's scores are divided by the sum of those of all
    classes where it is more than 1, so that its highest one is its confidence in [`LabelledPixels`].

    Args:
        views: see [`label_pixels`]. For a rectangle of the label map, [`MaskPrediction.part`] of each.
        labels: of which the scores are wanted: classes, and `num_labels` for "other".
        num_labels: as for [`label_pixels`]. The score of "other" is that of the best of the later classes, and 0
            without any.

    Returns:
        (len(labels), H, W) float32, 0..1.
    """
    probabilities, total = _probabilities(views), _total(views)
    num_labels = len(probabilities) if num_labels is None else num_labels
    groups = [probabilities[label : label + 1 if label < num_labels else None] for label in labels]
    sizes = [*map(len, groups), 1]
    chosen = torch.cat([*groups, probabilities.sum(0, keepdim=True)])
    scores = probabilities.new_zeros(len(labels), *views[0].target_size)
    for rows, masks in _strips_of_masks(views, len(chosen)):
        *parts, all_scores = torch.bmm(chosen.expand(len(masks), -1, -1), masks).split(sizes, dim=1)
        for label_scores, part in zip(scores, parts):
            if part.shape[1]:
                label_scores[rows] = part.amax(1) / all_scores[:, 0].clamp(min=total)
    return scores.clamp_(max=1)  # beyond it by rounding only


def _strips(
    views: Sequence[MaskPrediction], probabilities: torch.Tensor, confident: bool, scores: torch.Tensor | None
) -> Iterator[Area]:
    """
    All of the label map at once, made of strips of as many rows as the sizes allow.

    Args:
        views, probabilities, confident: see [`label_pixels`].
        scores: (classes, H, W) to fill with the scores, if they are wanted; the last with the best of all further ones.
    """
    num_classes, device = len(probabilities), probabilities.device
    height, width = views[0].target_size
    probabilities, objects = probabilities[None], probabilities.sum(0)[None, None]
    best = torch.empty(height, width, dtype=torch.int64, device=device)
    best_scores = torch.empty(height, width, device=device)
    all_scores = torch.empty(height, 1, width, device=device) if confident else None
    for rows, masks in _strips_of_masks(views, num_classes):
        count = len(masks)
        strip_scores = torch.bmm(probabilities.expand(count, -1, -1), masks)  # (rows, C, W)
        torch.max(strip_scores, 1, out=(best_scores[rows], best[rows]))
        if all_scores is not None:
            torch.bmm(objects.expand(count, -1, -1), masks, out=all_scores[rows])
        if scores is not None:
            last = len(scores) - 1
            scores[:last, rows] = strip_scores[:, :last].movedim(1, 0)
            scores[last, rows] = strip_scores[:, last:].amax(1)
    # A logit that isn't finite has made all scores NaN: each strip takes from all cells, if by a weight of 0.
    best.masked_fill_(best_scores.isnan(), -1)
    yield Area((slice(None), slice(None)), best, best_scores, None if all_scores is None else all_scores[:, 0])


def _strips_of_masks(views: Sequence[MaskPrediction], num_classes: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    The masks of all views, resized to the label map: as many of its rows at once as leave room for the scores of
    `num_classes`, and the masks there, (rows, views * Q, W), 0..1, as each view's share.
    """
    height, width = views[0].target_size
    device, num_queries = views[0].mask_logits.device, sum(len(view.mask_logits) for view in views)
    cells = [view.mask_logits.movedim(1, 0).flatten(1) for view in views]  # of each view (h, Q * w)
    width_weights = [view.width_weights.T for view in views]
    at_once = VALUES_AT_ONCE if device.type == "cpu" else VALUES_AT_ONCE_ON_ACCELERATOR
    rows_at_once = max(1, at_once // ((num_classes + num_queries) * width))
    for top in range(0, height, rows_at_once):
        rows = slice(top, min(top + rows_at_once, height))
        count = rows.stop - rows.start
        strips = []  # of each view (rows, Q, W)
        for view, view_cells, weights in zip(views, cells, width_weights):
            strip = view.height_weights[rows] @ view_cells
            masks = (strip.view(-1, len(weights)) @ weights).view(count, -1, width).sigmoid_()
            if view.shares is not None:
                masks *= view.shares[0][rows, None, None] * view.shares[1]
            strips.append(masks)
        yield rows, torch.cat(strips, dim=1) if len(strips) > 1 else strips[0]


def _probabilities(views: Sequence[MaskPrediction]) -> torch.Tensor:
    """(C, views * Q), of each class for the queries of all views."""
    return torch.cat([view.probabilities for view in views], dim=1)


def _total(views: Sequence[MaskPrediction]) -> int:
    """What the views' shares add up to at each pixel, where those that have none count as 1."""
    return 1 if any(view.shares is not None for view in views) else len(views)


def _tiles(views: Sequence[MaskPrediction], probabilities: torch.Tensor, confident: bool) -> Iterator[Area]:
    """Tiles, in each of which only classes are looked at that can win in it: often there is one."""
    probabilities = probabilities.contiguous()
    objects = probabilities.sum(0, keepdim=True)  # (1, views * Q), of each query being an object at all
    tile_height, tile_width = TILE if len(probabilities) > FEW_CLASSES else TILE_OF_FEW_CLASSES
    height, width = views[0].target_size
    row_weights = [_split_weights(view.height_weights, tile_height) for view in views]
    column_weights = [_split_weights(view.width_weights, tile_width) for view in views]
    windows = [_windows([cells for cells, _ in weights]) for weights in column_weights]
    for strip_number, top in enumerate(range(0, height, tile_height)):
        rows = slice(top, min(top + tile_height, height))
        strips = []  # of each view (Q, strip height, w): rows are resized, columns not yet
        for view, weights in zip(views, row_weights):
            cells, averages = weights[strip_number]
            strips.append(averages @ view.mask_logits[:, cells])
        # Resizing takes averages, and the sigmoid rises: between the masks' least and greatest cells around a tile.
        lowest, highest = (
            torch.cat([extreme(extreme(strip, 1)[:, window], 2) for strip, window in zip(strips, windows)]).sigmoid_()
            for extreme in (torch.amin, torch.amax)
        )  # (views * Q, tiles)
        # Only a class whose score could somewhere reach what the best class has everywhere can win at all.
        sure_scores = (probabilities @ lowest).amax(0)
        possible = probabilities @ highest >= sure_scores * (1 - MARGIN)  # (C, tiles)
        counts, firsts = possible.sum(0).tolist(), possible.max(0).indices.tolist()
        margins = (sure_scores * MARGIN).tolist()
        for number, left in enumerate(range(0, width, tile_width)):
            place = rows, slice(left, min(left + tile_width, width))
            if counts[number] == 1 and not confident:
                yield Area(place, firsts[number])
                continue
            candidates = possible[:, number].nonzero()[:, 0]
            chosen = probabilities[candidates]
            if len(candidates) > FEW_CLASSES:
                left_over = _rivals(chosen, lowest[:, number], highest[:, number], margins[number])
                candidates, chosen = candidates[left_over], chosen[left_over]
            tiles = []
            for strip, weights in zip(strips, column_weights):
                cells, averages = weights[number]
                tiles.append((strip[:, :, cells].flatten(0, 1) @ averages.T).view(len(strip), -1))
            masks = (torch.cat(tiles) if len(tiles) > 1 else tiles[0]).sigmoid_()  # (views * Q, pixels)
            if len(candidates) > FEW_CLASSES:
                left_over = _rivals(chosen, masks.amin(1), masks.amax(1), margins[number])
                candidates, chosen = candidates[left_over], chosen[left_over]
            shape = rows.stop - rows.start, -1
            if not confident:
                yield Area(place, candidates[(chosen @ masks).max(0).indices].view(shape))
                continue
            scores = torch.cat((chosen, objects)) @ masks
            best_scores, best = scores[:-1].max(0)
            yield Area(place, candidates[best].view(shape), best_scores.view(shape), scores[-1].view(shape))


def _rivals(probabilities: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, margin: float) -> torch.Tensor:
    """
    The classes whose score could somewhere reach that of a likely one, by the greatest difference that masks within
    bounds leave room for. It is a much closer bound than those of the two scores, as what all classes have is no
    difference, and takes more work.

    Args:
        probabilities: (C, Q).
        lowest, highest: (Q,), bounds of the masks.
        margin: of the difference.

    Returns:
        Ascending indices.
    """
    middle, reach = (highest + lowest) / 2, (highest - lowest) / 2
    likely = (probabilities @ middle).max(0).indices
    difference = probabilities - probabilities[likely]
    return (difference @ middle + difference.abs_() @ reach >= -margin).nonzero()[:, 0]


def _split_weights(weights: torch.Tensor, side: int) -> list[tuple[slice, torch.Tensor]]:
    """For each `side` of pixels the cells that they take from, and their weights without the other cells."""
    parts = []
    for part in weights.split(side):
        used = part.any(0).nonzero()[:, 0].tolist()
        cells = slice(used[0], used[-1] + 1)
        parts.append((cells, part[:, cells]))
    return parts


def _windows(cells: list[slice]) -> torch.Tensor:
    """Indices of each tile's cells, (tiles, cells): as many for all, the last one repeated."""
    count = max(tile.stop - tile.start for tile in cells)
    return torch.tensor([[min(tile.start + i, tile.stop - 1) for i in range(count)] for tile in cells])
