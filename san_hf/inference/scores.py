"""The scores of classes in a segmentation: computed when asked for, as those of all classes and pixels are too many."""

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING

import numpy as np

from san_hf.messages import join_some


if TYPE_CHECKING:
    from san_hf.inference.segmentation import Segmentation


def compute_scores(
    segmentation: "Segmentation",
    classes: str | int | Sequence[str | int],
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """See [`Segmentation.scores`]."""
    import torch

    from san_hf.modeling.label_maps_san import class_scores

    if not segmentation.predictions:
        raise ValueError(
            "This segmentation has no scores: ask for them by Segmenter(..., confidence=True)."
            if segmentation.confidence is None
            else "This segmentation has no scores, as it was made in windows, or by hand: segment the part of the "
            "image that is of interest by itself, without tile."
        )
    wanted = [classes] if isinstance(classes, str | int | np.integer) else classes
    labels = [_find_label(segmentation, name) for name in wanted]
    left, top, right, bottom = (0, 0, segmentation.width, segmentation.height) if box is None else map(index, box)
    if not (0 <= left < right <= segmentation.width and 0 <= top < bottom <= segmentation.height):
        raise ValueError(
            f"Got the box {(left, top, right, bottom)}, expected (left, top, right, bottom) with at least one pixel, "
            f"within an image of {segmentation.width} x {segmentation.height}."
        )
    with torch.inference_mode():
        views = [view.part(slice(top, bottom), slice(left, right)) for view in segmentation.predictions]
        num_labels = len(segmentation.class_names) - segmentation.expanded
        scores = class_scores(views, labels, num_labels).numpy()
    return scores if wanted is classes else scores[0]


def compute_scores_at(segmentation: "Segmentation", x: int, y: int) -> dict[str, float]:
    """See [`Segmentation.scores_at`]."""
    if not (0 <= x < segmentation.width and 0 <= y < segmentation.height):
        raise ValueError(
            f"Got the pixel ({x}, {y}), expected x from 0 to {segmentation.width - 1} and y from 0 to "
            f"{segmentation.height - 1}."
        )
    scores = compute_scores(segmentation, range(len(segmentation.class_names)), (x, y, x + 1, y + 1))
    by_name = zip(segmentation.class_names, scores[:, 0, 0].tolist())
    return dict(sorted(by_name, key=lambda entry: -entry[1]))


def _find_label(segmentation: "Segmentation", name: str | int) -> int:
    """The label of a class, by its name or number."""
    names = list(segmentation.class_names)
    if isinstance(name, str) and name in names:
        return names.index(name)
    if isinstance(name, int | np.integer) and 0 <= name < len(names):
        return int(name)
    raise ValueError(
        f"Got the class {name!r:.80}, expected one of {join_some(names, 20)}, or a label from 0 to {len(names) - 1}."
    )
