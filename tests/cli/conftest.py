"""What the tests of the commands share: a tiny model of random weights and an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from san_hf.modeling import SANForSemanticSegmentation, SANImageProcessor, SANProcessor
from tests.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved model and processor: random weights that give more than one label to the picture below."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)  # class_embedding, which stays as it starts, has one dimension
    model = SANForSemanticSegmentation(tiny_config(recognition_token="learned", num_queries=20))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        model.logit_scale.fill_(4.6)
        # Each query recognises something else. Where masks are nothing but 0 and 1, classes would tie.
        model.model.mask_decoder.pixel_mlp.layers[-1].weight.mul_(0.03)
        model.model.recognition_tokens.mul_(80)
    model.save_pretrained(folder)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    SANProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """96 x 64, and not alike when turned or mirrored."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)
