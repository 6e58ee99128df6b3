"""The two forms of an exported graph: open, which is told the classes, and closed, which carries them.

Shapes: B images, Q queries, D CLIP's joint embedding width, C classes, h x w the masks' grid, H x W the input.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from san_hf.modeling import SANConfig, SANForSemanticSegmentation


# Both grids, CLIP's and the side adapter's, have at least this many patches a side: exporters take an axis of 1 for
# one that never has another size.
SMALLEST_GRID = 2
# Pixels a side; for the exporters only, which want a bound.
LARGEST_SIDE = 2**16


class OpenForm(nn.Module):
    """
    Images and classes in, masks and their classes out.

    Args:
        model: in evaluation mode.
    """

    name = "open"
    outputs: tuple[str, ...] = ("masks_queries_logits", "class_queries_logits", "mask_embeds")

    def __init__(self, model: SANForSemanticSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, class_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: (B, 3, H, W) float32, normalised.
            class_embeds: (C, D) float32, of a [`san_hf.Vocabulary`].

        Returns:
            `masks_queries_logits` (B, Q, h, w), `class_queries_logits` (B, Q, C + 1), no object last, and
            `mask_embeds` (B, Q, D), which depend on the images alone.
        """
        outputs = self.model(pixel_values, class_embeds=class_embeds, return_dict=True)
        return {name: outputs[name] for name in self.outputs}


class ClosedForm(nn.Module):
    """
    Images in, scores or labels of pixels out, for the classes of one vocabulary.

    Args:
        model: in evaluation mode.
        class_embeds: (C, D), of the vocabulary.
        num_labels: classes from this one on are one "other", the last label.
        label_maps: whether to return the label maps, too.
    """

    name = "closed"
    outputs: tuple[str, ...] = ("logits",)

    def __init__(
        self, model: SANForSemanticSegmentation, class_embeds: torch.Tensor, num_labels: int, label_maps: bool = False
    ):
        super().__init__()
        self.model = model
        self.num_labels = num_labels
        self.class_embeds = nn.Buffer(class_embeds.clone())
        if label_maps:
            self.outputs = ("logits", "labels")

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: (B, 3, H, W) float32, normalised.

        Returns:
            `logits` (B, L, h, w) of the L labels, as the model's own outputs have them; and, if wanted, `labels`
            (B, H, W) int64.
        """
        outputs = self.model(pixel_values, class_embeds=self.class_embeds, return_dict=True)
        masks = outputs.masks_queries_logits
        probabilities = outputs.class_queries_logits.softmax(-1)[..., :-1]  # (B, Q, C)
        scores = self.scores(masks, probabilities, masks.shape[-2:])
        results = {"logits": scores.clamp(min=torch.finfo(torch.float32).tiny).log()}
        if "labels" in self.outputs:
            results["labels"] = self.scores(masks, probabilities, pixel_values.shape[-2:]).argmax(1)
        return results

    def scores(self, masks: torch.Tensor, probabilities: torch.Tensor, target: torch.Size) -> torch.Tensor:
        """Scores of labels on the masks' grid or at the input's size, (B, L, *target)."""
        rows, columns = (self.resizing(*sides) for sides in zip(masks.shape[-2:], target))
        covered = (rows @ masks @ columns.T).sigmoid()  # (B, Q, *target)
        scores = torch.einsum("bqc,bqhw->bchw", probabilities, covered)
        if self.num_labels == len(self.class_embeds):
            return scores
        return torch.cat([scores[:, : self.num_labels], scores[:, self.num_labels :].amax(1, keepdim=True)], dim=1)

    def resizing(self, cells: int, target: int) -> torch.Tensor:
        """(target, cells), what post-processing does along an axis: a resize to the input's size, then to `target`."""
        cell = torch.arange(cells)
        unit = (cell[:, None] == cell).float()[None, None]  # as in the side adapter, not torch.eye
        for side in (cells * self.model.config.patch_size, target):
            # In two dimensions, as exporters know it.
            unit = F.interpolate(unit, size=(cells, side), mode="bilinear", align_corners=False)
        return unit[0, 0].T


def size_rule(config: SANConfig) -> tuple[int, int]:
    """What the sides of an exported graph's images are multiples of, and the smallest side, both in pixels."""
    multiple, clip_patch = config.patch_size, cast(int, config.clip_vision_config.patch_size)
    side = multiple * SMALLEST_GRID
    while math.floor(side * config.clip_image_scale) < clip_patch * SMALLEST_GRID:
        side += multiple
    return multiple, side


def sample_inputs(form: OpenForm | ClosedForm, config: SANConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs to trace a form with, and which of their axes are dynamic."""
    multiple, smallest = size_rule(config)
    height, width = smallest + multiple, smallest + 3 * multiple
    inputs = {"pixel_values": torch.zeros(2, config.num_channels, height, width)}
    rows, columns = (Dim(name, min=smallest // multiple, max=LARGEST_SIDE // multiple) for name in ("rows", "columns"))
    shapes: dict[str, Any] = {"pixel_values": {0: Dim.DYNAMIC, 2: multiple * rows, 3: multiple * columns}}
    if isinstance(form, OpenForm):
        inputs["class_embeds"] = F.normalize(torch.ones(3, config.clip_embed_dim), dim=-1)
        shapes["class_embeds"] = {0: Dim.DYNAMIC}
    return inputs, shapes


@contextmanager
def traceable(model: SANForSemanticSegmentation) -> Iterator[None]:
    """The model for a block without its text tower, which no graph needs, and with LoRA merged into CLIP's layers."""
    with ExitStack() as stack:
        for name in ("text_model", "text_projection"):
            stack.callback(setattr, model, name, getattr(model, name))
            setattr(model, name, nn.Identity())
        for module in model.modules():
            layer: Any = module
            if hasattr(module, "lora_A") and not layer.merged:
                layer.merge()
                stack.callback(layer.unmerge)
        yield
