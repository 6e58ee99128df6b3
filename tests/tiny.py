"""Small stand-ins, built from scratch and offline: a SAN configuration and a CLIP tokenizer.

They have random weights or no training at all, and every path of the real thing: two heads, deep supervision, fusion
before and after blocks, position embeddings on more than one row.
"""

import torch
from transformers import CLIPTokenizer

from san_hf.modeling import SANConfig, SANForSemanticSegmentation


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, hence 514 tokens; 77 of them at most."""
    # Byte-level BPE's alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def tiny_config(**overrides) -> SANConfig:
    """A SANConfig of about 80,000 parameters for images of 64 x 64 pixels; fits `tiny_tokenizer`."""
    # Each part names a dtype, as real checkpoints do: nothing but the dtype that is asked for may count.
    clip_config = {
        "dtype": "float32",
        "projection_dim": 16,
        "text_config": {
            "dtype": "float32",
            "vocab_size": 514,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        "vision_config": {
            "dtype": "float32",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    }
    config = {
        "clip_config": clip_config,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "patch_size": 8,
        "image_size": 64,
        "num_queries": 5,
        "fusion_layers": [[0, 0], [1, 1], [2, 2]],
        "recognition_layer": 2,
        "deep_supervision_layers": [2, 3],
        "mask_embed_dim": 12,
        "decoder_hidden_size": 20,
        "train_num_points": 64,
    }
    return SANConfig(**(config | overrides))


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    return ((got - expected).abs().max() / expected.abs().max()).item()


def randomized(config) -> SANForSemanticSegmentation:
    """A model whose every parameter matters: nothing is zero, one, or too small to see."""
    torch.manual_seed(0)
    model = SANForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
            parameter.copy_(parameter + noise if "norm" in name or parameter.dim() == 0 else noise)
    return model


def segmenting_model(**overrides) -> SANForSemanticSegmentation:
    """A model of random weights that gives more than one label to images of noise, the same on every machine."""
    torch.manual_seed(0)  # class_embedding, which stays as it starts, has one dimension
    model = SANForSemanticSegmentation(tiny_config(recognition_token="learned", num_queries=20, **overrides)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        model.logit_scale.fill_(4.6)
        # Each query recognises something else. Where masks are nothing but 0 and 1, classes would tie.
        model.model.mask_decoder.pixel_mlp.layers[-1].weight.mul_(0.03)
        model.model.recognition_tokens.mul_(80)
    return model
