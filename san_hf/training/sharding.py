"""Engines that spread a model over processes, FSDP and DeepSpeed's ZeRO: what they need of a SAN, and a SAN back."""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from san_hf.modeling import SANForSemanticSegmentation

from .config import ConfigError
from .processes import processes_started


# What `accelerate launch` sets for an engine that was asked for, and how Accelerate calls the engine in force.
ENGINES = {
    "ACCELERATE_USE_FSDP": ("FSDP", DistributedType.FSDP),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", DistributedType.DEEPSPEED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", DistributedType.MEGATRON_LM),
}


def check_engine(accelerator: Accelerator) -> None:
    """
    Raises:
        ConfigError: an engine was asked for and is not in force, or is none that a SAN trains with.
    """
    joined = processes_started() in (None, accelerator.num_processes)
    for variable, (name, engine) in ENGINES.items():
        asked_for = os.environ.get(variable, "").lower() == "true"
        if asked_for and not (joined and accelerator.distributed_type == engine):
            raise ConfigError(
                f"{name} was asked for ({variable}=true), but Accelerate doesn't use it here: it trains in "
                f"{accelerator.num_processes} process(es) on the device {accelerator.device.type}, and spreads a model "
                "over several GPUs only. Leave it out (accelerate config, or the options of accelerate launch): "
                "without it, each process holds the whole model."
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1 and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
            # Accelerate (1.15) reads the optimiser's states into those that it has, which are none before its first
            # step: a resumed run would go on without them.
            raise ConfigError(
                f"FSDP1 was asked for with {plugin.state_dict_type.name}, whose optimiser doesn't come back when a run "
                "is resumed: choose FULL_STATE_DICT (fsdp_state_dict_type in Accelerate's configuration, "
                "--fsdp_state_dict_type, or FSDP_STATE_DICT_TYPE), or FSDP2 (fsdp_version: 2, --fsdp_version 2, or "
                "FSDP_VERSION=2)."
            )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ConfigError("Megatron-LM was asked for, which has no SAN: choose DDP, FSDP or DeepSpeed instead.")


def is_spread(accelerator: Accelerator) -> bool:
    """Whether an engine spreads the model's weights over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def keep_loading_whole(accelerator: Accelerator) -> None:
    """
    Has every process load and build whole models, which the engine takes apart when it prepares them.

    Transformers would leave the model empty in all processes but the first (FSDP's `cpu_ram_efficient_loading`), or
    spread it while it is made (DeepSpeed's `zero.Init`); but the class names are encoded by it before training.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()


def prepare_for_engine(
    accelerator: Accelerator, model: SANForSemanticSegmentation, batch_size: int, max_grad_norm: float | None
) -> None:
    """
    Makes a model, and the engine's settings, fit each other. Before the optimiser is made.

    Args:
        accelerator: its engine; nothing is done where each process holds the whole model.
        model: what is to be trained.
        batch_size: images of a process and forward pass.
        max_grad_norm: norm that the gradient is clipped at; None for no clipping.

    Raises:
        ConfigError: the engine's own configuration says otherwise.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    give_temperature_a_dimension(model)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
            # CLIP reads some weights without calling their module, which alone would gather them.
            raise ConfigError(
                "FSDP was told to wrap modules by their size (SIZE_BASED_WRAP), which takes apart what belongs "
                "together: choose TRANSFORMER_BASED_WRAP, and no classes for it, which takes SAN's own."
            )
        if plugin.fsdp_version == 1:
            # Else FSDP1 joins frozen and trained weights, and the optimiser holds what the model has no longer.
            plugin.use_orig_params = True
    else:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        # DeepSpeed clips by itself, before Accelerate is asked to; 0 is no clipping.
        _settle(settings, "gradient_clipping", max_grad_norm or 0.0, "optimizer.max_grad_norm")
        _settle(
            settings, "train_micro_batch_size_per_gpu", batch_size, "training.batch_size, over processes and parts,"
        )
        # So that the whole model can be had back.
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def give_temperature_a_dimension(model: SANForSemanticSegmentation) -> None:
    """A tensor without dimensions can't be spread; [`whole_model`] and `save_pretrained` take it away again."""
    # The same parameter: an optimiser may have it already.
    model.logit_scale.data = model.logit_scale.data.reshape(1)


def whole_model(accelerator: Accelerator, model: nn.Module) -> SANForSemanticSegmentation:
    """The model without what training wraps around it; a copy where its weights are spread over processes."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    state = accelerator.get_state_dict(model)  # of the main process
    whole = SANForSemanticSegmentation(accelerator.unwrap_model(model).config).to(accelerator.device)
    for name, tensor in whole.state_dict().items():
        if accelerator.is_main_process:
            tensor.copy_(state[name].reshape(tensor.shape))
        tensor.copy_(broadcast(tensor))
    return whole


def _settle(settings: dict[str, Any], key: str, value: float, ours: str) -> None:
    """Tells DeepSpeed a value that its own configuration leaves open, or has to agree with."""
    given = settings.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(f"DeepSpeed's configuration has {key} {given}, but {ours} makes it {value}: set it to auto.")
    settings[key] = value
