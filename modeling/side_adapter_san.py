"""The side adapter network: a light ViT beside CLIP that proposes masks and predicts CLIP's attention biases.

It is the left half of the paper's figure 2: [`SideAdapter`] turns the image and CLIP's shallow feature maps into query
and patch tokens, [`MaskDecoder`] turns those into mask logits and attention biases.
Shapes: B images, Q queries, Ca the adapter's width, Hs x Ws its grid (image / patch size), W CLIP's width, Hc x Wc
CLIP's grid, h CLIP's heads, n bias layers.
"""

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_san import SANConfig
from .fast_linear_san import attention_function
from .positions_san import PositionResizer


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def starting_uniform(layer: Layer, weight: float, bias: float) -> Layer:
    """
    The layer, marked to start (in `_init_weights`) uniformly within these bounds in multiples of 1 / sqrt(fan in),
    weight and bias alike, and not with the normal weights and zero biases of the adapter's other layers.
    """
    marked: Any = layer
    scale = layer.weight[0].numel() ** -0.5
    marked.initial_bounds = (weight * scale, bias * scale)
    return layer


class SideAdapterAttention(nn.Module):
    """Multi-head self-attention over the adapter's tokens."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, num_tokens, _ = hidden_states.shape
        # (B, T, 3 Ca) -> 3 x (B, heads, T, head_dim)
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Only eager attention has weights to return.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attention = attention_function(implementation)
        attended, weights = attention(self, query, key, value, None, scaling=self.scaling)  # (B, T, heads, head_dim)
        return self.proj(attended.reshape(batch_size, num_tokens, -1)), weights


class SideAdapterMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SideAdapterDropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for a whole image with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return hidden_states * keep / (1 - self.rate)


class SideAdapterLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: SANConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SideAdapterAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SideAdapterMLP(config)
        self.drop_path = SideAdapterDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(self.norm1(hidden_states), output_attentions)
        hidden_states = hidden_states + self.drop_path(attended)
        hidden_states = hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))
        return hidden_states, weights


class SideAdapterFusion(nn.Module):
    """Brings a CLIP feature map to the adapter's width and grid, to be added to its patch tokens."""

    def __init__(self, config: SANConfig):
        super().__init__()
        clip_width = config.clip_vision_config.hidden_size
        self.norm = nn.LayerNorm(clip_width, eps=config.layer_norm_eps)
        self.proj = starting_uniform(nn.Linear(clip_width, config.hidden_size), weight=3**0.5, bias=0.0)

    def forward(self, clip_feature_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, W, Hc, Wc) -> (B, Hs * Ws, Ca)."""
        # Tokens (B, Hc * Wc, W) rather than maps: 8-bit linear layers take three dimensions at most.
        projected = self.proj(self.norm(clip_feature_map.flatten(2).transpose(1, 2))).transpose(1, 2)
        projected = projected.unflatten(2, clip_feature_map.shape[-2:])
        resized = F.interpolate(projected, size=grid, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


class SideAdapter(nn.Module):
    """Query tokens and patch tokens through a ViT into which CLIP's shallow feature maps are fused."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.config = config
        patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.patch_embedding = starting_uniform(patch_embedding, weight=1.0, bias=1.0)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.query_position_embeddings = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.position_embeddings = nn.Parameter(
            torch.empty(1, (config.image_size // config.patch_size) ** 2, config.hidden_size)
        )
        self.resize = PositionResizer()
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            SideAdapterLayer(config, config.drop_path_rate * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.clip_layer_of = {adapter_layer: clip_layer for clip_layer, adapter_layer in config.fusion_layers}
        self.fusions = nn.ModuleDict({str(layer): SideAdapterFusion(config) for layer in self.clip_layer_of})

    def embed_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings of the queries and of the patches on `grid`: (1, Q + Hs * Ws, Ca)."""
        return torch.cat([self.query_position_embeddings, self.resize(self.position_embeddings, grid)], dim=1)

    def fuse(
        self, layer: int, hidden_states: torch.Tensor, clip_feature_maps: list[torch.Tensor], grid: tuple[int, int]
    ) -> torch.Tensor:
        """Adds the CLIP feature map that belongs to `layer`, if any, to the patch tokens."""
        if layer not in self.clip_layer_of:
            return hidden_states
        clip_tokens = self.fusions[str(layer)](clip_feature_maps[self.clip_layer_of[layer]], grid)
        queries, patches = hidden_states.split([self.config.num_queries, grid[0] * grid[1]], dim=1)
        return torch.cat([queries, patches + clip_tokens], dim=1)

    def forward(
        self, pixel_values: torch.Tensor, clip_feature_maps: list[torch.Tensor], output_attentions: bool = False
    ) -> tuple[list[torch.Tensor], tuple[int, int], list[torch.Tensor]]:
        """
        Args:
            pixel_values: (B, channels, height, width), normalised.
            clip_feature_maps: CLIP's maps after layers 0..recognition_layer, each (B, W, Hc, Wc).
            output_attentions: whether to return the attention weights, too (computed by the eager implementation).

        Returns:
            The tokens before block 1 and after each block, each (B, Q + Hs * Ws, Ca), queries first; the grid
            (Hs, Ws); and the attention weights, each (B, heads, Q + Hs * Ws, Q + Hs * Ws), if asked for.
        """
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (B, Ca, Hs, Ws)
        grid = (patches.shape[2], patches.shape[3])
        queries = self.query_tokens.expand(patches.shape[0], -1, -1)
        positions = self.embed_positions(grid)

        hidden_states = torch.cat([queries, patches.flatten(2).transpose(1, 2)], dim=1) + positions
        hidden_states = self.fuse(0, hidden_states, clip_feature_maps, grid)
        all_hidden_states, all_attentions = [hidden_states], []
        for i, layer in enumerate(self.layers, start=1):
            if i > 1:
                hidden_states = hidden_states + positions
            hidden_states, attentions = layer(hidden_states, output_attentions)
            hidden_states = self.fuse(i, hidden_states, clip_feature_maps, grid)
            all_hidden_states.append(hidden_states)
            all_attentions.append(attentions)
        return all_hidden_states, grid, all_attentions if output_attentions else []


class MaskDecoderMLP(nn.Module):
    """Linear layers with ReLU between them, over the last dimension."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            starting_uniform(nn.Linear(i, o), weight=1.0, bias=1.0) for i, o in zip(dims[:-1], dims[1:])
        )

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All layers but the last."""
        for layer in self.layers[:-1]:
            hidden_states = F.relu(layer(hidden_states))
        return hidden_states

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[-1](self.encode(hidden_states))


class AttentionBiasScaling(nn.Module):
    """
    One scale and one offset for all attention biases: a 1-to-1 linear layer on every single value, written so that it
    costs no (..., 1) matrix product and that no quantiser takes it for one.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, attention_bias: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, attention_bias, self.weight)


class MaskDecoder(nn.Module):
    """Reads mask logits and attention biases off the adapter's tokens: queries meet pixels in an inner product."""

    def __init__(self, config: SANConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.num_bias_layers = config.num_bias_layers
        self.num_bias_heads = config.num_bias_heads or config.clip_vision_config.num_attention_heads
        dim, hidden_dim, num_layers = config.mask_embed_dim, config.decoder_hidden_size, config.decoder_num_layers
        self.query_mlp = MaskDecoderMLP(config.hidden_size, hidden_dim, dim, num_layers)
        self.pixel_mlp = MaskDecoderMLP(config.hidden_size, hidden_dim, dim, num_layers)
        self.attention_mlp = self.bias_scaling = None
        if self.num_bias_layers:
            self.attention_mlp = MaskDecoderMLP(
                config.hidden_size, hidden_dim, dim * self.num_bias_layers * self.num_bias_heads, num_layers
            )
            if config.rescale_attention_bias:
                self.bias_scaling = AttentionBiasScaling()

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (B, Q + Hs * Ws, Ca), queries first.
            grid: (Hs, Ws).

        Returns:
            Mask logits (B, Q, Hs, Ws) and attention bias (B, n, heads, Q, Hs, Ws), heads being h or 1. Without a bias
            (num_bias_layers 0) it is zeros of shape (B, 1, 1, Q, Hs, Ws).
        """
        queries, patches = hidden_states.split([self.num_queries, grid[0] * grid[1]], dim=1)
        query_embeds = self.query_mlp(queries)  # (B, Q, c)
        mask_logits = query_embeds @ self.pixel_mlp(patches).transpose(1, 2)  # (B, Q, Hs * Ws)
        if self.attention_mlp is None:
            return mask_logits.unflatten(-1, grid), torch.zeros_like(mask_logits)[:, None, None].unflatten(-1, grid)
        attention_bias = self.predict_attention_bias(query_embeds, patches)  # (B, Hs * Ws, n * heads * Q)
        if self.bias_scaling is not None:
            attention_bias = self.bias_scaling(attention_bias)
        attention_bias = attention_bias.unflatten(2, (self.num_bias_layers, self.num_bias_heads, self.num_queries))
        return mask_logits.unflatten(-1, grid), attention_bias.permute(0, 2, 3, 4, 1).unflatten(-1, grid)

    def predict_attention_bias(self, query_embeds: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """
        Inner products of the queries (B, Q, c) with `attention_mlp`'s features of the patches (B, Hs * Ws, Ca), in each
        bias layer and head: (B, Hs * Ws, n * heads * Q).

        The n * heads * c features of each patch are far more than the values that its last layer makes them of. As that
        layer is linear, the queries meet its weights instead, and the products meet the values. The weights are read
        off as what it makes of the unit vectors, so that any linear layer will do: one with LoRA, an 8-bit one, one
        whose weights are elsewhere until it is called.
        """
        attention_mlp = cast(MaskDecoderMLP, self.attention_mlp)
        hidden_states = attention_mlp.encode(patches)  # (B, Hs * Ws, c')
        dim = hidden_states.shape[-1]
        # Not torch.eye, of which exporters make comparisons of unsigned 16-bit integers, which few runtimes know.
        channel = torch.arange(dim + 1, device=hidden_states.device)
        unit_vectors = (channel[:, None] == channel[:dim]).to(hidden_states.dtype)  # and zero
        features = attention_mlp.layers[-1](unit_vectors).unflatten(1, (-1, query_embeds.shape[-1]))
        weights, offset = features[:-1] - features[-1], features[-1:]  # (c' and 1, n * heads, c)
        weights, offset = (torch.einsum("bqc,dnc->bdnq", query_embeds, part).flatten(2) for part in (weights, offset))
        return torch.baddbmm(offset, hidden_states, weights)
