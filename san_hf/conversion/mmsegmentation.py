"""mmsegmentation's port of SAN: its tensors under the original's names.

What it calls its modules was looked up in open-mmlab/mmsegmentation (Apache 2.0): tools/model_converters/san2mmseg.py
and clip2mmseg.py, mmseg/models/decode_heads/san_head.py and text_encoder/clip_text_encoder.py.
"""

import re

import torch


PREFIXES = ("image_encoder.", "text_encoder.", "decode_head.")
# Every decode head of mmsegmentation has this layer; SAN's doesn't use it.
UNUSED = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")

_ADAPTER = r"decode_head\.side_adapter_network\."
# The first that matches the start of a name is replaced.
_MODULES = (
    (r"image_encoder\.cls_token$", "clip_visual_extractor.class_embedding"),
    (r"image_encoder\.pos_embed$", "clip_visual_extractor.positional_embedding"),
    (r"image_encoder\.patch_embed\.projection\.", "clip_visual_extractor.conv1."),
    (r"image_encoder\.layers\.", "clip_visual_extractor.resblocks."),
    (r"image_encoder\.", "clip_visual_extractor."),
    (r"decode_head\.rec_with_attnbias\.proj\.weight$", "clip_rec_head.proj"),
    (r"decode_head\.rec_with_attnbias\.layers\.", "clip_rec_head.resblocks."),
    (r"decode_head\.rec_with_attnbias\.", "clip_rec_head."),
    (_ADAPTER + r"encode_layers\.", "side_adapter_network.vit_model.blocks."),
    (_ADAPTER + r"pos_embed$", "side_adapter_network.vit_model.pos_embed"),
    (_ADAPTER + r"patch_embed\.projection\.", "side_adapter_network.vit_model.patch_embed.proj."),
    (_ADAPTER + r"conv_clips\.(\d+)\.0\.", r"side_adapter_network.fusion_layers.layer_\1.input_proj.0."),
    (_ADAPTER + r"conv_clips\.(\d+)\.1\.conv\.", r"side_adapter_network.fusion_layers.layer_\1.input_proj.1."),
    (_ADAPTER, "side_adapter_network."),
    (r"text_encoder\.transformer\.(?=\d)", "ov_classifier.transformer.resblocks."),
    (r"text_encoder\.", "ov_classifier."),
)
# Parts of a transformer layer: of CLIP's shallow layers ("ln1"), of its deep ones and the text tower ("norms.0").
_CLIP_PARTS = (
    (r"(ln1|norms\.0)\.", "ln_1."),
    (r"(ln2|norms\.1)\.", "ln_2."),
    (r"(attn|attentions\.0)\.attn\.", "attn."),
    (r"ffns?(\.0)?\.layers\.0\.0\.", "mlp.c_fc."),
    (r"ffns?(\.0)?\.layers\.1\.", "mlp.c_proj."),
)
_ADAPTER_PARTS = (
    (r"ln1\.", "norm1."),
    (r"ln2\.", "norm2."),
    (r"attn\.attn\.in_proj_", "attn.qkv."),
    (r"attn\.attn\.out_proj\.", "attn.proj."),
    (r"ffn\.layers\.0\.0\.", "mlp.fc1."),
    (r"ffn\.layers\.1\.", "mlp.fc2."),
)


def original_name(name: str) -> str:
    """The original's name of a tensor of mmsegmentation; a name that neither of the two has stays as it is."""
    name = _replace_start(name, _MODULES)
    if layer := re.match(r"(side_adapter_network\.vit_model\.blocks\.\d+\.|.*\.resblocks\.\d+\.)(.*)", name):
        parts = _ADAPTER_PARTS if name.startswith("side_adapter_network.") else _CLIP_PARTS
        name = layer[1] + _replace_start(layer[2], parts)
    return name


def original_form(theirs: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the original stores it, by mmsegmentation's name: a few have other axes there."""
    name = original_name(theirs)
    if name == "clip_visual_extractor.class_embedding" and tensor.shape[:2] == (1, 1):
        return tensor[0, 0]  # (1, 1, width)
    if name == "clip_visual_extractor.positional_embedding" and tensor.dim() == 3 and len(tensor) == 1:
        return tensor[0]  # (1, positions, width)
    if name == "clip_rec_head.proj" and theirs.endswith(".weight") and tensor.dim() == 2:
        return tensor.t()  # a Linear's: output x input
    return tensor


def _replace_start(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name
