"""The original's checkpoints: converted, refused, and written back. What the models compute is in test_golden.py."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import san_hf.conversion.convert
from san_hf.conversion import (
    RELEASES,
    ConversionError,
    clip_tokenizer,
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    export_state_dict,
    read_original,
)
from san_hf.conversion.convert import recognize_release
from san_hf.files import new_folder
from san_hf.locks import InUseError, locked
from san_hf.modeling import SANConfig, SANForSemanticSegmentation, SANProcessor


SIDE, VISION, DEEP, TEXT = "side_adapter_network", "clip_visual_extractor", "clip_rec_head", "ov_classifier"


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    """tiny_b16, converted."""
    golden = goldens["tiny_b16"]
    return convert_checkpoint(golden.checkpoint, tmp_path_factory.mktemp("b16") / "tiny", golden.config())


@pytest.fixture
def b16(goldens):
    return goldens["tiny_b16"]


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def write(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


# Where each tensor goes


def test_layout_of_each_tensor(golden):
    """Catches query, key and value in another order, projections not transposed, deep layers counted from 0."""
    original, config = golden.original_state_dict, golden.config()
    shallow, last = config.recognition_layer, config.clip_config.vision_config.num_hidden_layers - 1
    ours = convert_state_dict(dict(original), config)

    in_proj = original[f"{DEEP}.resblocks.{last - shallow}.attn.in_proj_weight"].float()
    parts = [ours[f"model.vision_model.encoder.layers.{last}.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), in_proj)
    layer = f"{VISION}.resblocks.{shallow - 1}.mlp.c_fc.weight"
    assert torch.equal(ours[f"model.vision_model.encoder.layers.{shallow - 1}.mlp.fc1.weight"], original[layer].float())
    assert torch.equal(ours["model.visual_projection.weight"], original[f"{DEEP}.proj"].float().T)
    assert torch.equal(ours["text_projection.weight"], original[f"{TEXT}.text_projection"].float().T)
    fusion = original[f"{SIDE}.fusion_layers.layer_2.input_proj.1.weight"].float()
    assert torch.equal(ours["model.side_adapter.fusions.2.proj.weight"], fusion[:, :, 0, 0])
    assert torch.equal(ours["no_object_embed"], original[f"{TEXT}.bg_embed"].float())
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in ours.values())


def full_size_layout(width, patch, positions, layers, recognition_layer, joint, attention_outputs):
    """Names and shapes of a released checkpoint, put down here a second time from the release itself."""
    shapes = {
        "criterion.empty_weight": (172,),
        f"{SIDE}.query_embed": (1, 100, 240),
        f"{SIDE}.query_pos_embed": (1, 100, 240),
        f"{SIDE}.vit_model.pos_embed": (1, 1600, 240),
        f"{SIDE}.vit_model.patch_embed.proj.weight": (240, 3, 16, 16),
        f"{SIDE}.vit_model.patch_embed.proj.bias": (240,),
        f"{SIDE}.mask_decoder.bias_scaling.weight": (1, 1),
        f"{SIDE}.mask_decoder.bias_scaling.bias": (1,),
        f"{VISION}.class_embedding": (width,),
        f"{VISION}.positional_embedding": (positions, width),
        f"{VISION}.conv1.weight": (width, 3, patch, patch),
        f"{DEEP}.proj": (width, joint),
        f"{TEXT}.token_embedding.weight": (49408, joint),
        f"{TEXT}.positional_embedding": (77, joint),
        f"{TEXT}.text_projection": (joint, joint),
        f"{TEXT}.logit_scale": (),
        f"{TEXT}.bg_embed": (1, joint),
        f"{TEXT}.attn_mask": (77, 77),
    }

    def layer(name, out, *rest, norm=False):
        shapes[f"{name}.weight"] = (out,) if norm else (out, *rest)
        shapes[f"{name}.bias"] = (out,)

    def clip_layer(name, width):
        layer(f"{name}.ln_1", width, norm=True)
        shapes[f"{name}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{name}.attn.in_proj_bias"] = (3 * width,)
        layer(f"{name}.attn.out_proj", width, width)
        layer(f"{name}.ln_2", width, norm=True)
        layer(f"{name}.mlp.c_fc", 4 * width, width)
        layer(f"{name}.mlp.c_proj", width, 4 * width)

    for i in range(8):
        block = f"{SIDE}.vit_model.blocks.{i}"
        layer(f"{block}.norm1", 240, norm=True)
        layer(f"{block}.attn.qkv", 720, 240)
        layer(f"{block}.attn.proj", 240, 240)
        layer(f"{block}.norm2", 240, norm=True)
        layer(f"{block}.mlp.fc1", 960, 240)
        layer(f"{block}.mlp.fc2", 240, 960)
    for i in range(4):
        layer(f"{SIDE}.fusion_layers.layer_{i}.input_proj.0", width, norm=True)
        layer(f"{SIDE}.fusion_layers.layer_{i}.input_proj.1", 240, width, 1, 1)
    for i, size in enumerate((240, 256, 256)):
        layer(f"{SIDE}.mask_decoder.query_mlp.layers.{i}", 256, size)
        layer(f"{SIDE}.mask_decoder.pix_mlp.layers.{i}", 256, size, 1, 1)
        layer(f"{SIDE}.mask_decoder.attn_mlp.layers.{i}", attention_outputs if i == 2 else 256, size, 1, 1)
    layer(f"{VISION}.ln_pre", width, norm=True)
    for i in range(recognition_layer):
        clip_layer(f"{VISION}.resblocks.{i}", width)
    for i in range(layers - recognition_layer):
        clip_layer(f"{DEEP}.resblocks.{i}", width)
    layer(f"{DEEP}.ln_post", width, norm=True)
    for i in range(12):
        clip_layer(f"{TEXT}.transformer.resblocks.{i}", joint)
    layer(f"{TEXT}.ln_final", joint, norm=True)
    return shapes


FULL_SIZES = {
    "san-vit-b-16": (full_size_layout(768, 16, 197, 12, 9, 512, 3072), 442, 8_370_866),
    "san-vit-large-14": (full_size_layout(1024, 14, 577, 24, 18, 768, 4096), 586, 9_321_650),
}


@pytest.mark.parametrize("name", FULL_SIZES)
def test_released_sizes(name):
    """Catches a size of B/16 or L/14 that is off by anything, and a parameter wrongly frozen or trained."""
    shapes, tensors, trainable = FULL_SIZES[name]
    assert len(shapes) == tensors
    config = RELEASES[name].config()
    with torch.device("meta"):
        state_dict = convert_state_dict({key: torch.empty(shape) for key, shape in shapes.items()}, config)
        model = SANForSemanticSegmentation(config)
    model.load_state_dict(state_dict, assign=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trainable


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZES)
def test_released_sizes_from_file_to_folder(name, tmp_path):
    """Catches sizes that are not recognised from the file, and a folder that trains other parameters."""
    shapes, _, trainable = FULL_SIZES[name]
    # One stored number each: the tensors are views of stride 0.
    tensors = {key: torch.full((), 0.01).expand(shape) for key, shape in shapes.items()}
    output = convert_checkpoint(write(tmp_path / "full.pth", tensors), tmp_path / name)
    model = SANForSemanticSegmentation.from_pretrained(output)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trainable
    assert model.config.clip_config.vision_config.patch_size == shapes[f"{VISION}.conv1.weight"][-1]


# Files as they come


def test_every_way_to_store_it(b16, tmp_path):
    """Catches a nesting, a precision or a file format that is read wrongly or not at all."""
    half = b16.original_state_dict
    full = {key: tensor.float() for key, tensor in half.items()}
    beside = {"iteration": 60000, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    save_file(half, tmp_path / "plain.safetensors")
    files = [
        tmp_path / "plain.safetensors",
        write(tmp_path / "top.pth", half),
        write(tmp_path / "model.pth", {"model": half, **beside}),
        write(tmp_path / "state_dict.pth", {"state_dict": half, **beside}),
        write(tmp_path / "full.pth", full),
        write(tmp_path / "legacy.pth", {"model": half}, _use_new_zipfile_serialization=False),
    ]
    expected = convert_state_dict(dict(half), b16.config())
    for file in files:
        assert equal(convert_state_dict(read_original(file), b16.config()), expected), file.name


def to_mmsegmentation(original):
    """The same tensors as mmsegmentation stores them, put down here a second time from its modules."""
    renamed = {"decode_head.conv_seg.weight": torch.zeros(3, 8, 1, 1), "decode_head.conv_seg.bias": torch.zeros(3)}
    deep = {"ln_1": "norms.0", "ln_2": "norms.1", "attn": "attentions.0.attn"}
    deep |= {"mlp.c_fc": "ffns.0.layers.0.0", "mlp.c_proj": "ffns.0.layers.1"}
    shallow = {"ln_1": "ln1", "ln_2": "ln2", "attn": "attn.attn", "mlp.c_fc": "ffn.layers.0.0"}
    shallow["mlp.c_proj"] = "ffn.layers.1"
    blocks = {"norm1": "ln1", "norm2": "ln2", "attn.qkv.": "attn.attn.in_proj_", "attn.proj": "attn.attn.out_proj"}
    blocks |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    fixed = {
        f"{VISION}.class_embedding": "image_encoder.cls_token",
        f"{VISION}.positional_embedding": "image_encoder.pos_embed",
        f"{VISION}.conv1.weight": "image_encoder.patch_embed.projection.weight",
        f"{DEEP}.proj": "decode_head.rec_with_attnbias.proj.weight",
        f"{SIDE}.vit_model.pos_embed": f"decode_head.{SIDE}.pos_embed",
        f"{SIDE}.vit_model.patch_embed.proj.weight": f"decode_head.{SIDE}.patch_embed.projection.weight",
        f"{SIDE}.vit_model.patch_embed.proj.bias": f"decode_head.{SIDE}.patch_embed.projection.bias",
    }
    for key, tensor in original.items():
        name = fixed.get(key) or key
        for start, new, parts in (
            (f"{VISION}.resblocks.", "image_encoder.layers.", shallow),
            (f"{DEEP}.resblocks.", "decode_head.rec_with_attnbias.layers.", deep),
            (f"{TEXT}.transformer.resblocks.", "text_encoder.transformer.", deep),
            (f"{SIDE}.vit_model.blocks.", f"decode_head.{SIDE}.encode_layers.", blocks),
        ):
            if key.startswith(start):
                number, _, part = key.removeprefix(start).partition(".")
                old = next(old for old in parts if part.startswith(old))
                name = f"{new}{number}.{parts[old]}{part.removeprefix(old)}"
        if key.startswith(f"{SIDE}.fusion_layers.layer_"):
            number, part = key.removeprefix(f"{SIDE}.fusion_layers.layer_").split(".input_proj.")
            name = f"decode_head.{SIDE}.conv_clips.{number}.{part.replace('1.', '1.conv.')}"
        if name == key and key.startswith(f"{SIDE}."):
            name = f"decode_head.{key}"
        name = name.replace(f"{VISION}.ln_pre", "image_encoder.ln_pre").replace(f"{TEXT}.", "text_encoder.")
        name = name.replace(f"{DEEP}.ln_post", "decode_head.rec_with_attnbias.ln_post")
        if key == f"{VISION}.class_embedding":
            tensor = tensor[None, None]
        elif key == f"{VISION}.positional_embedding":
            tensor = tensor[None]
        elif key == f"{DEEP}.proj":
            tensor = tensor.T
        # Neither is in files that mmsegmentation itself has trained.
        if key not in ("criterion.empty_weight", f"{TEXT}.attn_mask"):
            renamed[name] = tensor
    return renamed


def test_layouts_that_others_hold(golden, tmp_path):
    """Catches a prefix of DistributedDataParallel, or mmsegmentation's names and axes, that lead to other weights."""
    original, config = golden.original_state_dict, golden.config()
    expected = convert_state_dict(dict(original), config)
    wrapped = {f"module.{key}": tensor for key, tensor in original.items()}
    port = to_mmsegmentation(original)
    assert not [key for key in port if not key.startswith(("image_encoder.", "text_encoder.", "decode_head."))]
    for content in (
        wrapped,
        {"model": {f"module.{key}": tensor for key, tensor in wrapped.items()}},
        port,
        {"state_dict": port, "meta": {"epoch": 1}},
        {"state_dict": {f"module.{key}": tensor for key, tensor in port.items()}},
        {"state_dict": port | {key: original[key] for key in ("criterion.empty_weight",)}},
    ):
        assert equal(convert_state_dict(read_original(write(tmp_path / "x.pth", content)), config), expected)
    with pytest.raises(ConversionError, match="twice, once as "):
        read_original(write(tmp_path / "x.pth", wrapped | original))
    with pytest.raises(ConversionError, match=r"Unknown keys: decode_head\.something"):
        convert_state_dict(
            read_original(write(tmp_path / "x.pth", port | {"decode_head.something": torch.ones(1)})), config
        )


def test_logits_of_mmsegmentations_layout(golden, tmp_path):
    """Catches weights that are renamed so that they fit, and compute something else."""
    file = write(tmp_path / "x.pth", {"state_dict": to_mmsegmentation(golden.original_state_dict)})
    models = []
    for number, source in enumerate((golden.checkpoint, file)):
        folder = convert_checkpoint(source, tmp_path / str(number), golden.config())
        models.append(SANForSemanticSegmentation.from_pretrained(folder).eval())
    pixels = (golden.io["image"][None].float() - 120) / 70
    with torch.inference_mode():
        ours, theirs = (model.model(pixels) for model in models)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)
    assert torch.equal(ours.mask_embeds, theirs.mask_embeds)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_released_sizes_in_mmsegmentations_layout(name, tmp_path):
    """Catches a layer of either size whose name in mmsegmentation leads nowhere, and sizes that are not recognised."""
    shapes, _, _ = FULL_SIZES[name]
    tensors = {key: torch.full((), 0.01).expand(shape) for key, shape in shapes.items()}
    read = read_original(write(tmp_path / "full.pth", to_mmsegmentation(tensors)))
    assert {key: tuple(tensor.shape) for key, tensor in read.items()} == {
        key: shape for key, shape in shapes.items() if key not in ("criterion.empty_weight", f"{TEXT}.attn_mask")
    }
    assert recognize_release(read).name == name


def test_strided_views(b16, tmp_path):
    """Catches weights that are written with the wrong strides, or with all of the storage they are a view of."""
    views = {
        key: torch.stack([tensor.T, torch.full_like(tensor.T, 7.0)])[0].T if tensor.dim() == 2 else tensor
        for key, tensor in b16.original_state_dict.items()
    }
    assert not views[f"{DEEP}.proj"].is_contiguous()
    output = convert_checkpoint(write(tmp_path / "views.pth", views), tmp_path / "out", b16.config())
    expected = convert_state_dict(b16.original_state_dict, b16.config())
    assert equal(load_file(output / "model.safetensors"), expected)


def test_folder_is_complete(b16, folder, tmp_path):
    """Catches a folder that lacks a file, trains other parameters, or prepares inputs for another model."""
    files = {path.name for path in folder.iterdir()}
    code = {f"{name}_san.py" for name in ("configuration", "modeling", "side_adapter", "clip_recognition", "loss")}
    code |= {"image_processing_san.py", "processing_san.py"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} | code <= files
    model = SANForSemanticSegmentation.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == b16.meta["trainable_numel"]
    assert not any(torch.isnan(parameter).any() for parameter in model.parameters())
    processor = SANProcessor.from_pretrained(folder)
    assert dict(processor.image_processor.size) == {"shortest_edge": 96, "longest_edge": 384}
    assert processor.tokenizer.model_max_length == 77
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSemanticSegmentation"] == "modeling_san.SANForSemanticSegmentation"
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it, as any folder


def test_card_claims_nothing_unknown(b16, folder):
    """Catches a card that lends the published results to weights nobody compared with the release."""
    card = (folder / "README.md").read_text()
    assert hashlib.sha256(b16.checkpoint.read_bytes()).hexdigest() in card
    assert "No results were measured" in card and "model-index" not in card
    assert str(folder.parent) not in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(b16, tmp_path, dtype):
    """Catches a dtype that is ignored, or not told to the configuration."""
    output = convert_checkpoint(b16.checkpoint, tmp_path / "out", b16.config(), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert SANForSemanticSegmentation.from_pretrained(output).dtype == dtype


def test_configuration_from_file_or_folder(b16, folder, tmp_path):
    """Catches a saved configuration that gives another model than the same one in memory."""
    expected = load_file(folder / "model.safetensors")
    for i, config in enumerate((folder, folder / "config.json", str(folder / "config.json"))):
        output = convert_checkpoint(b16.checkpoint, tmp_path / str(i), config)
        assert equal(load_file(output / "model.safetensors"), expected)
        assert (output / "config.json").read_text() == (folder / "config.json").read_text()


# Refusals: each names the file or the key, and leaves nothing behind


def refuse(tmp_path, source, config, match, error=ConversionError):
    with pytest.raises(error, match=match) as caught:
        convert_checkpoint(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    return str(caught.value)


def test_missing_unknown_and_misshapen_keys(b16, tmp_path):
    """Catches weights that are silently left at random, ignored, or broadcast."""
    state_dict = b16.original_state_dict
    del state_dict[f"{DEEP}.resblocks.1.ln_2.bias"]
    state_dict[f"{DEEP}.resblocks.9.ln_2.bias"] = torch.zeros(64)
    state_dict[f"{SIDE}.query_embed"] = state_dict[f"{SIDE}.query_embed"][:, :9]
    state_dict[f"{SIDE}.vit_model.patch_embed.proj.bias"] = torch.zeros(48, dtype=torch.int64)
    source = write(tmp_path / "broken.pth", {"model": state_dict})
    message = refuse(tmp_path, source, b16.config(), "broken.pth")
    assert f"Missing keys: {DEEP}.resblocks.1.ln_2.bias." in message
    assert f"Unknown keys: {DEEP}.resblocks.9.ln_2.bias." in message
    assert f"{SIDE}.query_embed (got (1, 9, 48), expected (1, 10, 48))" in message
    assert f"{SIDE}.vit_model.patch_embed.proj.bias (got torch.int64, expected a floating-point type)" in message


def test_every_key_counts(golden):
    """Catches any single key whose loss or change of shape goes unnoticed; two are known to hold nothing learned."""
    state_dict = golden.original_state_dict
    learned = [key for key in state_dict if key not in ("criterion.empty_weight", f"{TEXT}.attn_mask")]
    listed = rf": .* and {len(learned) - 8} more\."  # 8 are named
    with pytest.raises(ConversionError, match="Missing keys" + listed):
        convert_state_dict({key: state_dict[key] for key in state_dict if key not in learned}, golden.config())
    with pytest.raises(ConversionError, match="Wrong shapes, types or values" + listed):
        convert_state_dict({key: tensor[None] for key, tensor in state_dict.items()}, golden.config())
    convert_state_dict({key: state_dict[key] for key in learned}, golden.config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scale_of_pixels(golden, dtype):
    """Catches checkpoints refused for the image scale they carry, and one in other units or blue first."""
    scale = {
        "pixel_mean": torch.tensor([122.7709383, 116.7460125, 104.09373615]).to(dtype).view(-1, 1, 1),
        "pixel_std": torch.tensor([68.5005327, 66.6321579, 70.32316305]).to(dtype).view(-1, 1, 1),
    }
    known = golden.original_state_dict
    converted = convert_state_dict({**known, **scale}, golden.config())
    assert equal(converted, convert_state_dict(dict(known), golden.config()))
    for key in scale:
        for wrong in (scale[key] / 255, scale[key].flip(0), scale[key][:2]):
            with pytest.raises(ConversionError, match=f"values: {key} .got .*, expected CLIP's"):
                convert_state_dict({**known, key: wrong}, golden.config())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.00001, 0.5, 0.9999])
def test_truncated_file(b16, tmp_path, share, legacy):
    """Catches half a download that is converted, or that ends in an error which doesn't name the file."""
    source = write(tmp_path / "cut.pth", {"model": b16.original_state_dict}, _use_new_zipfile_serialization=not legacy)
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    refuse(tmp_path, source, b16.config(), "cut.pth' can't be read as a checkpoint: it is truncated")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_something_in_place_of_a_checkpoint(tmp_path, b16, content, expected, suffix):
    """Catches a download that went wrong being called a damaged archive, without what to do."""
    (tmp_path / f"san{suffix}").write_bytes(content)
    refuse(tmp_path, tmp_path / f"san{suffix}", b16.config(), f"san{suffix}' {expected}")


def test_truncated_safetensors(b16, tmp_path):
    """As above, for the other format."""
    save_file(b16.original_state_dict, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    refuse(tmp_path, tmp_path / "cut.safetensors", b16.config(), "cut.safetensors' can't be read as a checkpoint")


def test_one_bit_that_is_wrong(b16, tmp_path):
    """Catches damaged weights that are converted without a word: torch doesn't look at the file's checksums."""
    source = write(tmp_path / "flipped.pth", {"model": b16.original_state_dict})
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    refuse(tmp_path, source, b16.config(), "flipped.pth' can't be read as a checkpoint.* isn't as it was written")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_code_in_the_pickle(b16, tmp_path, how):
    """Catches a checkpoint that runs its publisher's code."""
    source, marker = tmp_path / "evil.pth", tmp_path / "it-ran"
    content = {"model": b16.original_state_dict, "optimizer": Payload(marker)}
    if how == "pickle":
        source.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=how == "torch")
    refuse(tmp_path, source, b16.config(), "evil.pth")
    assert not marker.exists()
    if how != "pickle":
        refuse(tmp_path, source, b16.config(), r"evil.pth' is refused: beside tensors it holds .*\((posix|nt)\.mkdir\)")


@pytest.mark.parametrize(
    "content, match",
    [
        ([torch.zeros(1)], "holds a list: expected a state dict"),
        ({}, "holds an empty dict"),
        ({"model": {}, "epoch": 3}, "holds an empty dict"),
        ({"epoch": 3, "lr": 0.1}, "epoch, lr are not tensors"),
        ({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)}, f"has no {VISION}.conv1.weight, but conv.weig"),
        ({f"{VISION}.conv1.weight": torch.zeros(64, 3, 16, 16)}, r"Unknown sizes.*\(64, 3, 16, 16\).*Pass the conf"),
        ({f"{VISION}.conv1.weight": torch.zeros(768, 3, 16, 16)}, f"Missing keys: {SIDE}.query_embed, "),
    ],
)
def test_something_else_in_the_file(tmp_path, content, match):
    """Catches another model's checkpoint that ends in a KeyError, or sizes that are guessed."""
    refuse(tmp_path, write(tmp_path / "other.pth", content), None, f"(?s)(other.pth.*)?{match}")


def test_no_such_file(tmp_path, b16):
    """Catches an error that speaks of anything but the path the user gave."""
    refuse(tmp_path, tmp_path / "none.pth", None, "There is no checkpoint '.*none.pth'", FileNotFoundError)
    refuse(tmp_path, tmp_path, None, "is a folder", IsADirectoryError)
    (tmp_path / "text.pth").write_text("not a checkpoint " * 100)
    refuse(tmp_path, tmp_path / "text.pth", None, "text.pth' can't be read as a checkpoint")


def test_unfit_configurations(tmp_path, b16):
    """Catches a configuration of something else, or one whose vocabulary would be lost without a word."""

    def config(name, **values):
        (tmp_path / name).write_text(json.dumps(values))
        return tmp_path / name

    source = b16.checkpoint
    saved = b16.config().to_dict()
    refuse(tmp_path, source, tmp_path / "none.json", "There is no configuration '.*none.json'", FileNotFoundError)
    refuse(tmp_path, source, config("clip.json", model_type="clip"), "clip.json.*its model_type is 'clip'")
    bad = config("bad.json", **{**saved, "hidden_size": "wide"})
    refuse(tmp_path, source, bad, "bad.json' isn't a valid configuration.*hidden_size")
    (tmp_path / "cut.json").write_text("{")
    refuse(tmp_path, source, tmp_path / "cut.json", "cut.json' is no JSON")
    refuse(tmp_path, source, b16.config(vocabulary_size=2), "vocabulary of 2 classes")
    refuse(tmp_path, source, b16.config(num_queries=11), r"query_embed \(got \(1, 10, 48\), expected \(1, 11, 48\)\)")
    refuse(tmp_path, source, SANConfig(), "Missing keys")


def test_output_that_exists(b16, tmp_path):
    """Catches files of the user's that are overwritten or deleted."""
    output, config = tmp_path / "out", b16.config()
    output.mkdir()
    convert_checkpoint(b16.checkpoint, output, config)  # an empty folder is as good as none
    with pytest.raises(FileExistsError, match="out' exists already"):
        convert_checkpoint(b16.checkpoint, output, config)
    (output / "old").touch()
    convert_checkpoint(b16.checkpoint, output, config, overwrite=True)
    assert (output / "config.json").exists() and not (output / "old").exists()

    inside = write(output / "inside.pth", b16.original_state_dict)
    with pytest.raises(FileExistsError, match="holds '.*inside.pth' itself"):
        convert_checkpoint(inside, output, config, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="isn't a model folder"):
        convert_checkpoint(b16.checkpoint, tmp_path / "photos", config, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        convert_checkpoint(b16.checkpoint, tmp_path / "file", config, overwrite=True)
    assert inside.exists() and (tmp_path / "photos" / "cat.jpg").exists() and (tmp_path / "file").is_file()


def test_failure_half_way(b16, tmp_path, monkeypatch):
    """Catches a folder that looks complete although writing it failed, and a good old one that is lost to that."""
    output = tmp_path / "out"
    convert_checkpoint(b16.checkpoint, output, b16.config())
    before = sorted(path.name for path in output.iterdir())

    def fail(config):
        raise OSError("no space left on device")

    monkeypatch.setattr(san_hf.conversion.convert, "build_processor", fail)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(b16.checkpoint, output, b16.config(), overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == before
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(b16.checkpoint, tmp_path / "new", b16.config())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX's locks and SIGKILL")
def test_one_conversion_at_a_time(b16, tmp_path):
    """Catches two that write the same folder; what one that was killed has left is no obstacle."""
    output = tmp_path / "out"
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:  # as a conversion in the midst of it
        with locked(tmp_path / ".out.lock", "A conversion"), new_folder(output):
            os.write(theirs, b"x")
            time.sleep(60)
    os.read(ours, 1)
    try:
        with pytest.raises(InUseError, match=f"A conversion to '.*out' is under way already, by process {child} on"):
            convert_checkpoint(b16.checkpoint, output, b16.config())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    convert_checkpoint(b16.checkpoint, output, b16.config())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(b16, folder, tmp_path, monkeypatch):
    """Catches errors of safetensors and torch that name no file and aren't expected by the command."""

    def fail(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(SANForSemanticSegmentation, "save_pretrained", fail)
    with pytest.raises(OSError, match="out' can't be written: No space left on device. Make room"):
        convert_checkpoint(b16.checkpoint, tmp_path / "out", b16.config())
    save = torch.save

    def save_to_a_full_disk(content, file):
        with open("/dev/full", "wb", buffering=0) as full:
            save(content, full)

    monkeypatch.setattr(torch, "save", save_to_a_full_disk)
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="x.pth' can't be written: No space left on device. Make room"):
            export_checkpoint(folder, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


# And back


def test_round_trip(golden, tmp_path):
    """Catches any bit, name or type that isn't the same after converting and exporting; in half and in full."""
    original = golden.original_state_dict
    output = convert_checkpoint(golden.checkpoint, tmp_path / "out", golden.config())
    classes = len(golden.meta["vocabulary"])
    half = export_checkpoint(output, tmp_path / "half.pth", dtype=torch.float16, num_classes=classes)
    content = torch.load(half, weights_only=True)
    assert content.keys() == {"model"} and equal(content["model"], original)

    model = SANForSemanticSegmentation.from_pretrained(output)
    full = read_original(export_checkpoint(model, tmp_path / "full.pth", num_classes=classes))
    # 0.1 is no half: the class weights, which are computed, are nearer to it in full precision.
    weight = full.pop("criterion.empty_weight")
    assert weight.tolist() == [1.0] * classes + [pytest.approx(0.1, abs=1e-8)]
    del original["criterion.empty_weight"]
    assert equal(full, {key: tensor.float() for key, tensor in original.items()})


@pytest.mark.parametrize(
    "variant",
    [
        {"recognition_token": "learned"},
        {"recognition_token": "class+learned", "num_bias_heads": 1},
        {"rescale_attention_bias": False, "num_bias_layers": 2, "deep_supervision_layers": [2, 3, 4]},
        {"fusion_layers": [[3, 4], [0, 2]], "decoder_num_layers": 2},
    ],
)
def test_round_trip_of_variants(b16, variant, tmp_path):
    """Catches a variant of the model with parameters that the layout doesn't know."""
    config = b16.config(**variant)
    model = SANForSemanticSegmentation(config)
    assert ("clip_rec_head.sos_token" in export_state_dict(model.state_dict(), config)) == (
        "learned" in config.recognition_token
    )
    output = convert_checkpoint(export_checkpoint(model, tmp_path / "model.pth"), tmp_path / "out", config)
    assert equal(load_file(output / "model.safetensors"), dict(model.state_dict()))


def test_export_refusals(folder, tmp_path, caplog):
    """Catches an export that lacks weights, loses a vocabulary without a word, or overwrites a file."""
    model = SANForSemanticSegmentation.from_pretrained(folder)
    (tmp_path / "there.pth").write_text("precious")
    with pytest.raises(FileExistsError, match="there.pth' exists already"):
        export_checkpoint(model, tmp_path / "there.pth")
    with pytest.raises(FileExistsError):
        export_checkpoint(model, tmp_path, overwrite=True)
    assert (tmp_path / "there.pth").read_text() == "precious"

    without_bias = SANForSemanticSegmentation(SANConfig(**(model.config.to_dict() | {"num_bias_layers": 0})))
    with pytest.raises(ConversionError, match="without an attention bias"):
        export_checkpoint(without_bias, tmp_path / "unbiased.pth")
    assert not (tmp_path / "unbiased.pth").exists()

    model.set_vocabulary(["cat", "grass"], class_embeds=torch.eye(2, 32))
    exported = read_original(export_checkpoint(model, tmp_path / "there.pth", overwrite=True))
    assert "no place for the 2 class names" in caplog.text
    assert equal(exported, read_original(export_checkpoint(folder, tmp_path / "plain.pth")))

    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ConversionError, match="q_proj.weight.* missing.*lora_A.*merge_and_unload"):
        export_checkpoint(model, tmp_path / "lora.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "there.pth"]


def test_export_of_an_incomplete_folder(folder, tmp_path):
    """Catches an export that fills what is missing with random numbers, as Transformers does when it loads."""
    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.side_adapter.query_tokens"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="model' doesn't hold a complete SAN: .*query_tokens"):
        export_checkpoint(tmp_path / "model", tmp_path / "model.pth")

    weights["model.side_adapter.query_tokens"] = torch.zeros(1, 11, 48)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="model' doesn't hold a complete SAN: .*another shape: .*query_tokens"):
        export_checkpoint(tmp_path / "model", tmp_path / "model.pth")

    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConversionError, match="model' can't be loaded as a SAN"):
        export_checkpoint(tmp_path / "model", tmp_path / "model.pth")
    with pytest.raises(ConversionError, match="nothing' can't be loaded as a SAN"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


# The tokenizer


def test_tokenizer_is_clips():
    """Catches a vocabulary or merges that differ in any entry from those of CLIP's release."""
    tokenizer = clip_tokenizer()
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = json.dumps(backend["model"]["merges"])
    expected = "64b85eec9307ffac25105ea5c4a2f6538baa1728289342f6b9f2aba7a0bdc03a"
    assert hashlib.sha256(vocabulary.encode()).hexdigest() == expected
    expected = "66e3e95d342fce38063fd91c8ff3b3f2a75793db89a0416157bcc59e3812ab73"
    assert hashlib.sha256(merges.encode()).hexdigest() == expected


# Token ids that CLIP's released tokenizer gives: what people write beyond plain words.
TOKEN_IDS = {
    "a photo of a {}.": [320, 1125, 539, 320, 90, 92, 269],
    "Ångström café NAÏVE": [23176, 10352, 807, 7255, 332, 15304, 1097, 35689, 563],
    "don't they've I'LL": [847, 713, 889, 1200, 328, 1342],
    "🐈 on 👩\u200d👩\u200d👧 grass": [2074, 486, 525, 26304, 26304, 964, 356, 5922],
    "日本語の空 2024": [39121, 44353, 34002, 252, 21575, 163, 102, 374, 273, 271, 273, 275],
    "  wall-brick\t/ (other)  ": [2569, 268, 9518, 270, 263, 1010, 264],
    "ﬁeld \u00a0 İstanbul": [171, 105, 223, 5684, 328, 16384, 11231],
}


def test_token_ids(folder):
    """Catches another normalisation, splitting or byte alphabet than CLIP's, also after saving and loading."""
    tokenizer = SANProcessor.from_pretrained(folder).tokenizer
    for text, ids in TOKEN_IDS.items():
        assert tokenizer(text)["input_ids"] == [49406, *ids, 49407], text
    padded = tokenizer(["cat", "grass sky"], padding=True)
    assert padded["input_ids"][0] == [49406, 2368, 49407, 49407] and padded["attention_mask"][0] == [1, 1, 1, 0]
