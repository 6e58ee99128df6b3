"""What anyone may do with a Transformers model: save, load, cast, place, compile, checkpoint, adapt, train."""

import copy
import json
import logging
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    CLIPModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.testing_utils import CaptureLogger

import san_hf.modeling
from san_hf import SANConfig, SANForSemanticSegmentation, SANImageProcessor, SANModel, SANProcessor
from tests.tiny import randomized, relative_difference, tiny_config


OUTPUTS = ("class_queries_logits", "masks_queries_logits", "mask_embeds", "attention_bias")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "san")
    return tmp_path / "san"


@torch.no_grad()
def assert_same_outputs(got, expected, pixel_values, class_embeds, tolerance=0.0):
    got, expected = (m(pixel_values, class_embeds=class_embeds) for m in (got, expected))
    for name in OUTPUTS:
        assert relative_difference(got[name].float(), expected[name].float()) <= tolerance, name


# ---- saving and loading


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"], ids=["one file", "shards"])
def test_saved_and_loaded_gives_the_same(model, pixel_values, class_embeds, tmp_path, shard_size):
    """A parameter that is not saved, not loaded, tied to another or renamed."""
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_size == "40KB")
    loaded, info = SANForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert_same_outputs(loaded, model, pixel_values, class_embeds)


@torch.no_grad()
def test_base_model_and_head_load_each_other_s_checkpoints(model, pixel_values, class_embeds, folder, tmp_path):
    """The prefix "model." lost or doubled: weights that are silently random."""
    base, info = SANModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(base(pixel_values).mask_embeds, model.model(pixel_values).mask_embeds)
    base.save_pretrained(tmp_path / "base")
    head, info = SANForSemanticSegmentation.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] and all(
        key.startswith(("text_model.", "text_projection.", "logit_scale", "no_object_embed"))
        for key in info["missing_keys"]
    )
    assert torch.equal(head.model(pixel_values).mask_embeds, base(pixel_values).mask_embeds)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str)
@torch.no_grad()
def test_half_precision(model, pixel_values, class_embeds, input_ids, folder, dtype, tolerance):
    """A tensor made in float32 in the middle; a mask value that is infinite in half precision and makes NaN. The
    images stay float32, as the processor makes them. Tolerance: a few units in the last place (2^-8, 2^-11)."""
    half = SANForSemanticSegmentation.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert half(pixel_values, class_embeds=class_embeds).mask_embeds.dtype == dtype
    # Against float32 with the same, rounded weights: what is measured is the computation.
    rounded = SANForSemanticSegmentation.from_pretrained(folder, dtype=dtype).float()
    assert_same_outputs(half, rounded, pixel_values, class_embeds, tolerance)
    assert_same_outputs(half, rounded, pixel_values.to(dtype), class_embeds, tolerance)
    embeds, expected = (m.get_class_embeds(input_ids) for m in (half, rounded))
    assert embeds.dtype == dtype and relative_difference(embeds.float(), expected) < tolerance


def dtypes(model) -> set[torch.dtype]:
    return {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}


@pytest.mark.parametrize(
    ("saved", "asked"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_every_parameter_has_the_dtype_asked_for(config, tmp_path, saved, asked):
    """Towers that keep the dtype that CLIP's own configurations name, whichever way the model comes: built on a CLIP,
    saved and loaded, by Auto classes and pipelines, or cast and saved again."""
    CLIPModel(config.clip_config).to(saved).save_pretrained(tmp_path / "clip")
    small = {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    small |= {"num_hidden_layers": 3, "deep_supervision_layers": [3], "num_queries": 5, "patch_size": 8}
    for options, expected in (({}, saved), ({"dtype": asked}, asked)):
        model = SANForSemanticSegmentation.from_clip(tmp_path / "clip", image_size=64, **small, **options)
        assert dtypes(model) == {expected}
    model = model.to(saved)
    model.set_vocabulary(["sky", "grass"], class_embeds=torch.randn(2, 16))
    model.save_pretrained(tmp_path / "san")
    SANImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "san")
    for part in ("clip_config", "clip_vision_config", "clip_text_config"):
        assert getattr(SANConfig.from_pretrained(tmp_path / "san"), part).dtype == saved
    for loader in (SANForSemanticSegmentation, SANModel, AutoModel, AutoModelForSemanticSegmentation):
        assert dtypes(loader.from_pretrained(tmp_path / "san")) == {saved}
        assert dtypes(loader.from_pretrained(tmp_path / "san", dtype=asked)) == {asked}
    segmenter = pipeline("image-segmentation", model=str(tmp_path / "san"), dtype=asked)
    assert dtypes(segmenter.model) == {asked}
    assert segmenter(PIL.Image.new("RGB", (64, 64), "blue"))


def test_loss_in_half_precision(model, pixel_values, class_embeds, labels):
    """Sums over thousands of points, or the matching, in 8 bits; half labels that meet float ones."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        outputs = model.to(dtype)(pixel_values, class_embeds=class_embeds, labels=labels)
        outputs.loss.backward()
        losses[dtype] = outputs.loss.item()
        assert outputs.loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=5e-2)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_autocast(config, pixel_values, class_embeds, labels, attn_implementation):
    """Masks in float32 beside queries in bfloat16; a loss computed in bfloat16."""
    config._attn_implementation = attn_implementation
    model = randomized(config).train()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(pixel_values, class_embeds=class_embeds, labels=labels)
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        assert outputs.loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(model, pixel_values, class_embeds, folder, device_map):
    """Parameters or buffers that stay on the meta device, which loading starts from."""
    loaded = SANForSemanticSegmentation.from_pretrained(folder, device_map=device_map)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert_same_outputs(loaded, model, pixel_values, class_embeds)


def test_offloading_parts_to_disk(model, pixel_values, class_embeds, folder, tmp_path):
    """A part called past its offloading hook: its weights are on the meta device then."""
    device_map = {
        "model.vision_model.embeddings": "cpu",
        "model.vision_model.pre_layrnorm": "cpu",
        "model.vision_model.encoder": "disk",
        "model.vision_model.post_layernorm": "cpu",
        "model.visual_projection": "disk",
        "model.side_adapter": "disk",
        "model.mask_decoder": "disk",
        "text_model": "disk",
        "text_projection": "disk",
        "logit_scale": "cpu",
        "no_object_embed": "cpu",
    }
    loaded = SANForSemanticSegmentation.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert_same_outputs(loaded, model, pixel_values, class_embeds)


def test_init_on_meta(config):
    """A value computed in `__init__`, which needs real numbers."""
    for model_class in (SANModel, SANForSemanticSegmentation):
        with torch.device("meta"):
            model = model_class(config)
        assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSemanticSegmentation])
def test_auto_classes(model, pixel_values, class_embeds, folder, config, auto_class):
    """A class that isn't registered, or under another's name."""
    expected = {AutoModel: SANModel, AutoModelForSemanticSegmentation: SANForSemanticSegmentation}[auto_class]
    assert type(AutoConfig.from_pretrained(folder)) is SANConfig
    assert type(auto_class.from_config(config)) is expected
    loaded = auto_class.from_pretrained(folder)
    assert type(loaded) is expected
    with torch.no_grad():
        reference = model(pixel_values, class_embeds=class_embeds)
        got = getattr(loaded, "model", loaded)(pixel_values)
    assert torch.equal(got.mask_embeds, reference.mask_embeds)


def test_auto_processors(tokenizer, tmp_path):
    """A processor that is loaded as another, or without its tokenizer."""
    SANProcessor(SANImageProcessor(), tokenizer).save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = SANProcessor(SANImageProcessor(), tokenizer)(images=image, text=["cat", "dog"])
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is SANProcessor
    for name, tensor in processor(images=image, text=["cat", "dog"]).items():
        assert torch.equal(tensor, expected[name]), name
    image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(image_processor).__name__.startswith("SANImageProcessor")
    assert torch.equal(image_processor(image, return_tensors="pt").pixel_values, expected.pixel_values)


def test_package_and_modeling_are_the_same_classes():
    """Two sets of classes, of which only one is registered."""
    assert san_hf.modeling.SANConfig is SANConfig
    assert san_hf.modeling.SANForSemanticSegmentation is SANForSemanticSegmentation


def test_pipeline_with_a_carried_vocabulary(model, class_embeds, tmp_path):
    """Code that knows nothing of text: the labels must be the carried names, the masks what post-processing says."""
    names = ["sky", "grass", "cat", "dog"]
    model.set_vocabulary(names, class_embeds=class_embeds)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (expected,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 80)])
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    with CaptureLogger(transformers.utils.logging.get_logger("transformers.pipelines.base")) as logged:
        by_path = pipeline("image-segmentation", model=str(tmp_path))
        by_object = pipeline("image-segmentation", model=model, image_processor=image_processor)
    assert "not supported" not in logged.out
    for segmenter in (by_path, by_object):
        segments = segmenter(image)
        assert {segment["label"] for segment in segments} == {names[i] for i in expected.unique()}
        for segment in segments:
            mask = torch.from_numpy(np.array(segment["mask"])) > 0
            assert torch.equal(mask, expected == names.index(segment["label"]))


@pytest.mark.parametrize(
    "changes",
    [{"id2label": {0: "a", 1: "b"}}, {"label2id": {"a": 0, "b": 1}}, {"num_labels": 3}, {"num_labels": 1}]
    + [{"id2label": {0: "a", 1: "b"}, "ignore_mismatched_sizes": True}],
)
def test_pipeline_keeps_carried_names(model, class_embeds, tmp_path, changes):
    """Catches names that a pipeline's `model_kwargs` give to the classes of others; without them it is as it was."""
    model.set_vocabulary(["sky", "grass"], class_embeds=class_embeds[:2])
    model.save_pretrained(tmp_path)
    SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* contradicts the 2 class names"):
        pipeline("image-segmentation", model=str(tmp_path), model_kwargs=changes)
    same = pipeline("image-segmentation", model=str(tmp_path), model_kwargs={"id2label": {0: "sky", 1: "grass"}})
    assert same.model.config.id2label == {0: "sky", 1: "grass"}


# ---- initialisation


def test_every_parameter_is_initialised_by_init_weights(config, tmp_path):
    """A parameter that `_init_weights` forgets: made on the meta device and missing in a checkpoint, it would be
    whatever the memory held. Its memory holds NaN here."""
    config.recognition_token, config.id2label = "class+learned", {0: "a", 1: "b", 2: "c"}
    config.vocabulary_size = 3
    with torch.device("meta"):
        model = SANForSemanticSegmentation(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    unset = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    assert not unset


def test_initialisation_depends_on_the_seed_alone(config):
    """Weights that are left to another generator, or to the order in which modules are made."""
    config.recognition_token = "learned"
    states = []
    for seed in (0, 0, 1):
        set_seed(seed)
        states.append(SANForSemanticSegmentation(copy.deepcopy(config)).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if "side_adapter" in name and "norm" not in name and first[name].any()]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def paper_decoder_config():
    """The paper's sizes wherever new weights depend on them, on a CLIP of few layers and with little text."""
    vision = {"hidden_size": 768, "intermediate_size": 64, "num_attention_heads": 12, "num_hidden_layers": 2}
    text = {"vocab_size": 514, "eos_token_id": 513, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return SANConfig(
        clip_config={"vision_config": vision | {"patch_size": 16}, "text_config": text | {"num_attention_heads": 2}},
        recognition_token="learned",
        recognition_layer=1,
        fusion_layers=[[0, 0], [1, 2]],
        num_hidden_layers=2,
        deep_supervision_layers=[1, 2],
    )


def test_new_weights_start_as_the_originals():
    """
    Another distribution. The original leaves each kind of layer to its library: the ViT's to timm, the fusion's to
    detectron2's Caffe2-like uniform, and those of decoder, patch convolution and bias scaling to PyTorch.
    """
    scalings = []
    for seed in range(5):
        set_seed(seed)
        model = SANForSemanticSegmentation(paper_decoder_config())
        adapter, decoder = model.model.side_adapter, model.model.mask_decoder
        scalings += [decoder.bias_scaling.weight.item(), decoder.bias_scaling.bias.item()]

        layer = adapter.layers[0]
        for tensor in (
            *(adapter.query_tokens, adapter.query_position_embeddings, adapter.position_embeddings),
            *(layer.mlp.fc1.weight, layer.mlp.fc2.weight, layer.attention.qkv.weight, layer.attention.proj.weight),
        ):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.02)
            assert tensor.abs().max().item() > 0.06  # normal: no uniform one of this deviation gets there
        fusion = adapter.fusions["2"].proj
        zero = [layer.mlp.fc1.bias, layer.attention.qkv.bias, fusion.bias]
        norms = [module for module in adapter.modules() if isinstance(module, nn.LayerNorm)]
        assert not any(bias.any() for bias in zero + [norm.bias for norm in norms])
        assert all((norm.weight == 1).all() for norm in norms)

        uniform = [(fusion.weight, 0.0625)]
        for linear in (adapter.patch_embedding, *decoder.query_mlp.layers, *decoder.pixel_mlp.layers):
            uniform += [(linear.weight, linear.weight[0].numel() ** -0.5), (linear.bias, None)]
        last = decoder.attention_mlp.layers[-1]
        assert last.weight.shape == (256 * 12, 256)
        uniform += [(last.weight, 1 / 16), (last.bias, 1 / 16)]
        for tensor, bound in uniform:
            if bound is not None:
                assert tensor.abs().max().item() == pytest.approx(bound, rel=0.02) and tensor.abs().max() <= bound
                assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        for linear in (adapter.patch_embedding, decoder.query_mlp.layers[0], last):
            limit = linear.weight[0].numel() ** -0.5
            assert 0.9 * limit < linear.bias.abs().max() <= limit
        assert model.model.recognition_tokens.std().item() == pytest.approx(768**-0.5, rel=0.05)

        # What that means: masks of nearly equal queries and pixels, and biases that steer CLIP a little.
        tokens = torch.randn(1, 100 + 400, 240)
        with torch.no_grad():
            mask_logits, attention_bias = decoder(tokens, (20, 20))
        unscaled = (attention_bias - decoder.bias_scaling.bias) / decoder.bias_scaling.weight
        assert 0.1 < mask_logits.std().item() < 0.2 and 0.08 < mask_logits.std(1).mean().item() < 0.15
        assert 0.1 < unscaled.std().item() < 0.25
    # Uniform in -1..1: ten of them are neither all of one sign nor close to each other.
    assert min(scalings) < -0.3 and max(scalings) > 0.3 and max(map(abs, scalings)) < 1


# ---- attention implementations


def gradients(model, pixel_values, class_embeds, labels) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(pixel_values, class_embeds=class_embeds, labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(got, expected, tolerance):
    assert got.keys() == expected.keys()
    # Relative to the largest of all: some are close to zero by nature.
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        assert (got[name] - expected[name]).abs().max() <= tolerance * largest, name


def test_eager_equals_sdpa(config, pixel_values, class_embeds, labels):
    """A mask that one of them applies otherwise; a backward pass that forgets the bias, in one of them."""
    config._attn_implementation = "eager"
    eager = randomized(config)
    sdpa = randomized(tiny_config(attn_implementation="sdpa"))
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    assert_same_outputs(sdpa, eager, pixel_values, class_embeds, 1e-5)
    batch = (pixel_values, class_embeds, labels)
    assert_same_gradients(gradients(sdpa.train(), *batch), gradients(eager.train(), *batch), 1e-5)


def test_attention_implementation_can_be_switched(model, pixel_values, class_embeds, caplog, monkeypatch):
    """A part of the model that keeps the old one: the hooked deep layers, the adapter, the towers."""
    calls = {"sdpa": 0}
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls["sdpa"] += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)

    def run():
        calls["sdpa"] = 0
        with torch.no_grad():
            return model(pixel_values, input_ids=torch.tensor([[[512, 5, 513]]])).class_queries_logits, calls["sdpa"]

    everything = 3 + 2 + 3 + 2  # CLIP's vision layers but the last, once more for the deep ones, adapter, text
    with caplog.at_level(logging.WARNING, logger="transformers"):
        for implementation, expected in [("eager", 0), ("sdpa", everything), ("eager", 0), ("sdpa", everything)]:
            model.set_attn_implementation(implementation)
            logits, number = run()
            assert number == expected, implementation
        # By parts: without the adapter; without CLIP.
        for part, expected in [({"": "eager"}, 7), ({"": "sdpa"}, 10), ({"clip_config": "eager"}, 3)]:
            model.set_attn_implementation(part)
            assert run()[1] == expected, part
    assert not caplog.records, caplog.text
    torch.testing.assert_close(run()[0], logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='attn_implementation="fast"` is not supported'):
        model.set_attn_implementation("fast")
    assert model.config.clip_config._attn_implementation == "eager"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_gradient_checkpointing(config, pixel_values, class_embeds, labels, use_reentrant, attn_implementation):
    """Layers that are recomputed otherwise, or whose gradients get lost on the way: the attention bias's."""
    config._attn_implementation = attn_implementation
    model = randomized(config).train()
    expected = gradients(model, pixel_values, class_embeds, labels)
    recomputed = []
    for layer in (model.model.vision_model.encoder.layers[-1], model.model.side_adapter.layers[-1]):
        # Before the MLP: recomputing stops where nothing more is needed.
        layer.mlp.register_forward_pre_hook(lambda module, args: recomputed.append(type(module).__name__))
    # transformers renames it: the old name warns, older versions don't have the new one.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": use_reentrant})
    got = gradients(model, pixel_values, class_embeds, labels)
    assert sorted(recomputed) == ["CLIPMLP"] * 2 + ["SideAdapterMLP"] * 2
    assert_same_gradients(got, expected, 1e-6)
    getattr(model, f"{kind}_checkpointing_disable")()
    assert_same_gradients(gradients(model, pixel_values, class_embeds, labels), expected, 1e-6)


# ---- compilation


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("classes", ["class_embeds", "input_ids"])
@torch.no_grad()
def test_forward_compiles_without_graph_breaks(config, pixel_values, classes, attn_implementation, request):
    """Python that depends on data in the forward pass."""
    config._attn_implementation = attn_implementation
    model = randomized(config)
    arguments = {classes: request.getfixturevalue(classes)}
    torch._dynamo.reset()
    counter = CompileCounter()
    got = torch.compile(model, fullgraph=True, backend=counter)(pixel_values, **arguments)
    assert counter.frame_count == 1
    expected = model(pixel_values, **arguments)
    for name in OUTPUTS:
        assert relative_difference(got[name], expected[name]) < 1e-5, name


@torch.no_grad()
def test_one_compiled_graph_for_all_image_sizes(pixel_values):
    """A size, or number of images, that is baked into the graph. Two graphs more are no fault of ours: CLIP's native
    grid, where its position embeddings aren't resized, and, with max pooling, each grid, which torch's adaptive max
    pooling makes a constant."""
    model = randomized(tiny_config(bias_pooling="avg"))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.model, fullgraph=True, backend=counter, dynamic=True)
    for images in (pixel_values, torch.randn(3, 3, 72, 96)):
        got, expected = compiled(images), model.model(images)
        for name in OUTPUTS[1:]:
            assert relative_difference(got[name], expected[name]) < 1e-5, name
    assert counter.frame_count == 1


@torch.no_grad()
def test_base_model_compiles_through_autograd_s_tracer(model, pixel_values):
    """Operators without a shape rule, or that alias their inputs: what backends see."""
    torch._dynamo.reset()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    got, expected = compiled(pixel_values), model.model(pixel_values)
    for name in OUTPUTS[1:]:
        assert relative_difference(got[name], expected[name]) < 1e-5, name


@pytest.mark.slow
@torch.no_grad()
def test_inductor(model, pixel_values, class_embeds):
    """Generated kernels that compute something else."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert_same_outputs(compiled, model, pixel_values, class_embeds, 1e-4)


@torch.no_grad()
def test_export(model, pixel_values, class_embeds):
    """Anything `torch.export` can't trace: exported programs are how models leave Python."""
    batch, classes = torch.export.Dim("batch"), torch.export.Dim("classes")
    program = torch.export.export(
        model,
        (pixel_values,),
        {"class_embeds": class_embeds},
        dynamic_shapes={"pixel_values": {0: batch}, "class_embeds": {0: classes}},
        strict=False,
    )
    images = torch.randn(3, 3, 56, 88)
    got, expected = (m(images, class_embeds=class_embeds[:3]) for m in (program.module(), model))
    for name in OUTPUTS:
        assert relative_difference(got[name], expected[name]) < 1e-5, name


# ---- copies, adapters


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(model, pixel_values, class_embeds, copied):
    """A copy whose hooked layers still look at the original's configuration."""
    duplicate = copied(model)
    assert_same_outputs(duplicate, model, pixel_values, class_embeds)
    duplicate.set_attn_implementation("eager")
    vision_config = duplicate.model.vision_model.config
    deep = duplicate.model.vision_model.encoder.layers[-1].self_attn.config
    assert deep.image_config is vision_config and vision_config._attn_implementation == "eager"
    assert model.model.vision_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        duplicate.no_object_embed.zero_()
    assert model.no_object_embed.any()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by the old name
def test_lora_on_clip_s_attention(model, pixel_values, class_embeds, labels, tmp_path):
    """Adapters that attach to the side adapter, too, or whose gradients stop at the hook; merging that changes the
    result."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian"))
    attached = {name.split(".lora_")[0] for name, _ in lora.named_parameters() if "lora_" in name}
    expected = {
        f"base_model.model.{tower}.encoder.layers.{i}.self_attn.{proj}"
        for tower, layers in (("model.vision_model", 4), ("text_model", 2))
        for i in range(layers)
        for proj in ("q_proj", "v_proj")
    }
    assert attached == expected
    lora.train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = lora(pixel_values, class_embeds=class_embeds, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0], losses
    for name, parameter in lora.named_parameters():
        if "lora_" not in name:
            original = before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert torch.equal(parameter, original), name
        elif "vision_model" in name:
            assert parameter.grad.abs().max() > 0, name
    lora.eval().save_pretrained(tmp_path)
    fresh = SANForSemanticSegmentation(model.config).eval()
    fresh.load_state_dict(before, strict=False)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert_same_outputs(reloaded, lora, pixel_values, class_embeds)
    assert_same_outputs(reloaded.merge_and_unload(), lora, pixel_values, class_embeds, 1e-5)


# ---- training


class Pictures(torch.utils.data.Dataset):
    """Eight images in halves of two colours, each a class."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        labels = torch.full((32, 32), i % 4)
        labels[:, 16:] = (i + 1) % 4
        colours = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [-2.0, -2.0, -2.0]])
        return {"pixel_values": colours[labels].permute(2, 0, 1), "labels": labels}


def train(model, tmp_path, **kwargs) -> Trainer:
    defaults = {"max_steps": 25, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=tmp_path, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        label_names=["labels"], **(defaults | kwargs),
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Pictures(), eval_dataset=Pictures())
    trainer.train()
    return trainer


def test_trainer_reduces_the_loss(config, class_embeds, tmp_path):
    """Labels that don't reach the loss, an optimiser without the right parameters, frozen weights that move."""
    model = SANForSemanticSegmentation(config)
    model.set_vocabulary(["red", "green", "blue", "dark"], class_embeds=class_embeds)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = train(model, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    parameters = dict(model.named_parameters())
    assert frozen and all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.7 * losses[0]


# ---- folders


def test_saved_folder_is_what_transformers_expects(folder):
    """Without `auto_map` and `architectures`, code that knows only the folder can't load it."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "san"
    assert config["architectures"] == ["SANForSemanticSegmentation"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_san.SANConfig",
        "AutoModel": "modeling_san.SANModel",
        "AutoModelForSemanticSegmentation": "modeling_san.SANForSemanticSegmentation",
    }
    assert config["clip_config"]["vision_config"]["hidden_size"] == 32
    assert "san_recognition" not in json.dumps(config)
