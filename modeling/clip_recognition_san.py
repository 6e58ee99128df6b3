"""CLIP's part of SAN: shallow feature maps out of, and mask recognition inside, a stock `CLIPVisionModel`.

This is the one file that knows CLIPVisionModel's inner parts. The original runs the deep layers on one sequence
[recognition tokens, class, patches] under a dense additive mask. In it the image tokens (class and patches) never see
the recognition tokens, and a recognition token sees the patches, with its bias, and itself. So the same function is a
plain pass of the image tokens plus one biased cross attention per layer, and that is what runs here: the stock layer
gets [class, patches, recognition] and does all its linear maps, norms and MLPs on it, while the attention function
registered below keeps the two groups apart. Nobody reads the last layer's image tokens: it gets the recognition tokens
alone, and the attention function adds the keys and values of the patches. Adapters, quantised linears and gradient
checkpointing of the layers work as ever, since no layer code is replaced.
Shapes: B images, Q queries, W CLIP's width, Hc x Wc CLIP's grid, N = Hc * Wc, h CLIP's heads.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip
from transformers.models.clip.modeling_clip import eager_attention_forward

from .fast_linear_san import attention_function
from .positions_san import PositionResizer


# A name for each copy of this code: checkpoints may bring their own.
RECOGNITION_ATTENTION = f"san_recognition of {__name__}"


def recognition_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    recognition_attentions: list[torch.Tensor] | None = None,
    patches: Callable[[], torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of a CLIP layer over [class, patches, R recognition tokens], or, of the last one, of the recognition
    tokens alone.

    Args:
        module: the layer's `CLIPAttention`.
        query, key, value: (B, h, 1 + N + R or R, head_dim).
        attention_mask: additive mask (B, h or 1, R, N + R) of the recognition tokens over [patches, recognition]. With
            None there are no recognition tokens and this is CLIP's own attention.
        scaling: factor of the dot products.
        dropout: dropout rate of the attention weights.
        recognition_attentions: a list to which the recognition tokens' weights (B, h, R, N + R) are appended.
        patches: where query, key and value are of the recognition tokens alone: gives the layer's normalised patch
            tokens (B, N, W).

    Returns:
        (B, 1 + N + R or R, h, head_dim), and no weights.
    """
    layer_config = cast(CLIPVisionConfig, module.config)  # made by `prepare_clip`
    implementation = layer_config.image_config._attn_implementation
    image_attention = attention_function(implementation)
    if attention_mask is None:
        return image_attention(module, query, key, value, None, scaling=scaling, dropout=dropout, **kwargs)
    outputs = []
    if patches is None:
        num_image_tokens = query.shape[2] - attention_mask.shape[2]
        image_tokens = (states[:, :, :num_image_tokens] for states in (query, key, value))
        output, _ = image_attention(module, *image_tokens, None, scaling=scaling, dropout=dropout, **kwargs)
        outputs.append(output)
        query, key, value = query[:, :, num_image_tokens:], key[:, :, 1:], value[:, :, 1:]
    else:
        states = patches()
        of_patches = (module.get_submodule(name)(states) for name in ("k_proj", "v_proj"))
        # (B, N, W) -> (B, h, N, head_dim)
        key, value = (
            torch.cat([part.unflatten(2, (-1, own.shape[-1])).transpose(1, 2), own], dim=2)
            for part, own in zip(of_patches, (key, value))
        )
    # Of the fused kernels only sdpa takes an arbitrary additive mask; only eager has weights to return.
    eager = implementation == "eager" or recognition_attentions is not None
    biased_attention = eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, weights = biased_attention(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    if recognition_attentions is not None:
        recognition_attentions.append(weights)
    return torch.cat([*outputs, output], dim=1), None


AttentionInterface.register(RECOGNITION_ATTENTION, recognition_attention_forward)


def prepare_clip(vision_model: CLIPVisionModel) -> None:
    """
    Makes the layers of a stock `CLIPVisionModel` use [`recognition_attention_forward`], and its embeddings
    [`CLIPVisionEmbeddings`], in place.

    Transformers picks a layer's attention function by its configuration. The layers get a copy that names ours and
    remembers the model's own (`image_config`), so that `set_attn_implementation` still decides how the image tokens
    attend, at any time. Where there are no recognition tokens, as in shallow layers, that is CLIP's own attention.
    """
    embeddings: Any = vision_model.embeddings
    if not isinstance(embeddings, CLIPVisionEmbeddings):
        embeddings.__class__, embeddings.resize = CLIPVisionEmbeddings, PositionResizer()
    layer_config: Any = copy.copy(vision_model.config)
    layer_config._attn_implementation = RECOGNITION_ATTENTION
    layer_config.image_config = vision_model.config
    for layer in vision_model.encoder.layers:
        layer.get_submodule("self_attn").config = layer_config


class CLIPVisionEmbeddings(modeling_clip.CLIPVisionEmbeddings):
    """
    CLIP's embedding of patches and positions, whose size no branch depends on: it exports for all sizes.

    It has the stock class's name, by which device maps and FSDP find it.
    """

    resize: PositionResizer

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Position embeddings of the class token and of the patches of an image: (1, 1 + Hc * Wc, W)."""
        positions = self.position_embedding.weight[None]
        patch_size = cast(int, self.patch_size)
        patches = self.resize(positions[:, 1:], (height // patch_size, width // patch_size))
        return torch.cat([positions[:, :1], patches], dim=1)


def encode_shallow(
    vision_model: CLIPVisionModel, pixel_values: torch.Tensor, recognition_layer: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Runs CLIP's shallow layers.

    Args:
        vision_model: the stock CLIP vision encoder.
        pixel_values: (B, channels, height, width), normalised; any size of at least one patch.
        recognition_layer: the number of shallow layers.

    Returns:
        The feature maps after layers 0 (the pre-layer-norm) to `recognition_layer`, each (B, W, Hc, Wc), and the
        last one's tokens (B, 1 + N, W), class token first.
    """
    embeddings = vision_model.embeddings
    patch_size = cast(int, embeddings.patch_size)
    grid = tuple(side // patch_size for side in pixel_values.shape[-2:])
    hidden_states = vision_model.pre_layrnorm(embeddings(pixel_values, interpolate_pos_encoding=True))
    feature_maps = []
    for layer in (None, *vision_model.encoder.layers[:recognition_layer]):
        if layer is not None:
            hidden_states = layer(hidden_states, None)
        feature_maps.append(hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid))
    return feature_maps, hidden_states


def max_pool(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    `F.adaptive_max_pool2d`: (B, C, Hs, Ws) -> (B, C, Hc, Wc).

    Exported programs have no such operator for sizes that they don't know yet. There, the windows' rows are gathered
    and then their columns, and the largest of each window is taken: equal to the bit, if slower.
    """
    if not torch.compiler.is_exporting():
        return F.adaptive_max_pool2d(maps, grid)
    for dim, out_size in zip((2, 3), grid):
        size = maps.shape[dim]
        window = torch.arange(out_size, device=maps.device)
        start, end = window * size // out_size, ((window + 1) * size + out_size - 1) // out_size
        steps = torch.arange((size + out_size - 1) // out_size + 1, device=maps.device)  # of the longest window
        inside = torch.minimum(start[:, None] + steps, end[:, None] - 1)  # shorter ones repeat their last
        maps = maps.index_select(dim, inside.flatten()).unflatten(dim, inside.shape).amax(dim + 1)
    return maps


def pool_attention_bias(attention_bias: torch.Tensor, grid: tuple[int, int], pooling: str) -> torch.Tensor:
    """Brings the attention bias (B, n, heads, Q, Hs, Ws) to CLIP's grid and flattens it: (B, n, heads, Q, N)."""
    # (B, n * heads * Q, Hs, Ws), channels last as the mask decoder makes them: there, stock pooling is 20 times faster.
    maps = attention_bias.permute(0, 4, 5, 1, 2, 3).flatten(3).permute(0, 3, 1, 2)
    if pooling == "max":
        maps = max_pool(maps, grid)
    elif pooling == "avg":
        maps = F.adaptive_avg_pool2d(maps, grid)
    elif pooling == "nearest":
        maps = F.interpolate(maps, size=grid, mode="nearest")
    else:
        maps = F.interpolate(maps, size=grid, mode=pooling, align_corners=False)
    return maps.flatten(2).unflatten(1, attention_bias.shape[1:4])


def recognize(
    vision_model: CLIPVisionModel,
    hidden_states: torch.Tensor,
    recognition_tokens: torch.Tensor,
    attention_bias: torch.Tensor,
    recognition_layer: int,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Runs CLIP's deep layers with recognition tokens beside the image's, each steered by its attention bias.

    Args:
        vision_model: the stock CLIP vision encoder, prepared by [`prepare_clip`].
        hidden_states: the tokens after the shallow layers, (B, 1 + N, W).
        recognition_tokens: (B, R, W). They are independent of each other, so those of several supervised layers can
            share the pass.
        attention_bias: (B, n, h or 1, R, N), n being 1 or the number of deep layers.
        recognition_layer: the number of shallow layers.
        output_attentions: whether to return the recognition tokens' attention weights.

    Returns:
        CLIP's post-layer-norm of the recognition tokens, (B, R, W); and for each deep layer, if asked for, the weights
        (B, h, R, N + R) over the patches and the recognition tokens.
    """
    num_tokens = recognition_tokens.shape[1]
    # Beside the patches, a recognition token sees itself only.
    token = torch.arange(num_tokens, device=attention_bias.device)
    itself = torch.where(token[:, None] == token, 0.0, float("-inf")).to(attention_bias.dtype)
    mask = torch.cat([attention_bias, itself.expand(*attention_bias.shape[:4], num_tokens)], dim=-1)
    masks = mask.to(hidden_states.dtype).unbind(1)  # n x (B, h or 1, R, N + R)

    recognition_attentions: list[torch.Tensor] = []
    kwargs: dict[str, Any] = {"recognition_attentions": recognition_attentions} if output_attentions else {}
    hidden_states = torch.cat([hidden_states, recognition_tokens], dim=1)
    layers = vision_model.encoder.layers[recognition_layer:]
    for i, layer in enumerate(layers):
        # Reentrant gradient checkpointing drops the gradients of keyword arguments: so the mask goes by position, and a
        # last layer that is checkpointed gets all tokens as the others do.
        is_checkpointed = layer.training and layer.gradient_checkpointing
        if layer is layers[-1] and not is_checkpointed:
            kwargs["patches"] = partial(layer.get_submodule("layer_norm1"), hidden_states[:, 1:-num_tokens])
            hidden_states = hidden_states[:, -num_tokens:]
        hidden_states = layer(hidden_states, masks[i % len(masks)], **kwargs)
    recognized = vision_model.post_layernorm(hidden_states[:, -num_tokens:])
    return recognized, recognition_attentions
