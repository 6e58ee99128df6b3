"""SAN written down a second time, slowly and literally, as an oracle for the fast model.

It works on a state dict in the original's layout and follows the published description step by step: 1x1 convolutions
are convolutions, each supervised layer has its own pass, and the deep CLIP layers run on *one* sequence
[recognition tokens, class, patches] under a dense additive mask of 0 and -100. Nothing here is shared with `san_hf`
but the names of the configuration's fields.
"""

import torch
import torch.nn.functional as F


MASKED = -100.0


def _norm(sd, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], eps)


def _linear(sd, name, x):
    return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])


def _attention(q, k, v, num_heads, mask=None):
    """(B, T, C) each; mask broadcasts to (B, heads, T, T)."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _clip_block(sd, name, x, num_heads, mask=None):
    """OpenAI CLIP's residual block with QuickGELU."""
    in_proj = f"{name}.attn.in_proj"
    qkv = F.linear(_norm(sd, f"{name}.ln_1", x, 1e-5), sd[f"{in_proj}_weight"], sd[f"{in_proj}_bias"])
    x = x + _linear(sd, f"{name}.attn.out_proj", _attention(*qkv.chunk(3, -1), num_heads, mask))
    hidden = _linear(sd, f"{name}.mlp.c_fc", _norm(sd, f"{name}.ln_2", x, 1e-5))
    return x + _linear(sd, f"{name}.mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))


def _resize_positions(positions, grid):
    """(1, N, C) on a square grid -> (1, h * w, C)."""
    side = round(positions.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    square = positions.transpose(1, 2).reshape(1, -1, side, side)
    return F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def shallow_clip(sd, config, pixel_values):
    """Feature maps after layers 0..recognition_layer, and the class token after each."""
    vision = config.clip_config.vision_config
    name = "clip_visual_extractor"
    x = F.conv2d(pixel_values, sd[f"{name}.conv1.weight"], stride=vision.patch_size)
    grid = tuple(x.shape[-2:])
    positions = sd[f"{name}.positional_embedding"][None]
    positions = torch.cat([positions[:, :1], _resize_positions(positions[:, 1:], grid)], 1)
    class_token = sd[f"{name}.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([class_token, x.flatten(2).transpose(1, 2)], 1) + positions
    x = _norm(sd, f"{name}.ln_pre", x, 1e-5)
    tokens = [x]
    for i in range(config.recognition_layer):
        x = _clip_block(sd, f"{name}.resblocks.{i}", x, vision.num_attention_heads)
        tokens.append(x)
    maps = [t[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid) for t in tokens]
    return maps, [t[:, :1] for t in tokens]


def side_adapter(sd, config, pixel_values, clip_maps):
    """For each supervised layer the query tokens (B, Q, C) and the patch map (B, C, h, w)."""
    name, eps = "side_adapter_network", config.layer_norm_eps
    patches = F.conv2d(
        pixel_values,
        sd[f"{name}.vit_model.patch_embed.proj.weight"],
        sd[f"{name}.vit_model.patch_embed.proj.bias"],
        stride=config.patch_size,
    )
    grid = tuple(patches.shape[-2:])
    positions = _resize_positions(sd[f"{name}.vit_model.pos_embed"], grid)
    positions = torch.cat([sd[f"{name}.query_pos_embed"], positions], 1)
    queries = sd[f"{name}.query_embed"].expand(len(patches), -1, -1)
    x = torch.cat([queries, patches.flatten(2).transpose(1, 2)], 1) + positions

    def fuse(layer, x):
        for clip_layer, adapter_layer in config.fusion_layers:
            if adapter_layer == layer:
                fusion = f"{name}.fusion_layers.layer_{layer}.input_proj"
                clip_map = _norm(sd, f"{fusion}.0", clip_maps[clip_layer].permute(0, 2, 3, 1), eps).permute(0, 3, 1, 2)
                clip_map = F.conv2d(clip_map, sd[f"{fusion}.1.weight"], sd[f"{fusion}.1.bias"])
                clip_map = F.interpolate(clip_map, size=grid, mode="bilinear", align_corners=False)
                x = x + F.pad(clip_map.flatten(2).transpose(1, 2), (0, 0, config.num_queries, 0))
        return x

    x = fuse(0, x)
    supervised = []
    for i in range(config.num_hidden_layers):
        block = f"{name}.vit_model.blocks.{i}"
        qkv = _linear(sd, f"{block}.attn.qkv", _norm(sd, f"{block}.norm1", x, eps))
        x = x + _linear(sd, f"{block}.attn.proj", _attention(*qkv.chunk(3, -1), config.num_attention_heads))
        hidden = F.gelu(_linear(sd, f"{block}.mlp.fc1", _norm(sd, f"{block}.norm2", x, eps)))
        x = fuse(i + 1, x + _linear(sd, f"{block}.mlp.fc2", hidden))
        if i + 1 in config.deep_supervision_layers:
            q = config.num_queries
            supervised.append((x[:, :q], x[:, q:].transpose(1, 2).reshape(len(x), -1, *grid)))
        if i + 1 < config.num_hidden_layers:
            x = x + positions
    return supervised


def mask_decoder(sd, config, queries, patches):
    """Mask logits (B, Q, h, w) and a list, one for each bias layer, of biases (B, heads, Q, h, w)."""
    name = "side_adapter_network.mask_decoder"

    def mlp(which, x):
        for i in range(config.decoder_num_layers):
            weight, bias = sd[f"{name}.{which}.layers.{i}.weight"], sd[f"{name}.{which}.layers.{i}.bias"]
            x = F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias)
            x = F.relu(x) if i + 1 < config.decoder_num_layers else x
        return x

    q = mlp("query_mlp", queries)
    mask_logits = torch.einsum("bqc,bchw->bqhw", q, mlp("pix_mlp", patches))
    heads = config.num_bias_heads or config.clip_config.vision_config.num_attention_heads
    features = mlp("attn_mlp", patches)
    features = features.reshape(len(q), config.num_bias_layers, heads, q.shape[-1], *patches.shape[-2:])
    bias = torch.einsum("bqc,blnchw->blnqhw", q, features)
    if config.rescale_attention_bias:
        bias = F.linear(bias[..., None], sd[f"{name}.bias_scaling.weight"], sd[f"{name}.bias_scaling.bias"])[..., 0]
    return mask_logits, list(bias.unbind(1))


def recognize(sd, config, clip_map, class_token, biases):
    """Deep CLIP layers on [recognition, class, patches] under a dense mask; mask embeddings (B, Q, D)."""
    vision = config.clip_config.vision_config
    batch, grid = len(clip_map), tuple(clip_map.shape[-2:])
    num_heads, q = vision.num_attention_heads, config.num_queries
    patches = clip_map.flatten(2).transpose(1, 2)
    tokens = torch.zeros(batch, q, clip_map.shape[1])
    if "class" in config.recognition_token:
        tokens = tokens + class_token
    if "learned" in config.recognition_token:
        tokens = tokens + sd["clip_rec_head.sos_token"].transpose(0, 1)
    x = torch.cat([tokens, class_token, patches], 1)

    def pool(bias):
        maps = bias.flatten(1, 2)
        if config.bias_pooling == "max":
            maps = F.adaptive_max_pool2d(maps, grid)
        elif config.bias_pooling == "avg":
            maps = F.adaptive_avg_pool2d(maps, grid)
        elif config.bias_pooling == "nearest":
            maps = F.interpolate(maps, size=grid, mode="nearest")
        else:
            maps = F.interpolate(maps, size=grid, mode=config.bias_pooling, align_corners=False)
        maps = maps.reshape(batch, bias.shape[1], q, -1)
        return maps.expand(-1, num_heads, -1, -1)

    masks = []
    for bias in biases:
        mask = torch.zeros(batch, num_heads, x.shape[1], x.shape[1])
        mask[:, :, :, :q] = MASKED  # nobody sees the recognition tokens,
        for i in range(q):
            mask[:, :, i, i] = 0.0  # but each sees itself;
        mask[:, :, :q, q] = MASKED  # they don't see the class token,
        mask[:, :, :q, q + 1 :] = pool(bias)  # and the patches through their bias.
        masks.append(mask)
    for i in range(vision.num_hidden_layers - config.recognition_layer):
        x = _clip_block(sd, f"clip_rec_head.resblocks.{i}", x, num_heads, masks[i if len(masks) > 1 else 0])
    return F.normalize(_norm(sd, "clip_rec_head.ln_post", x[:, :q], 1e-5) @ sd["clip_rec_head.proj"], dim=-1)


def classifier(sd, config, token_ids):
    """Token ids (templates, classes, length) -> (C + 1, D)."""
    name = "ov_classifier"
    text = config.clip_config.text_config
    causal = torch.full((token_ids.shape[-1],) * 2, float("-inf")).triu(1)
    embeds = []
    for ids in token_ids.long():
        x = sd[f"{name}.token_embedding.weight"][ids] + sd[f"{name}.positional_embedding"][: ids.shape[-1]]
        for i in range(text.num_hidden_layers):
            x = _clip_block(sd, f"{name}.transformer.resblocks.{i}", x, text.num_attention_heads, causal)
        x = _norm(sd, f"{name}.ln_final", x, 1e-5)
        x = x[torch.arange(len(ids)), ids.argmax(-1)] @ sd[f"{name}.text_projection"]
        embeds.append(F.normalize(x, dim=-1))
    mean = F.normalize(torch.stack(embeds).mean(0), dim=-1)
    return F.normalize(torch.cat([mean, sd[f"{name}.bg_embed"]]), dim=-1)


def run(sd, config, pixel_values, token_ids):
    """
    Args:
        sd: state dict in the original's layout, float32.
        config: the SANConfig.
        pixel_values: (B, 3, H, W), normalised and padded.
        token_ids: (templates, classes, length).

    Returns:
        Every tap: `clip_maps`, `classifier`, and a list with an entry for each supervised layer of `mask_logits`,
        `attention_bias` (B, n, heads, Q, h, w), `mask_embeds`, `class_logits`.
    """
    clip_image = pixel_values
    if config.clip_image_scale != 1.0:
        clip_image = F.interpolate(
            pixel_values, scale_factor=config.clip_image_scale, mode="bilinear", align_corners=False
        )
    clip_maps, class_tokens = shallow_clip(sd, config, clip_image)
    taps = {"clip_maps": clip_maps, "classifier": classifier(sd, config, token_ids)}
    taps |= {"mask_logits": [], "attention_bias": [], "mask_embeds": [], "class_logits": []}
    for queries, patches in side_adapter(sd, config, pixel_values, clip_maps):
        mask_logits, biases = mask_decoder(sd, config, queries, patches)
        mask_embeds = recognize(sd, config, clip_maps[-1], class_tokens[-1], biases)
        taps["mask_logits"].append(mask_logits)
        taps["attention_bias"].append(torch.stack(biases, 1))
        taps["mask_embeds"].append(mask_embeds)
        taps["class_logits"].append(sd["ov_classifier.logit_scale"].exp() * mask_embeds @ taps["classifier"].T)
    return taps
