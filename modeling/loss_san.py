"""SAN's training loss: transformers' own Mask2Former criterion (Hungarian matching, class, mask and dice losses).

What it is divided by is counted over everything that makes one step: the batches of all processes, and those whose
gradients are accumulated. So neither changes the loss or its gradients: they are those of one large batch.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from .configuration_san import SANConfig
from .image_input_san import check_ignore_index


def classes_of_maps(labels: torch.Tensor, ignore_index: int) -> list[torch.Tensor]:
    """
    The classes that each semantic map shows.

    Args:
        labels: (B, H, W) integers.
        ignore_index: value of unlabelled pixels.

    Returns:
        B tensors (M_i,), ascending.

    Raises:
        ValueError: `labels` has another shape or dtype.
    """
    if labels.dim() != 3 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be a semantic map of integers of shape (batch, height, width), got shape "
            f"{tuple(labels.shape)} and dtype {labels.dtype}."
        )
    present = [label_map.unique() for label_map in labels]
    return [classes[classes != ignore_index] for classes in present]


def split_semantic_map(
    labels: torch.Tensor, num_labels: int, ignore_index: int, ignore_index_is_class: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Turns semantic maps into one binary mask for each class that an image shows.

    Args:
        labels: (B, H, W) integers in 0..num_labels - 1, or `ignore_index`.
        num_labels: the number of classes C.
        ignore_index: value of unlabelled pixels.
        ignore_index_is_class: whether it is meant to be one of the classes, which then has no masks.

    Returns:
        `mask_labels`, B tensors (M_i, H, W) of 0. and 1.; and `class_labels`, B tensors (M_i,) of class indices. M_i
        may be 0.

    Raises:
        ValueError: `labels` has another shape or dtype, or holds another value, or `ignore_index` is a class.
    """
    if not ignore_index_is_class:
        check_ignore_index(ignore_index, num_labels, "config.semantic_loss_ignore_index")
    mask_labels, class_labels = [], []
    for i, (label_map, classes) in enumerate(zip(labels, classes_of_maps(labels, ignore_index))):
        if classes.numel() and not 0 <= classes.min() <= classes.max() < num_labels:
            outside = classes[(classes < 0) | (classes >= num_labels)].tolist()
            raise ValueError(
                f"labels of image {i} hold {outside}, but there are {num_labels} classes (0..{num_labels - 1}) and "
                f"the ignore index is {ignore_index}. Map the values to the classes, or set "
                "config.semantic_loss_ignore_index."
            )
        class_labels.append(classes.long())
        mask_labels.append((label_map == classes[:, None, None]).float())
    return mask_labels, class_labels


def count_targets(class_labels: Sequence[torch.Tensor], num_queries: int) -> torch.Tensor:
    """
    What the losses of a batch are divided by, as counts to be added up over the batches of a step.

    Args:
        class_labels: for each image the classes (M_i,) of its masks.
        num_queries: mask proposals for each image.

    Returns:
        (4,) int64, on the CPU: masks, queries that one is matched to, queries, and 1 for this batch.
    """
    masks = [len(classes) for classes in class_labels]
    return torch.tensor(
        [sum(masks), sum(min(number, num_queries) for number in masks), len(masks) * num_queries, 1], dtype=torch.int64
    )


class SegmentationCriterion(Mask2FormerLoss):
    """
    Mask2Former's criterion, divided by what the batches of a step have on average: so the mean of their losses (and of
    their gradients) is that of one batch with all of their images.

    In the original that holds for the mask losses over processes; its class loss is divided by what each batch has.

    Args:
        config: as Mask2Former's.
        weight_dict: factor of each loss.
        target_counts: sum of [`count_targets`] over the batches.
    """

    def __init__(self, config, weight_dict: dict[str, float], target_counts: torch.Tensor):
        super().__init__(config, weight_dict)
        masks, matched, queries, batches = target_counts.tolist()
        self.num_masks = max(1.0, masks / batches)
        self.class_weight_sum = self.sum_class_weights(matched, queries) / batches

    def sum_class_weights(self, matched: int, queries: int) -> float:
        """Sum of the weights of that many queries in the class loss."""
        return matched + self.eos_coef * (queries - matched)

    # The parent's `class_labels: torch.Tensor` are a list, too.
    def get_num_masks(  # type: ignore[override]
        self, class_labels: list[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Masks of a batch, on average, but at least 1."""
        return torch.tensor(self.num_masks, device=device)

    def loss_labels(self, class_queries_logits: torch.Tensor, class_labels, indices) -> dict[str, torch.Tensor]:
        """Cross-entropy divided by the sum of the weights that a batch has on average, rather than by this one's."""
        matched = sum(len(queries) for queries, _ in indices)
        weight = self.sum_class_weights(matched, class_queries_logits.shape[:2].numel())
        if not weight:  # no masks, and a no-object class without weight: the parent would divide by zero
            return {"loss_cross_entropy": 0.0 * class_queries_logits.sum()}
        losses = super().loss_labels(class_queries_logits, class_labels, indices)
        return {name: loss * (weight / self.class_weight_sum) for name, loss in losses.items()}


def sum_over_processes(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of what the processes that train together have."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return counts
    counts = counts.to(device, copy=True)
    dist.all_reduce(counts)
    return counts


def check_whole_step() -> None:
    """
    Raises:
        ValueError: Accelerate, which `Trainer` uses, too, says that this batch is but a part of a step.
    """
    accelerate = sys.modules.get("accelerate.state")  # not imported here: models don't need it
    if accelerate is None or (state := accelerate.GradientState()).sync_gradients:
        return
    # It outlives a training that ends here or was interrupted; one that does accumulate sets it for each batch.
    state._set_sync_gradients(True)
    raise ValueError(
        "Gradients are accumulated over several batches, and the loss has to be divided by what all of them show: use "
        "san_hf.training.SANTrainer in place of Trainer, or pass target_counts (see "
        "SANForSemanticSegmentation.count_targets) in a loop of your own; or one larger batch."
    )


def mask_classification_loss(
    predictions: list[tuple[torch.Tensor, torch.Tensor]],
    mask_labels: list[torch.Tensor],
    class_labels: list[torch.Tensor],
    config: SANConfig,
    target_counts: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The weighted losses of every supervised layer.

    Args:
        predictions: for each supervised layer, earliest first, the mask logits (B, Q, h, w) and the class logits
            (B, Q, C + 1), no-object last.
        mask_labels: for each image its binary masks (M_i, H, W), at any resolution.
        class_labels: for each image the classes (M_i,) of its masks, in 0..C - 1.
        config: gives weights and numbers of points.
        target_counts: (4,) integers, the sum of [`count_targets`] over all batches of the step, of all processes, whose
            losses are then to be averaged. Without, the step is this batch and those of the other processes that train
            together: each of them has to call this.

    Returns:
        `loss_cross_entropy`, `loss_mask` and `loss_dice`, each multiplied by its weight, of the last layer; the same
        with the suffix `_0`, `_1`, ... for the earlier ones. Their sum is the training loss.

    Raises:
        ValueError: the labels don't fit each other, the batch or the classes; or counts that can't be.
    """
    batch_size, num_queries, num_labels = predictions[-1][1].shape
    num_labels -= 1  # no-object
    if not len(mask_labels) == len(class_labels) == batch_size:
        raise ValueError(
            f"mask_labels and class_labels must have one entry for each of the {batch_size} images, got "
            f"{len(mask_labels)} and {len(class_labels)}."
        )
    for i, (masks, classes) in enumerate(zip(mask_labels, class_labels)):
        if masks.dim() != 3 or classes.shape != masks.shape[:1]:
            raise ValueError(
                f"Image {i} needs mask_labels of shape (masks, height, width) and as many class_labels, got "
                f"{tuple(masks.shape)} and {tuple(classes.shape)}."
            )
        if classes.numel() and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(
                f"class_labels of image {i} hold {classes.tolist()}, outside the {num_labels} classes "
                f"0..{num_labels - 1}."
            )

    device = predictions[-1][0].device
    own_counts = count_targets(class_labels, num_queries)
    if target_counts is None:
        target_counts = sum_over_processes(own_counts, device)
    elif target_counts.shape != own_counts.shape or (target_counts.cpu() < own_counts).any():
        raise ValueError(
            f"target_counts must be the sum of model.count_targets over the batches of the step, this one's "
            f"{own_counts.tolist()} among them; got {target_counts.tolist()}."
        )

    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    criterion = SegmentationCriterion(
        # The criterion wants a Mask2FormerConfig, but the number of classes is the caller's, call by call.
        SimpleNamespace(
            num_labels=num_labels,
            no_object_weight=config.no_object_weight,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            train_num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
        ),
        weights,
        target_counts,
    ).to(device)
    # Sums over 12,544 points and the matching need more than half precision has.
    with torch.autocast(device.type, enabled=False):
        layers = [
            {"masks_queries_logits": masks.float(), "class_queries_logits": classes.float()}
            for masks, classes in predictions
        ]
        losses = criterion(
            **layers[-1],
            mask_labels=[masks.to(device, torch.float32) for masks in mask_labels],
            class_labels=[classes.to(device, torch.int64) for classes in class_labels],
            auxiliary_predictions=layers[:-1],
        )
    # "loss_mask_0" is the mask loss of the earliest layer.
    return {name: loss * weights[name.rstrip("0123456789").rstrip("_")] for name, loss in losses.items()}
