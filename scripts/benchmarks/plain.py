"""SAN as the paper's figure and the original's code have it, step by step: what it costs without any of our short cuts.

It runs on the weights of our model, and gives the same results. What it does that ours does not: one sequence
[recognition, class, patches] under a dense additive mask for each supervised layer, eager attention, an attention
feature for each bias head and channel, 77 tokens for each prompt, masks of all queries and scores of all classes at
every pixel. `inference.py` measures against it.
Shapes: B images, Q queries, C classes, D CLIP's joint width, W its vision width, Hc x Wc its grid, N = Hc * Wc, h its
heads; Ca the side adapter's width, Hs x Ws its grid, c the mask decoder's width, n bias layers.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from san_hf.modeling import SANForSemanticSegmentation, SANModel


# In the additive mask: far below what a softmax keeps.
MASKED = -100.0


def attention(query, key, value, num_heads: int, mask=None) -> torch.Tensor:
    """Multi-head attention of (B, T, width) tensors, weights and all; `mask` is added to the scaled dot products."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, heads, T, T)
    if mask is not None:
        weights = weights + mask
    return (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)


def clip_layer(layer, tokens: torch.Tensor, mask=None) -> torch.Tensor:
    """A layer of CLIP's, by its own linear maps and norms, on tokens (B, T, width)."""
    normed, attends = layer.layer_norm1(tokens), layer.self_attn
    qkv = (project(normed) for project in (attends.q_proj, attends.k_proj, attends.v_proj))
    tokens = tokens + attends.out_proj(attention(*qkv, attends.num_heads, mask))
    return tokens + layer.mlp(layer.layer_norm2(tokens))


def as_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, channels) -> (B, channels, *grid)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def pointwise(layer, maps: torch.Tensor) -> torch.Tensor:
    """A linear map as a 1x1 convolution of maps (B, channels, height, width)."""
    return F.conv2d(maps, layer.weight[..., None, None], layer.bias)


def shallow_clip(model: SANModel, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """CLIP's maps (B, W, Hc, Wc) after layers 0 to `recognition_layer`, and its class token (B, 1, W) there."""
    config, vision = model.config, model.vision_model
    if config.clip_image_scale != 1.0:
        pixel_values = F.interpolate(
            pixel_values, scale_factor=float(config.clip_image_scale), mode="bilinear", align_corners=False
        )
    patch = config.clip_vision_config.patch_size
    grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
    tokens = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
    maps = [as_map(tokens[:, 1:], grid)]
    for layer in vision.encoder.layers[: config.recognition_layer]:
        tokens = clip_layer(layer, tokens)
        maps.append(as_map(tokens[:, 1:], grid))
    return maps, tokens[:, :1]


def side_adapter(model: SANModel, pixel_values: torch.Tensor, clip_maps: list[torch.Tensor]) -> list:
    """Queries (B, Q, Ca) and patches (B, Ca, Hs, Ws) before the first block and after each."""
    config, adapter = model.config, model.side_adapter
    patches = adapter.patch_embedding(pixel_values)
    grid = (patches.shape[-2], patches.shape[-1])
    side = config.image_size // config.patch_size
    positions = as_map(adapter.position_embeddings, (side, side))
    if grid != (side, side):
        positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
    positions = torch.cat([adapter.query_position_embeddings, positions.flatten(2).transpose(1, 2)], 1)
    clip_layer_of = {block: layer for layer, block in config.fusion_layers}

    def fuse(block: int, tokens: torch.Tensor) -> torch.Tensor:
        if block not in clip_layer_of:
            return tokens
        fusion = adapter.fusions[str(block)]
        normed = fusion.norm(clip_maps[clip_layer_of[block]].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        fused = F.interpolate(pointwise(fusion.proj, normed), size=grid, mode="bilinear", align_corners=False)
        queries, patches = tokens.split([config.num_queries, grid[0] * grid[1]], 1)
        return torch.cat([queries, patches + fused.flatten(2).transpose(1, 2)], 1)

    queries = adapter.query_tokens.expand(len(patches), -1, -1)
    tokens = fuse(0, torch.cat([queries, patches.flatten(2).transpose(1, 2)], 1) + positions)
    states = [tokens]
    for number, layer in enumerate(adapter.layers, start=1):
        qkv = layer.attention.qkv(layer.norm1(tokens)).chunk(3, -1)
        tokens = tokens + layer.attention.proj(attention(*qkv, config.num_attention_heads))
        tokens = fuse(number, tokens + layer.mlp(layer.norm2(tokens)))
        states.append(tokens)
        tokens = tokens + positions  # again before each block
    return [(state[:, : config.num_queries], as_map(state[:, config.num_queries :], grid)) for state in states]


def mask_decoder(model: SANModel, queries: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits (B, Q, Hs, Ws) and attention biases (B, n, heads, Q, Hs, Ws)."""
    decoder = model.mask_decoder

    def pixel_mlp(mlp, maps: torch.Tensor) -> torch.Tensor:
        for layer in mlp.layers[:-1]:
            maps = F.relu(pointwise(layer, maps))
        return pointwise(mlp.layers[-1], maps)

    embeds = decoder.query_mlp(queries)  # (B, Q, c)
    mask_logits = torch.einsum("bqc,bchw->bqhw", embeds, pixel_mlp(decoder.pixel_mlp, patches))
    features = pixel_mlp(decoder.attention_mlp, patches)  # (B, n * heads * c, Hs, Ws)
    features = features.unflatten(1, (decoder.num_bias_layers, decoder.num_bias_heads, embeds.shape[-1]))
    bias = torch.einsum("bqc,blnchw->blnqhw", embeds, features)
    if (scaling := decoder.bias_scaling) is not None:
        bias = F.linear(bias[..., None], scaling.weight, scaling.bias)[..., 0]
    return mask_logits, bias


def recognize(model: SANModel, clip_map: torch.Tensor, class_token: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """CLIP's deep layers on [recognition, class, patches] under a dense mask: mask embeddings (B, Q, D)."""
    config, vision = model.config, model.vision_model
    heads, num_queries = config.clip_vision_config.num_attention_heads, config.num_queries
    tokens = torch.cat([class_token.expand(-1, num_queries, -1), class_token, clip_map.flatten(2).transpose(1, 2)], 1)
    batch, length, _ = tokens.shape
    own = torch.arange(num_queries, device=tokens.device)
    masks = []
    for layer_bias in bias.unbind(1):  # (B, heads, Q, Hs, Ws)
        pooled = F.adaptive_max_pool2d(layer_bias.flatten(1, 2), clip_map.shape[-2:])
        pooled = pooled.unflatten(1, layer_bias.shape[1:3]).flatten(3).expand(-1, heads, -1, -1)
        mask = tokens.new_zeros(batch, heads, length, length)
        mask[..., :num_queries] = MASKED  # nobody sees the recognition tokens,
        mask[..., own, own] = 0.0  # but each of them itself;
        mask[..., :num_queries, num_queries] = MASKED  # they don't see the class token,
        mask[..., :num_queries, num_queries + 1 :] = pooled  # and the patches through their bias
        masks.append(mask)
    for number, layer in enumerate(vision.encoder.layers[config.recognition_layer :]):
        tokens = clip_layer(layer, tokens, masks[number % len(masks)])
    recognized = vision.post_layernorm(tokens[:, :num_queries])
    return F.normalize(model.visual_projection(recognized), dim=-1)


def encode_text(model: SANForSemanticSegmentation, input_ids: torch.Tensor) -> torch.Tensor:
    """Class embeddings (C, D) from token ids (C, T, 77): template by template, all 77 tokens of each prompt."""
    text = model.text_model
    length = input_ids.shape[-1]
    causal = torch.full((length, length), float("-inf"), dtype=model.dtype, device=input_ids.device).triu(1)
    embeds = []
    for prompts in input_ids.unbind(1):
        tokens = text.embeddings(input_ids=prompts)
        for layer in text.encoder.layers:
            tokens = clip_layer(layer, tokens, causal)
        # The end-of-text token has the highest id.
        pooled = text.final_layer_norm(tokens)[torch.arange(len(prompts)), prompts.argmax(-1)]
        embeds.append(F.normalize(model.text_projection(pooled), dim=-1))
    return F.normalize(torch.stack(embeds).mean(0), dim=-1)


def forward(
    model: SANForSemanticSegmentation, pixel_values: torch.Tensor, class_embeds: torch.Tensor, layers: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mask logits (B, Q, Hs, Ws) and class logits (B, Q, C + 1) after each of these layers of the side adapter."""
    clip_maps, class_token = shallow_clip(model.model, pixel_values)
    states = side_adapter(model.model, pixel_values, clip_maps)
    classifier = F.normalize(torch.cat([class_embeds, model.no_object_embed]), dim=-1)
    predictions = []
    for layer in layers:
        mask_logits, bias = mask_decoder(model.model, *states[layer])
        mask_embeds = recognize(model.model, clip_maps[-1], class_token, bias)
        predictions.append((mask_logits, model.logit_scale.exp() * mask_embeds @ classifier.T))
    return predictions


def label_map(
    mask_logits: torch.Tensor,
    class_logits: torch.Tensor,
    padded: tuple[int, int],
    image: tuple[int, int],
    target: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The label map (H, W) of one image, and the scores (C, H, W) it is the highest of.

    Args:
        mask_logits: (Q, Hs, Ws).
        class_logits: (Q, C + 1).
        padded, image, target: (height, width) of the model's input, of the image inside it, and of the label map.
    """
    masks = F.interpolate(mask_logits[None].float(), size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : image[0], : image[1]]
    masks = F.interpolate(masks, size=target, mode="bilinear", align_corners=False)[0].sigmoid()
    scores = torch.einsum("qc,qhw->chw", class_logits.float().softmax(-1)[:, :-1], masks)
    return scores.argmax(0), scores


def prepare(image: Image.Image, shortest: int, longest: int, mean, std) -> tuple[torch.Tensor, tuple[int, int]]:
    """An RGB image as the model takes it, (1, 3, height, width), and its (height, width) inside that input."""
    scale = shortest / min(image.size)
    scale = min(scale, longest / max(image.size))
    width, height = (int(side * scale + 0.5) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)
    return F.pad(pixels, (0, -width % 32, 0, -height % 32))[None], (height, width)


def loss(
    model: SANForSemanticSegmentation,
    pixel_values: torch.Tensor,
    class_embeds: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    """The training loss of semantic maps `labels` (B, H, W): Mask2Former's criterion after each supervised layer."""
    config = model.config
    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    options = {
        name: getattr(config, name)
        for name in (
            "no_object_weight",
            "class_weight",
            "mask_weight",
            "dice_weight",
            "train_num_points",
            "oversample_ratio",
            "importance_sample_ratio",
        )
    }
    criterion = Mask2FormerLoss(SimpleNamespace(num_labels=len(class_embeds), **options), weights).to(labels.device)
    classes = [label_map.unique() for label_map in labels]
    classes = [present[present != ignore_index] for present in classes]
    masks = [(label_map == present[:, None, None]).float() for label_map, present in zip(labels, classes)]
    predictions = [
        {"masks_queries_logits": mask_logits.float(), "class_queries_logits": class_logits.float()}
        for mask_logits, class_logits in forward(model, pixel_values, class_embeds, config.deep_supervision_layers)
    ]
    with torch.autocast(labels.device.type, enabled=False):
        losses = criterion(
            **predictions[-1], mask_labels=masks, class_labels=classes, auxiliary_predictions=predictions[:-1]
        )
    return sum(value * weights[name.rstrip("_0123456789")] for name, value in losses.items())
