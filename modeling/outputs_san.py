"""What the SAN models return, and the targets that they take.

Shapes: B images, Q queries, C classes, D CLIP's joint embedding width, W its vision width, Hc x Wc its grid, h its
vision heads; Ca the side adapter's width, Hs x Ws its grid; n bias layers.
"""

from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from transformers.utils import ModelOutput

from .label_maps_san import MaskPrediction, label_pixels


@dataclass
class SANModelOutput(ModelOutput):
    """
    Output of [`SANModel`].

    Args:
        masks_queries_logits (`torch.Tensor` of shape (B, Q, Hs, Ws)):
            Logits of the mask proposals at the side adapter's resolution, over the whole padded image.
        mask_embeds (`torch.Tensor` of shape (B, Q, D)):
            What CLIP recognises in each mask: L2-normalised, in CLIP's joint embedding space.
        attention_bias (`torch.Tensor` of shape (B, n, h or 1, Q, Hs, Ws)):
            Attention bias of each query before it is pooled to CLIP's grid.
        image_sizes (`torch.Tensor` of shape (B, 2), *optional*):
            The (height, width) before padding that came in, for post-processing.
        padded_sizes (`torch.Tensor` of shape (B, 2)):
            The (height, width) of the padded input, for post-processing.
        patch_sizes (`torch.Tensor` of shape (B, 2)):
            The (height, width) in pixels of the padded input that one pixel of the mask logits stands for.
        auxiliary_masks_queries_logits (`tuple` of `torch.Tensor`, *optional*, with `output_auxiliary_logits`):
            Mask logits of the earlier supervised layers, earliest first.
        auxiliary_mask_embeds (`tuple` of `torch.Tensor`, *optional*, with `output_auxiliary_logits`):
            Mask embeddings of the earlier supervised layers, earliest first.
        hidden_states (`tuple` of `torch.Tensor`, *optional*, with `output_hidden_states`):
            The side adapter's tokens before the first and after each block, (B, Q + Hs * Ws, Ca), queries first; None
            for those that weren't asked for.
        clip_feature_maps (`tuple` of `torch.Tensor`, *optional*, with `output_clip_feature_maps`):
            CLIP's maps after layers 0 to `recognition_layer`, (B, W, Hc, Wc).
        attentions (`tuple` of `torch.Tensor`, *optional*, with `output_attentions`):
            The side adapter's attention weights, (B, heads, Q + Hs * Ws, Q + Hs * Ws).
        recognition_attentions (`tuple` of `torch.Tensor`, *optional*, with `output_attentions`):
            For each deep CLIP layer the attention weights of the recognition tokens over CLIP's patches and the
            recognition tokens, (B, h, R, Hc * Wc + R); R is Q times the number of supervised layers that were run.
    """

    masks_queries_logits: torch.Tensor | None = None
    mask_embeds: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None
    patch_sizes: torch.Tensor | None = None
    auxiliary_masks_queries_logits: tuple[torch.Tensor, ...] | None = None
    auxiliary_mask_embeds: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    clip_feature_maps: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    recognition_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SANForSemanticSegmentationOutput(ModelOutput):
    """
    Output of [`SANForSemanticSegmentation`]. `post_process_semantic_segmentation` of [`SANImageProcessor`] or
    [`SANProcessor`] makes label maps of it.

    Args:
        loss (`torch.Tensor` of shape (), *optional*, with labels):
            The training loss: the sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, with labels):
            Its weighted parts `loss_cross_entropy`, `loss_mask`, `loss_dice` of the last supervised layer, and with
            the suffix `_0`, `_1`, ... of the earlier ones.
        class_queries_logits (`torch.Tensor` of shape (B, Q, C + 1)):
            Class logits of each mask, no-object last.
        masks_queries_logits (`torch.Tensor` of shape (B, Q, Hs, Ws)):
            See [`SANModelOutput`], also for what is not listed here.
        mask_embeds (`torch.Tensor` of shape (B, Q, D)):
            L2-normalised mask embeddings.
        class_embeds (`torch.Tensor` of shape (C + 1, D)):
            The classifier: L2-normalised, the no-object row last.
        auxiliary_logits (`list[dict[str, torch.Tensor]]`, *optional*, with `output_auxiliary_logits`):
            `masks_queries_logits` and `class_queries_logits` of the earlier supervised layers, earliest first.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    mask_embeds: torch.Tensor | None = None
    class_embeds: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None
    patch_sizes: torch.Tensor | None = None
    auxiliary_logits: list[dict[str, torch.Tensor]] | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    clip_feature_maps: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    recognition_attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def logits(self) -> torch.Tensor:
        """
        (B, C, Hs, Ws) float32, for code that knows semantic segmentation models by their `logits`: logarithms of the
        classes' scores, on the masks' grid laid over each image without its padding. The highest gives the label map
        that post-processing makes at this size; a softmax over the classes, each one's share of all scores.

        No field: it is computed whenever it is asked for, and what collects outputs leaves it out. At the image's own
        size post-processing is more exact, and holds no scores of all classes at once.

        Raises:
            ValueError: outputs without masks, classes or sizes, or logits that are not finite.
        """
        masks, classes, padded, patches = (
            self.masks_queries_logits,
            self.class_queries_logits,
            self.padded_sizes,
            self.patch_sizes,
        )
        if masks is None or classes is None or padded is None or patches is None:
            raise ValueError(
                "These outputs have no logits for pixels: expected masks, classes and sizes, as forward gives."
            )
        sizes = padded if self.image_sizes is None else self.image_sizes
        scores = []
        for mask, logits, patch, size in zip(masks, classes, patches.tolist(), sizes.tolist()):
            grid = (mask.shape[-2], mask.shape[-1])
            prediction = MaskPrediction.from_logits(mask, logits, tuple(patch), tuple(size), grid)
            pixels = label_pixels([prediction], return_scores=True, return_confidence=False)
            scores.append(cast(torch.Tensor, pixels.scores))
        return torch.stack(scores).clamp(min=torch.finfo(torch.float32).tiny).log()

    def __getitem__(self, key):
        if key == "logits":  # what `Trainer`'s label smoothing asks every model for
            raise ValueError(
                "SAN has no logits of classes for each pixel, which label smoothing needs: leave "
                "label_smoothing_factor at 0 in TrainingArguments. Its logits are class_queries_logits and "
                "masks_queries_logits; the attribute, outputs.logits, makes scores of pixels from them."
            )
        return super().__getitem__(key)


class SANTargets(TypedDict, total=False):
    """
    Targets of the training loss beside `labels`.

    Not in `forward`'s own list of arguments: `Trainer` takes every argument with "label" in its name for one that each
    batch has, and would leave out loss and metrics without a word.

    Args:
        mask_labels (`list` of B `torch.Tensor` of shape (M_i, H, W), *optional*):
            Instead of `labels`, binary masks of each image, of any size, over the whole padded image.
        class_labels (`list` of B `torch.Tensor` of shape (M_i,), *optional*):
            Their classes in 0..C - 1.
        target_counts (`torch.Tensor` of shape (4,), *optional*):
            Where gradients are accumulated, the sum of [`~SANForSemanticSegmentation.count_targets`] over all batches
            of the step, of all processes. The mean of the batches' losses is then that of one large batch.
    """

    mask_labels: list[torch.Tensor] | None
    class_labels: list[torch.Tensor] | None
    target_counts: torch.Tensor | None


def select_hidden_states(
    hidden_states: list[torch.Tensor], selection: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states selected by `output_hidden_states`: all, or some by index, the others being None."""
    if selection is None or selection is False:
        return None
    if selection is True:
        return tuple(hidden_states)
    chosen = [selection] if isinstance(selection, int) else selection
    indices = range(len(hidden_states))
    kept = {indices[i] for i in chosen}
    return tuple(state if i in kept else None for i, state in enumerate(hidden_states))


def sizes_of_batch(pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, 2) int64: a (height, width) that all images of the batch share."""
    sides = [torch.full((pixel_values.shape[0], 1), side, device=pixel_values.device) for side in size]
    return torch.cat(sides, dim=1)
