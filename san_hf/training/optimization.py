"""Parameter groups of the optimiser, and the learning rate schedule."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_polynomial_decay_schedule_with_warmup

from san_hf.modeling import SANPreTrainedModel


# Not decayed: norms and embeddings (these modules), and parameters of these names, which are embeddings of positions
# or single tokens that belong to no such module, and CLIP's temperature.
UNDECAYED_MODULES = (nn.LayerNorm, nn.Embedding)
UNDECAYED_NAMES = (
    "query_tokens",
    "query_position_embeddings",
    "position_embeddings",
    "class_embedding",
    "logit_scale",
)


def parameter_groups(
    model: nn.Module, weight_decay: float = 1e-4, clip_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """
    The trainable parameters of a SAN, in groups for AdamW or any other optimiser.

    Norms and position and query embeddings are not decayed; all else is, biases included. What is frozen is left out,
    so that a model with LoRA layers, or with `freeze_clip=False`, needs nothing else.

    Args:
        model: a SAN, before it is wrapped for several devices.
        weight_decay: of the parameters that are decayed.
        clip_learning_rate: learning rate of CLIP's own parameters (`None` for the optimiser's). It matters for
            `freeze_clip=False`, as pretrained weights want smaller steps than new ones.

    Returns:
        Dictionaries with `params` (a list, in the model's order), `weight_decay`, and, for CLIP's parameters if
        `clip_learning_rate` is given, `lr`. No group is empty, and no parameter is in two.

    Raises:
        ValueError: nothing is trainable.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, module, parameter in _trainable_parameters(model):
        undecayed = isinstance(module, UNDECAYED_MODULES) or name.rpartition(".")[2] in UNDECAYED_NAMES
        group = {"weight_decay": 0.0 if undecayed else weight_decay}
        if clip_learning_rate is not None and SANPreTrainedModel.is_clip_parameter(name):
            group["lr"] = clip_learning_rate
        groups.setdefault(tuple(group.items()), {"params": [], **group})["params"].append(parameter)
    if not groups:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    return list(groups.values())


def polynomial_schedule(
    optimizer: Optimizer, num_training_steps: int, power: float = 0.9, warmup_steps: int = 0
) -> LRScheduler:
    """
    A learning rate that falls from the optimiser's to zero as (1 - step / num_training_steps) ** power.

    Args:
        optimizer: whose groups each keep their own initial learning rate, and all follow the same course.
        num_training_steps: number of optimiser steps of the whole training.
        power: 0.9 in the paper.
        warmup_steps: steps of linear growth from zero before that; the fall then takes the steps that are left.
    """
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup_steps, num_training_steps, lr_end=0.0, power=power
    )


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each trainable parameter once, with its name and the module that it belongs to."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, model.get_submodule(name.rpartition(".")[0]), parameter
