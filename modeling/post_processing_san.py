"""Label maps from SAN's mask and class logits, tile by tile (the last step of the paper's figure 2).

Memory does not grow with the number of classes: the scores of all classes and pixels never exist at once, unless they
are asked for.
Shapes: Q queries, C classes, h x w the masks' grid, H x W the label map. Sizes are (height, width), in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .image_sizes_san import MAX_TARGET_PIXELS, check_area


# Square tiles of this side, and at most so many scores at a time. A tile is small enough that few classes can win
# anywhere in it, large enough to keep the processor busy, and no power of two, which would have the masks of all
# queries compete for the same lines of the processor's cache.
TILE_SIDE = 48
SCORES_AT_ONCE = 2**22


@dataclass(frozen=True)
class MaskPrediction:
    """
    Prediction of the model for one image, or for one view of it in test-time augmentation.

    Attributes:
        mask_logits: (Q, h, w) float32.
        probabilities: (C, Q) float32, of each class for each query; the no-object class is dropped.
        height_weights: (H, h) float32, what each row of the label map takes from each row of the masks.
        width_weights: (W, w) float32, the same for columns.
    """

    mask_logits: torch.Tensor
    probabilities: torch.Tensor
    height_weights: torch.Tensor
    width_weights: torch.Tensor

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
            ValueError: logits that are not finite.
        """
        mask_logits, class_logits = mask_logits.float(), class_logits.float()
        for name, logits in (("masks_queries_logits", mask_logits), ("class_queries_logits", class_logits)):
            if not logits.isfinite().all():
                raise ValueError(
                    f"{name} has NaN or infinite values, expected finite ones: check the pixel values, and in half "
                    "precision use bfloat16 rather than float16."
                )
        height_weights, width_weights = (
            interpolation_weights(*sides, device=mask_logits.device)
            for sides in zip(mask_logits.shape[-2:], patch_size, image_size, target_size)
        )
        # What is at the left of a mirrored view belongs to the right.
        width_weights = width_weights.flip(0) if mirrored else width_weights
        return cls(mask_logits, class_logits.softmax(-1)[:, :-1].T, height_weights, width_weights)


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
        labels: (H, W) int64.
        confidence: (H, W) float32, 0..1, of the class with the highest score: that score, divided by the sum of the
            scores of all classes where this is more than 1. A score itself is a sum over queries and has no upper
            bound. The confidences of a pixel's classes thus add up to 1 where the queries cover it fully, and to
            less where they don't or hold it for no object.
        scores: (C, H, W) float32, at least 0, if they were asked for: (`num_labels` + 1, H, W) where classes are
            summed up as "other", whose score is that of the best of them.
    """

    labels: torch.Tensor
    confidence: torch.Tensor
    scores: torch.Tensor | None = None


def label_pixels(
    views: Sequence[MaskPrediction],
    num_labels: int | None = None,
    threshold: float | None = None,
    return_scores: bool = False,
) -> LabelledPixels:
    """
    The label map of one image from the predictions of one view of it or more.

    A class's score at a pixel is the sum over queries of the class's probability times the mask's, averaged over the
    views: a sum over the queries of all views. The label is the class of the highest score.

    Args:
        views: of the same image; for the same classes and label map.
        num_labels: later classes are one "other" label with this number.
        threshold: pixels whose confidence is lower get the "other" label, `num_labels` or else C.
        return_scores: whether to return the scores as well.
    """
    height, width = len(views[0].height_weights), len(views[0].width_weights)
    probabilities = torch.cat([view.probabilities for view in views], dim=1)  # (C, views * Q)
    num_classes = len(probabilities)
    other = num_labels if num_labels is not None and num_labels < num_classes else None
    objects = probabilities.sum(0)  # (views * Q,), of each query being an object at all
    labels = torch.empty(height, width, dtype=torch.int64, device=probabilities.device)
    confidence = probabilities.new_empty(height, width)
    scores = None
    if return_scores:
        scores = probabilities.new_empty(num_classes if other is None else other + 1, height, width)

    for top in range(0, height, TILE_SIDE):
        rows = slice(top, top + TILE_SIDE)
        strips = [_drop_unused(view.height_weights[rows], view.mask_logits, axis=1) for view in views]
        for left in range(0, width, TILE_SIDE):
            columns = slice(left, left + TILE_SIDE)
            tiles = []
            for view, (row_weights, strip) in zip(views, strips):
                column_weights, cells = _drop_unused(view.width_weights[columns], strip, axis=2)
                tiles.append((row_weights @ cells @ column_weights.T).sigmoid_())
            masks = torch.cat(tiles) if len(tiles) > 1 else tiles[0]  # (views * Q, tile height, tile width)
            if scores is not None:
                tile_scores = torch.einsum("cq,qhw->chw", probabilities, masks) / len(views)
                if other is not None:
                    tile_scores = torch.cat((tile_scores[:other], tile_scores[other:].amax(0, keepdim=True)))
                scores[:, rows, columns] = tile_scores
                best, best_scores = tile_scores.argmax(0), tile_scores.amax(0)
            else:
                best, best_scores = (part.view(masks.shape[1:]) for part in best_class(masks.flatten(1), probabilities))
                best_scores = best_scores / len(views)
            all_scores = torch.tensordot(objects, masks, 1) / len(views)
            tile_confidence = (best_scores / all_scores.clamp(min=1)).clamp(max=1)  # beyond 1 by rounding only
            confidence[rows, columns] = tile_confidence
            if threshold is not None:
                best = best.masked_fill(tile_confidence < threshold, num_classes)
            labels[rows, columns] = best
    if num_labels is not None:
        labels.clamp_(max=num_labels)
    return LabelledPixels(labels, confidence, scores)


def best_class(masks: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The class of the highest score at each of N pixels, and that score.

    Args:
        masks: (Q, N), 0..1.
        probabilities: (C, Q), 0..1.

    Returns:
        Classes (N,) int64, and scores (N,).
    """
    # Only a class whose score could somewhere reach what the best class has everywhere can win at all: few can, in a
    # small tile. The margin is more than the rounding error of a sum over queries.
    highest, lowest = probabilities @ masks.amax(1), probabilities @ masks.amin(1)
    candidates = (highest >= lowest.max() * (1 - 1e-4)).nonzero()[:, 0]
    probabilities = probabilities[candidates].T
    classes, scores = [], []
    for part in masks.T.split(max(1, SCORES_AT_ONCE // len(candidates))):
        part_scores = part @ probabilities
        best = part_scores.argmax(1, keepdim=True)
        classes.append(candidates[best[:, 0]])
        scores.append(part_scores.gather(1, best)[:, 0])
    return torch.cat(classes), torch.cat(scores)


def _drop_unused(weights: torch.Tensor, logits: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `weights` (pixels, cells) without the cells that no pixel takes from, and the logits of the cells left."""
    used = weights.any(0).nonzero()[:, 0]
    return weights[:, used], logits.index_select(axis, used)


def check_sizes(sizes, batch_size: int, name: str) -> list[tuple[int, int]] | None:
    """Checks a list or tensor of sizes."""
    if sizes is None:
        return None
    sizes = [tuple(int(side) for side in size) for size in sizes]
    if len(sizes) != batch_size:
        raise ValueError(f"Got {len(sizes)} {name} for outputs of {batch_size} images, expected as many.")
    if any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"Got {name}={sizes}, expected (height, width) of each image, both at least 1.")
    return sizes


class SemanticSegmentationPostProcessing:
    """The image processor's second half: label maps from the model's outputs."""

    # The first half's: the sizes it resizes images of these sizes to, and the one it pads a batch of these to.
    resized_sizes: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]
    padded_size: Callable[[list[tuple[int, int]]], tuple[int, int]]

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: "list[tuple[int, int]] | torch.Tensor | None" = None,
        return_segmentation_scores: bool = False,
        num_labels: int | None = None,
        threshold: float | None = None,
        return_confidence: bool = False,
    ) -> "list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]":
        r"""
        Label maps from the model's outputs: mask logits are resized bilinearly to the padded input, cropped to the
        image, resized to the target, and put through a sigmoid; a class's score is the sum over queries of its
        probability (softmax, no-object dropped) times the mask; the label is the class of the highest score.

        Memory does not grow with the number of classes: the scores of all classes and pixels never exist at once,
        unless they are asked for.

        Args:
            outputs (`SANForSemanticSegmentationOutput` or alike):
                The model's outputs as they are: with `class_queries_logits` (B, Q, C + 1), `masks_queries_logits`
                (B, Q, h, w), `padded_sizes` and `patch_sizes` (B, 2), the (height, width) of the padded input and of
                its patches, and `image_sizes` (B, 2), that of each image inside the padded input. Where `image_sizes`
                is `None`, as the model wasn't given any, it is what this processor's own `size` makes of
                `target_sizes`, which has to fit the padded input.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape (B, 2), *optional*):
                (height, width) of each label map, usually the original image's. Without, label maps have the size
                of the model's input (of `image_sizes`, or of all of the padded input if that is missing too).
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Whether to return the scores as well. They take 4 * C * H * W bytes per image.
            num_labels (`int`, *optional*):
                The number of classes the caller asked for, if the vocabulary was expanded beyond them: every later
                class counts as one "other" with the label `num_labels`.
            threshold (`float`, *optional*):
                Pixels whose confidence, 0..1, is lower get the label of "other", too: `num_labels`, or C without it.
            return_confidence (`bool`, *optional*, defaults to `False`):
                Whether to return each pixel's confidence as well: the highest score, divided by the sum of the scores
                of all classes where this is more than 1.

        Returns:
            A list of B label maps, (H, W) int64 with values 0..C - 1 (0..`num_labels` if that is given, 0..C with a
            `threshold`), on the outputs' device. With `return_segmentation_scores` or `return_confidence`, a list of
            objects with `segmentation`, the label map; `segmentation_scores`, (C, H, W) float32, sums over queries,
            at least 0 and without an upper bound; with `num_labels`, (`num_labels` + 1, H, W), the last being the best
            of the others; and `confidence`, (H, W) float32, 0..1.

        Raises:
            ValueError: for outputs without sizes, sizes that do not fit them, and logits that are not finite.
        """
        class_logits, mask_logits = (
            getattr(outputs, name, None) for name in ("class_queries_logits", "masks_queries_logits")
        )
        if class_logits is None or mask_logits is None:
            raise ValueError(
                f"Got {type(outputs).__name__} as outputs, expected the model's, with class_queries_logits and "
                "masks_queries_logits; target_sizes come after them."
            )
        batch_size, num_classes = len(class_logits), class_logits.shape[-1] - 1
        if num_labels is not None and not 1 <= num_labels <= num_classes:
            raise ValueError(f"Got num_labels={num_labels}, expected 1..{num_classes}, the outputs' number of classes.")
        target_sizes = check_sizes(target_sizes, batch_size, "target_sizes")
        for target_size in target_sizes or ():
            check_area(target_size, "a label map's size in target_sizes,", MAX_TARGET_PIXELS)
        image_sizes, patch_sizes = self._sizes_in_model(outputs, target_sizes, batch_size, mask_logits.shape[-2:])

        results: list[Any] = []
        for index, (image_size, target_size) in enumerate(zip(image_sizes, target_sizes or image_sizes)):
            try:
                prediction = MaskPrediction.from_logits(
                    mask_logits[index], class_logits[index], patch_sizes[index], image_size, target_size
                )
            except ValueError as error:
                raise ValueError(f"Image {index}: {error}") from error
            pixels = label_pixels([prediction], num_labels, threshold, return_segmentation_scores)
            if not (return_segmentation_scores or return_confidence):
                results.append(pixels.labels)
                continue
            parts = {"segmentation": pixels.labels, "segmentation_scores": pixels.scores}
            if return_confidence:
                parts["confidence"] = pixels.confidence
            results.append(SemanticSegmentationPostProcessorOutput(parts))
        return results

    def _sizes_in_model(
        self, outputs, target_sizes: list[tuple[int, int]] | None, batch_size: int, mask_size: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Each image's size inside the padded input, and the size of that input's patches."""
        names = ("padded_sizes", "patch_sizes", "image_sizes")
        sizes = {name: check_sizes(getattr(outputs, name, None), batch_size, name) for name in names}
        padded_sizes, patch_sizes, image_sizes = sizes.values()
        if padded_sizes is None or patch_sizes is None:
            lacking = " and ".join(name for name in names[:2] if sizes[name] is None)
            raise ValueError(
                f"Got outputs without {lacking}: where an image lies in masks of {tuple(mask_size)} can't be told. "
                "Expected the model's outputs as they are; outputs made by hand need padded_sizes, the (height, width) "
                "of pixel_values, and patch_sizes, of the side adapter's patches, for each image."
            )
        for padded_size, patch_size in zip(padded_sizes, patch_sizes):
            if any(side // patch != cells for side, patch, cells in zip(padded_size, patch_size, mask_size)):
                raise ValueError(
                    f"A padded input of {padded_size} in patches of {patch_size} does not fit masks of "
                    f"{tuple(mask_size)}: use the outputs of one batch as they are."
                )
        if image_sizes is None and target_sizes is None:
            image_sizes = padded_sizes
        elif image_sizes is None and target_sizes is not None:
            image_sizes = self.resized_sizes(target_sizes)
            if any(padded_size != self.padded_size(image_sizes) for padded_size in padded_sizes):
                raise ValueError(
                    f"Got outputs without image_sizes, and a padded input of {padded_sizes[0]}, which is not what this "
                    f"processor makes of images of {target_sizes}. Pass the processor's image_sizes to the model, or "
                    "set outputs.image_sizes to each image's (height, width) inside the padded input."
                )
        sizes_in_model = list(image_sizes or ())
        for image_size, padded_size in zip(sizes_in_model, padded_sizes):
            if image_size[0] > padded_size[0] or image_size[1] > padded_size[1]:
                raise ValueError(
                    f"Got an image of {image_size} in outputs.image_sizes, larger than the padded input of "
                    f"{padded_size}: use the outputs of one batch as they are."
                )
        return sizes_in_model, patch_sizes
