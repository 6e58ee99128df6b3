"""What a forward pass computes, counted: operations and tokens, never seconds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from san_hf import SANConfig
from san_hf.modeling import SANModel


# Of one image of 640 x 864, in billions.
INFERENCE, TRAINING = 170.2, 178.7


def giga_operations(model, pixel_values, **options) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values, **options)
    return counter.get_total_flops() / 1e9


def test_operations_of_the_paper_s_model():
    """
    A deep pass for each supervised layer, image tokens all through CLIP's last layer, features of n * heads * c
    channels for each patch: each costs more than the margin. Counted on the meta device, so without computing anything.
    """
    with torch.device("meta"):
        model = SANModel(SANConfig()).eval()
        image = torch.empty(1, 3, 640, 864)
        assert giga_operations(model, image) == pytest.approx(INFERENCE, rel=0.005)
        assert giga_operations(model, image, output_auxiliary_logits=True) == pytest.approx(TRAINING, rel=0.005)


@pytest.mark.parametrize("supervised", [1, 2])
@torch.no_grad()
def test_tokens_of_the_deep_layers(model, pixel_values, supervised):
    """Each layer runs once, whatever is supervised, and CLIP's last layer on the recognition tokens alone."""
    tokens = []
    for layer in model.model.vision_model.encoder.layers:
        layer.mlp.fc1.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    model.model(pixel_values, output_auxiliary_logits=supervised == 2)
    image, recognition = 1 + 3 * 5, 5 * supervised  # a grid of 3 x 5; 5 queries
    assert tokens == [image, image, image + recognition, recognition]
