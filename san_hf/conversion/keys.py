"""The original's state-dict layout, told as one table that is read in both directions.

Every tensor the original stores is one `Entry`: its name there, our name or names for it, and how its shape is told.
Converting walks the table one way, exporting the other, so the two can't drift apart.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from san_hf.modeling import SANConfig

from .errors import ConversionError


# Stored by the original, but follow from something else: the class weights of its criterion, and the causal mask of
# its text tower.
EMPTY_WEIGHT = "criterion.empty_weight"
ATTENTION_MASK = "ov_classifier.attn_mask"
LOGIT_SCALE = "ov_classifier.logit_scale"

# What the original registers for its images, (3, 1, 1), red first, for values 0..255; detectron2 stores it on request.
PIXEL_SCALE = {"pixel_mean": OPENAI_CLIP_MEAN, "pixel_std": OPENAI_CLIP_STD}


class Entry(NamedTuple):
    """One tensor of the original.

    original: its name there.
    ours: our name; three names where the original stacks query, key and value in one tensor.
    form: "same"; "stack" (three of ours, concatenated along the first axis); "transpose" (input x output, where a
        Linear has output x input); "conv1x1" (a 1x1 convolution's (out, in, 1, 1), where we have a Linear);
        "sequence_first" (tokens, 1, width, where we have 1, tokens, width).
    """

    original: str
    ours: tuple[str, ...]
    form: str = "same"

    def to_ours(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.form == "stack":
            return list(tensor.chunk(len(self.ours)))
        if self.form == "transpose":
            return [tensor.t()]
        if self.form == "conv1x1":
            return [tensor.flatten(1)]
        if self.form == "sequence_first":
            return [tensor.transpose(0, 1)]
        return [tensor]

    def to_original(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if self.form == "stack":
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.form == "transpose":
            return tensor.t()
        if self.form == "conv1x1":
            return tensor[..., None, None]
        if self.form == "sequence_first":
            return tensor.transpose(0, 1)
        return tensor


def layout(config: SANConfig) -> list[Entry]:
    """Every tensor that the original stores for a model of this configuration, but for the two it could compute.

    Raises:
        ConversionError: the original can't be built so.
    """
    if not config.num_bias_layers:
        raise ConversionError("The original has no model without an attention bias (num_bias_layers 0).")
    return [*_side_adapter(config), *_clip_vision(config), *_clip_text(config)]


def pixel_scale_problems(original: dict[str, torch.Tensor]) -> list[str]:
    """Takes the scale of images out of the original's state dict; where it isn't our processor's, says so."""
    problems = []
    for key, values in PIXEL_SCALE.items():
        if (tensor := original.pop(key, None)) is not None:
            expected = 255 * torch.tensor(values)
            # As near as bfloat16 stores them.
            found = tensor.flatten().float()
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1 / 256, atol=0):
                got = [round(value, 3) for value in found[:4].tolist()]
                problems.append(f"{key} (got {got}, expected CLIP's {[round(x, 3) for x in expected.tolist()]})")
    return problems


def _pair(original: str, ours: str, weight_form: str = "same") -> Iterator[Entry]:
    """The weight and the bias of one layer."""
    yield Entry(f"{original}.weight", (f"{ours}.weight",), weight_form)
    yield Entry(f"{original}.bias", (f"{ours}.bias",))


def _side_adapter(config: SANConfig) -> Iterator[Entry]:
    original, ours = "side_adapter_network", "model.side_adapter"
    yield Entry(f"{original}.query_embed", (f"{ours}.query_tokens",))
    yield Entry(f"{original}.query_pos_embed", (f"{ours}.query_position_embeddings",))
    yield Entry(f"{original}.vit_model.pos_embed", (f"{ours}.position_embeddings",))
    yield from _pair(f"{original}.vit_model.patch_embed.proj", f"{ours}.patch_embedding")
    for index in range(config.num_hidden_layers):
        block, layer = f"{original}.vit_model.blocks.{index}", f"{ours}.layers.{index}"
        yield from _pair(f"{block}.norm1", f"{layer}.norm1")
        yield from _pair(f"{block}.attn.qkv", f"{layer}.attention.qkv")
        yield from _pair(f"{block}.attn.proj", f"{layer}.attention.proj")
        yield from _pair(f"{block}.norm2", f"{layer}.norm2")
        yield from _pair(f"{block}.mlp.fc1", f"{layer}.mlp.fc1")
        yield from _pair(f"{block}.mlp.fc2", f"{layer}.mlp.fc2")
    for _, index in config.fusion_layers:
        fusion = f"{original}.fusion_layers.layer_{index}.input_proj"
        yield from _pair(f"{fusion}.0", f"{ours}.fusions.{index}.norm")
        yield from _pair(f"{fusion}.1", f"{ours}.fusions.{index}.proj", "conv1x1")

    original, ours = f"{original}.mask_decoder", "model.mask_decoder"
    for index in range(config.decoder_num_layers):
        yield from _pair(f"{original}.query_mlp.layers.{index}", f"{ours}.query_mlp.layers.{index}")
        yield from _pair(f"{original}.pix_mlp.layers.{index}", f"{ours}.pixel_mlp.layers.{index}", "conv1x1")
        yield from _pair(f"{original}.attn_mlp.layers.{index}", f"{ours}.attention_mlp.layers.{index}", "conv1x1")
    if config.rescale_attention_bias:
        yield from _pair(f"{original}.bias_scaling", f"{ours}.bias_scaling")


def _clip_layer(original: str, ours: str) -> Iterator[Entry]:
    """One transformer layer of either tower, as OpenAI's CLIP names it."""
    yield from _pair(f"{original}.ln_1", f"{ours}.layer_norm1")
    for part in ("weight", "bias"):
        projections = tuple(f"{ours}.self_attn.{letter}_proj.{part}" for letter in "qkv")
        yield Entry(f"{original}.attn.in_proj_{part}", projections, "stack")
    yield from _pair(f"{original}.attn.out_proj", f"{ours}.self_attn.out_proj")
    yield from _pair(f"{original}.ln_2", f"{ours}.layer_norm2")
    yield from _pair(f"{original}.mlp.c_fc", f"{ours}.mlp.fc1")
    yield from _pair(f"{original}.mlp.c_proj", f"{ours}.mlp.fc2")


def _clip_vision(config: SANConfig) -> Iterator[Entry]:
    original, ours = "clip_visual_extractor", "model.vision_model"
    yield Entry(f"{original}.class_embedding", (f"{ours}.embeddings.class_embedding",))
    yield Entry(f"{original}.positional_embedding", (f"{ours}.embeddings.position_embedding.weight",))
    yield Entry(f"{original}.conv1.weight", (f"{ours}.embeddings.patch_embedding.weight",))
    yield from _pair(f"{original}.ln_pre", f"{ours}.pre_layrnorm")
    for index in range(config.clip_vision_config.num_hidden_layers):
        # The original cuts the tower in two and counts the deep layers from 0 again.
        deep = index - config.recognition_layer
        block = f"{original}.resblocks.{index}" if deep < 0 else f"clip_rec_head.resblocks.{deep}"
        yield from _clip_layer(block, f"{ours}.encoder.layers.{index}")
    yield from _pair("clip_rec_head.ln_post", f"{ours}.post_layernorm")
    yield Entry("clip_rec_head.proj", ("model.visual_projection.weight",), "transpose")
    if "learned" in config.recognition_token:
        yield Entry("clip_rec_head.sos_token", ("model.recognition_tokens",), "sequence_first")


def _clip_text(config: SANConfig) -> Iterator[Entry]:
    original, ours = "ov_classifier", "text_model"
    yield Entry(f"{original}.token_embedding.weight", (f"{ours}.embeddings.token_embedding.weight",))
    yield Entry(f"{original}.positional_embedding", (f"{ours}.embeddings.position_embedding.weight",))
    for index in range(config.clip_text_config.num_hidden_layers):
        yield from _clip_layer(f"{original}.transformer.resblocks.{index}", f"{ours}.encoder.layers.{index}")
    yield from _pair(f"{original}.ln_final", f"{ours}.final_layer_norm")
    yield Entry(f"{original}.text_projection", ("text_projection.weight",), "transpose")
    yield Entry(LOGIT_SCALE, ("logit_scale",))
    yield Entry(f"{original}.bg_embed", ("no_object_embed",))
