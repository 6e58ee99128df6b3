"""The fast formulation against the literal one (`oracle.py`), over every variant that the original offers."""

import pytest
import torch

from san_hf.conversion.convert import export_state_dict
from tests.parity import oracle
from tests.tiny import randomized, relative_difference, tiny_config


VARIANTS = {
    "default": {},
    "learned tokens": {"recognition_token": "learned"},
    "learned tokens added to the class token": {"recognition_token": "class+learned"},
    "one bias head for all": {"num_bias_heads": 1},
    "a bias for each deep layer": {"num_bias_layers": 2},
    "a bias for each deep layer, one head": {"num_bias_layers": 2, "num_bias_heads": 1},
    "average pooling": {"bias_pooling": "avg"},
    "nearest": {"bias_pooling": "nearest"},
    "bilinear": {"bias_pooling": "bilinear"},
    "bicubic": {"bias_pooling": "bicubic"},
    "bias not rescaled": {"rescale_attention_bias": False},
    "symmetric input": {"clip_image_scale": 1.0},
    "another CLIP scale": {"clip_image_scale": 0.7},
    "three supervised layers": {"deep_supervision_layers": [1, 2, 3]},
    "one supervised layer": {"deep_supervision_layers": [3]},
    "no fusion": {"fusion_layers": []},
    "fusion from a deeper map, after the last block": {"fusion_layers": [[2, 0], [0, 3]]},
    "recognition in the last layer only": {"recognition_layer": 3},
    "recognition in every layer": {"recognition_layer": 0, "fusion_layers": [[0, 0]]},
}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_agrees_with_the_masked_one_sequence_formulation(variant, attn_implementation):
    """A recognition token that sees the class token or its neighbours; a bias at the wrong layer, head or query; a
    fusion at the wrong place; a position embedding too many. For every supervised layer, on an image whose sides no
    grid divides evenly."""
    config = tiny_config(**VARIANTS[variant])
    config._attn_implementation = attn_implementation
    model = randomized(config)
    pixel_values = torch.randn(2, 3, 64, 96)
    input_ids = torch.randint(0, 512, (4, 3, 9))
    input_ids[..., 0], input_ids[..., -1] = 512, 513
    with torch.no_grad():
        outputs = model(pixel_values, input_ids=input_ids, output_auxiliary_logits=True, output_clip_feature_maps=True)
        original = {key: tensor.float() for key, tensor in export_state_dict(model.state_dict(), config).items()}
        expected = oracle.run(original, config, pixel_values, input_ids.transpose(0, 1))

    layers = [*outputs.auxiliary_logits, outputs]
    assert len(layers) == len(expected["mask_logits"]) == len(config.deep_supervision_layers)
    differences = {
        "classifier": relative_difference(outputs.class_embeds, expected["classifier"]),
        "mask_embeds": relative_difference(outputs.mask_embeds, expected["mask_embeds"][-1]),
        "attention_bias": relative_difference(outputs.attention_bias, expected["attention_bias"][-1]),
    }
    for i, (got, wanted) in enumerate(zip(outputs.clip_feature_maps, expected["clip_maps"], strict=True)):
        differences[f"clip_map_{i}"] = relative_difference(got, wanted)
    for i, layer in enumerate(layers):
        differences[f"mask_logits_{i}"] = relative_difference(layer["masks_queries_logits"], expected["mask_logits"][i])
        differences[f"class_logits_{i}"] = relative_difference(
            layer["class_queries_logits"], expected["class_logits"][i]
        )
    print(differences)
    assert max(differences.values()) < 1e-4, differences


def test_attention_bias_steers_recognition():
    """The comparison above would be empty if the bias didn't matter: without it, the mask embeddings differ."""
    model = randomized(tiny_config())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        steered = model.model(pixel_values).mask_embeds
        model.model.mask_decoder.bias_scaling.weight.zero_()
        model.model.mask_decoder.bias_scaling.bias.zero_()
        unsteered = model.model(pixel_values).mask_embeds
    assert relative_difference(steered, unsteered) > 1e-2
    # Without a bias all queries ask CLIP the same thing.
    assert relative_difference(unsteered[:, :1].expand_as(unsteered), unsteered) < 1e-5
    # The configuration that leaves the bias out is the same function.
    without = randomized(tiny_config(num_bias_layers=0)).model
    without.load_state_dict({k: v for k, v in model.model.state_dict().items() if k in without.state_dict()})
    with torch.no_grad():
        outputs = without(pixel_values)
    assert relative_difference(outputs.mask_embeds, unsteered) < 1e-5
    assert not outputs.attention_bias.any()
