"""SAN's training loss: transformers' own Mask2Former criterion (Hungarian matching, class, mask and dice losses)."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from .configuration_san import SANConfig


def split_semantic_map(
    labels: torch.Tensor, num_labels: int, ignore_index: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Turns semantic maps into one binary mask for each class that an image shows.

    Args:
        labels: (B, H, W) integers in 0..num_labels - 1, or `ignore_index`.
        num_labels: the number of classes C.
        ignore_index: value of unlabelled pixels.

    Returns:
        `mask_labels`, B tensors (M_i, H, W) of 0. and 1.; and `class_labels`, B tensors (M_i,) of class indices. M_i
        may be 0.

    Raises:
        ValueError: `labels` has another shape or dtype, or holds another value.
    """
    if labels.dim() != 3 or labels.is_floating_point():
        raise ValueError(
            f"labels must be a semantic map of integers of shape (batch, height, width), got shape "
            f"{tuple(labels.shape)} and dtype {labels.dtype}."
        )
    mask_labels, class_labels = [], []
    for i, label_map in enumerate(labels):
        classes = label_map.unique()
        classes = classes[classes != ignore_index]
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


class SegmentationCriterion(Mask2FormerLoss):
    """
    Mask2Former's criterion with every loss normalised over all processes: the mean of the processes' losses (and, with
    DistributedDataParallel, of their gradients) is that of one process with the batches of all.
    """

    # The parent's `class_labels: torch.Tensor` are a list, too.
    def get_num_masks(  # type: ignore[override]
        self, class_labels: list[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Masks of a process, on average, but at least 1. (The parent divides by the number of processes twice.)"""
        num_masks = torch.as_tensor(sum(map(len, class_labels)), dtype=torch.float, device=device)
        return mean_over_processes(num_masks).clamp(min=1)

    def loss_labels(self, class_queries_logits: torch.Tensor, class_labels, indices) -> dict[str, torch.Tensor]:
        """Cross-entropy divided by the sum of the weights that a process has on average, rather than by its own."""
        losses = super().loss_labels(class_queries_logits, class_labels, indices)
        if not is_distributed():
            return losses
        num_queries = class_queries_logits.shape[0] * class_queries_logits.shape[1]
        num_matched = sum(len(queries) for queries, _ in indices)
        weight = torch.as_tensor(
            num_matched + self.eos_coef * (num_queries - num_matched),
            dtype=torch.float,
            device=class_queries_logits.device,
        )
        return {name: loss * (weight / mean_over_processes(weight)) for name, loss in losses.items()}


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of what each process has."""
    if not is_distributed():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def mask_classification_loss(
    predictions: list[tuple[torch.Tensor, torch.Tensor]],
    mask_labels: list[torch.Tensor],
    class_labels: list[torch.Tensor],
    config: SANConfig,
) -> dict[str, torch.Tensor]:
    """
    The weighted losses of every supervised layer.

    Args:
        predictions: for each supervised layer, earliest first, the mask logits (B, Q, h, w) and the class logits
            (B, Q, C + 1), no-object last.
        mask_labels: for each image its binary masks (M_i, H, W), at any resolution.
        class_labels: for each image the classes (M_i,) of its masks, in 0..C - 1.
        config: gives weights and numbers of points.

    Returns:
        `loss_cross_entropy`, `loss_mask` and `loss_dice`, each multiplied by its weight, of the last layer; the same
        with the suffix `_0`, `_1`, ... for the earlier ones. Their sum is the training loss. Where several processes
        train together, each has to call this: the losses are normalised over all of them.

    Raises:
        ValueError: the labels don't fit each other, the batch or the classes.
    """
    batch_size, _, num_labels = predictions[-1][1].shape
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

    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    device = predictions[-1][0].device
    criterion = SegmentationCriterion(
        # The criterion wants a Mask2FormerConfig, but the number of classes is the caller's, call by call.
        SimpleNamespace(  # type: ignore[arg-type]
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
