"""The image processor's second half: label maps from the model's outputs (the last step of the paper's figure 2)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .image_sizes_san import MAX_TARGET_PIXELS, check_area
from .label_maps_san import MaskPrediction, label_pixels


def check_sizes(sizes, batch_size: int, name: str) -> list[tuple[int, int]] | None:
    """Checks a list or tensor of sizes."""
    if sizes is None:
        return None
    sizes = [tuple(int(side) for side in size) for size in getattr(sizes, "tolist", lambda: sizes)()]
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
            `threshold`), on the outputs' device. An accelerator isn't waited for: logits that are not finite, which a
            CPU refuses, become the label -1 there. With `return_segmentation_scores` or `return_confidence`, a list of
            objects with `segmentation`, the label map; `segmentation_scores`, (C, H, W) float32, sums over queries,
            at least 0 and without an upper bound; with `num_labels`, (`num_labels` + 1, H, W), the last being the best
            of the others; and `confidence`, (H, W) float32, 0..1.

        Raises:
            ValueError: for outputs without sizes, sizes that do not fit them, and logits that are not finite, on a CPU.
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
            pixels = label_pixels(
                [prediction], num_labels, threshold, return_segmentation_scores, return_confidence=return_confidence
            )
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
