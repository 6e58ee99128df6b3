"""The reference models: small models in the original's layout, with the original's own inputs and outputs.

`tests/fixtures/golden/<name>/` holds for each of them
  original.pth.gz      the checkpoint, half precision (unused token embeddings are zero, hence the compression)
  io.safetensors       images, token ids, every tap of the forward pass, losses
  grads.safetensors    gradient of the summed loss for every trainable parameter, under the original's names
  meta.json            sizes, vocabulary, templates
"""

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from san_hf.modeling import SANConfig


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
GOLDEN_NAMES = ("tiny_b16", "tiny_l14")


@dataclass
class Golden:
    name: str
    checkpoint: Path  # original.pth, uncompressed in a temporary folder

    @cached_property
    def meta(self) -> dict:
        return json.loads((GOLDEN / self.name / "meta.json").read_text())

    @cached_property
    def io(self) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / self.name / "io.safetensors")

    @cached_property
    def grads(self) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / self.name / "grads.safetensors")

    @property
    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Half precision, the original's names; the caller's own to change."""
        return torch.load(self.checkpoint, weights_only=True)["model"]

    def config(self, **overrides) -> SANConfig:
        return SANConfig(**(golden_config_kwargs(self.meta) | overrides))


def golden_config_kwargs(meta: dict) -> dict:
    """What meta.json says, in the terms of SANConfig."""
    vision, text, side, bias = meta["vision"], meta["text"], meta["side_vit"], meta["attn_bias"]
    return {
        "clip_config": {
            "projection_dim": meta["embed_dim"],
            "vision_config": {
                "hidden_size": vision["width"],
                "intermediate_size": 4 * vision["width"],
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision["head_width"],
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "projection_dim": meta["embed_dim"],
            },
            "text_config": {
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"],
                "projection_dim": meta["embed_dim"],
            },
        },
        "hidden_size": side["embed_dim"],
        "num_hidden_layers": side["depth"],
        "num_attention_heads": side["num_heads"],
        "intermediate_size": 4 * side["embed_dim"],
        "image_size": meta["side_image_size"],
        "layer_norm_eps": meta["side_norm_eps"],
        "num_queries": meta["num_queries"],
        "fusion_layers": [[int(layer) for layer in pair.split("->")] for pair in meta["fusion_map"]],
        "recognition_layer": meta["feature_last_layer_idx"],
        "deep_supervision_layers": meta["deep_supervision_idxs"],
        "clip_image_scale": meta["clip_resolution"],
        "mask_embed_dim": bias["embed_channels"],
        "decoder_hidden_size": bias["mlp_channels"],
        "decoder_num_layers": bias["mlp_num_layers"],
        "num_bias_heads": bias["num_heads"],
        "num_bias_layers": bias["num_layers"],
        "rescale_attention_bias": bias["rescale"],
        "train_num_points": meta["train_num_points"],
        "oversample_ratio": meta["oversample_ratio"],
        "importance_sample_ratio": meta["importance_sample_ratio"],
        "no_object_weight": meta["no_object_weight"],
        "class_weight": meta["class_weight"],
        "mask_weight": meta["mask_weight"],
        "dice_weight": meta["dice_weight"],
        "semantic_loss_ignore_index": meta["ignore_index"],
    }


@pytest.fixture(scope="session")
def goldens(tmp_path_factory) -> dict[str, Golden]:
    """Both reference models by name; their checkpoints uncompressed."""
    folder = tmp_path_factory.mktemp("golden")
    models = {}
    for name in GOLDEN_NAMES:
        checkpoint = folder / f"{name}.pth"
        checkpoint.write_bytes(gzip.decompress((GOLDEN / name / "original.pth.gz").read_bytes()))
        models[name] = Golden(name, checkpoint)
    return models


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request, goldens) -> Golden:
    """Each reference model in turn."""
    return goldens[request.param]
