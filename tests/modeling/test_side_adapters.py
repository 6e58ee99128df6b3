"""Side adapters without their CLIP: folders of what was trained, and several on one CLIP."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModel, AutoModelForSemanticSegmentation, CLIPModel

from san_hf import SANForSemanticSegmentation, SANProcessor
from san_hf.modeling import SANConfig
from san_hf.modeling.adapter_folder_san import active_lora, select_side_adapter
from tests.tiny import tiny_config, tiny_tokenizer


OUTPUTS = ("class_queries_logits", "masks_queries_logits", "mask_embeds", "attention_bias")
# Of another width, depth, number of queries and place of recognition than `tiny_config`.
OTHER_SIZE = {"hidden_size": 32, "num_queries": 7, "recognition_layer": 1, "fusion_layers": [[0, 0], [1, 1]]}


def save_clip(folder, seed: int = 0):
    torch.manual_seed(seed)
    CLIPModel(tiny_config().clip_config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("base") / "clip")


def new_model(base, seed: int = 0, **overrides) -> SANForSemanticSegmentation:
    """A SAN on `base` as after a training: the adapter's weights random, position embeddings moved."""
    fields = tiny_config().to_dict()
    kept = {name: fields[name] for name in SANConfig.__annotations__ if name in fields and name != "clip_config"}
    kept = {name: value for name, value in kept.items() if not name.startswith("base_model")} | overrides
    torch.manual_seed(seed)
    model = SANForSemanticSegmentation.from_clip(str(base), **kept)
    with torch.no_grad():
        for tensor in select_side_adapter(dict(model.named_parameters())).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@pytest.fixture(scope="module")
def model(base):
    return new_model(base)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder, adapter_only=True)
    return folder


@pytest.fixture(scope="module")
def roads(base):
    """Another adapter on the same CLIP, of another size and with a vocabulary."""
    model = new_model(base, seed=1, **OTHER_SIZE)
    model.set_vocabulary(["road", "car"], class_embeds=torch.randn(2, 16, generator=torch.manual_seed(2)))
    return model


@pytest.fixture(scope="module")
def roads_folder(roads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roads") / "roads"
    roads.save_pretrained(folder, adapter_only=True)
    return folder


@pytest.fixture(scope="module")
def inputs():
    generator = torch.manual_seed(3)
    return {
        "pixel_values": torch.randn(2, 3, 64, 48, generator=generator),
        "class_embeds": torch.randn(3, 16, generator=generator),
    }


@torch.no_grad()
def outputs_of(model, **kwargs):
    outputs = model(**kwargs)
    return {name: outputs[name] for name in OUTPUTS}


def assert_equal(got, expected):
    for name in OUTPUTS:
        assert torch.equal(got[name], expected[name]), name


# ---- one folder


def test_an_adapter_alone_brings_back_the_whole_model(model, adapter, inputs):
    """Parts that are left out, position embeddings of the base in place of the trained ones, a base that is filled at
    random, CLIP that travels along after all."""
    assert not (adapter / "model.safetensors").exists() and (adapter / "tokenizer.json").is_file()
    expected = outputs_of(model, **inputs)
    for load in (SANForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded, info = load.from_pretrained(adapter, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert not loaded.training
        assert_equal(outputs_of(loaded, **inputs), expected)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    inner = AutoModel.from_pretrained(adapter)
    with torch.no_grad():
        assert torch.equal(inner(inputs["pixel_values"]).mask_embeds, expected["mask_embeds"])
    assert SANProcessor.from_pretrained(adapter).image_processor.size.shortest_edge == model.config.image_size


def test_sizes_of_the_paper_s_models():
    """Tensors of CLIP in the file: a B/16 of 34 MB at most, half of that in half precision."""
    with torch.device("meta"):
        model = SANForSemanticSegmentation(SANConfig())
    count = sum(tensor.numel() for tensor in select_side_adapter(model.state_dict()).values())
    assert 8.0e6 < count and 4 * count < 34e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, adapter, inputs, dtype, base, tmp_path):
    """A digest that is compared with rounded values; a base that stays in float32, or is rounded twice."""
    loaded = SANForSemanticSegmentation.from_pretrained(adapter, dtype=dtype)
    whole = copy.deepcopy(model).to(dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for got, expected in zip(loaded.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(got, expected)
    whole.save_pretrained(tmp_path / "half", adapter_only=True)
    again = SANForSemanticSegmentation.from_pretrained(tmp_path / "half")
    for got, expected in zip(again.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(got, expected) and got.dtype == dtype
    size, half = ((folder / "side_adapter.safetensors").stat().st_size for folder in (adapter, tmp_path / "half"))
    assert half < 0.6 * size
    # A copy of the base that was saved in half precision is that base.
    CLIPModel.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "clip")
    from_copy = SANForSemanticSegmentation.from_pretrained(adapter, dtype=dtype, base_model=str(tmp_path / "clip"))
    for got, expected in zip(from_copy.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(got, expected)


def test_another_base_is_refused(model, adapter, tmp_path):
    """Masks and classes of another CLIP, which look possible."""
    other = save_clip(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match="SHA-256") as refused:
        SANForSemanticSegmentation.from_pretrained(adapter, base_model=str(other))
    assert model.config.base_model_sha256 is not None and model.config.base_model_sha256 in str(refused.value)
    assert len({word for word in str(refused.value).replace(",", "").split() if len(word.rstrip(".")) == 64}) == 2
    with pytest.raises(OSError, match="base_model="):
        SANForSemanticSegmentation.from_pretrained(adapter, base_model=str(tmp_path / "nothing"))


def test_a_base_that_moved(model, adapter, base, inputs, tmp_path):
    """An adapter that is lost with the place of its base."""
    moved = shutil.copytree(base, tmp_path / "moved")
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="gone"):
        SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter", base_model=str(moved))
    assert_equal(outputs_of(loaded, **inputs), outputs_of(model, **inputs))
    # Beside the adapter's folder it is found by itself, if it is that base.
    shutil.copytree(base, tmp_path / "gone")
    config["base_model_name_or_path"] = str(tmp_path / "elsewhere" / "gone")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    assert_equal(outputs_of(loaded, **inputs), outputs_of(model, **inputs))
    shutil.rmtree(tmp_path / "gone")
    save_clip(tmp_path / "gone", seed=9)
    with pytest.raises(ValueError, match="SHA-256"):
        SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter")


def test_a_trained_clip_is_refused(base, tmp_path):
    """An adapter without the CLIP that it was trained with."""
    model = new_model(base)
    with torch.no_grad():
        model.model.vision_model.encoder.layers[-1].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"1 of \d+ tensors differ.*mlp\.fc1\.weight.*LoRA"):
        model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_does_not_know_its_base(model, base, inputs, tmp_path):
    """A converted release: it has no base, until it is said which; and what isn't it is refused."""
    config = copy.deepcopy(model.config)
    for name in ("name_or_path", "revision", "sha256", "sha256_half"):
        setattr(config, f"base_model_{name}", None)
    whole = SANForSemanticSegmentation(config).eval()
    whole.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="base_model="):
        whole.save_pretrained(tmp_path / "adapter", adapter_only=True)
    with pytest.raises(ValueError, match="tensors differ"):
        other = str(save_clip(tmp_path / "other", seed=9))
        whole.save_pretrained(tmp_path / "adapter", adapter_only=True, base_model=other)
    whole.save_pretrained(tmp_path / "adapter", adapter_only=True, base_model=str(base))
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    assert_equal(outputs_of(loaded, **inputs), outputs_of(model, **inputs))


def test_folders_that_change_kind(model, adapter, inputs, tmp_path):
    """Weights of before beside the new ones: which count is then by chance."""
    folder = tmp_path / "folder"
    for adapter_only, file in ((False, "model.safetensors"), (True, "side_adapter.safetensors")) * 2:
        model.save_pretrained(folder, adapter_only=adapter_only)
        assert [path.name for path in folder.glob("*.safetensors")] == [file]
    shutil.copy(adapter / "side_adapter.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="both a side adapter"):
        SANForSemanticSegmentation.from_pretrained(folder)


def test_a_damaged_adapter(adapter, model, tmp_path):
    """Missing tensors that are filled at random, one by one or in a model with several."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "side_adapter.safetensors")
    del tensors["model.mask_decoder.bias_scaling.weight"]
    save_file(tensors, folder / "side_adapter.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors .*bias_scaling\.weight"):
        copy.deepcopy(model).load_side_adapter(folder, "damaged")
    with pytest.raises(ValueError, match=r"1 tensors .*bias_scaling\.weight"):
        SANForSemanticSegmentation.from_pretrained(folder)


def test_vocabulary_travels(roads, roads_folder, inputs):
    """Names without their embeddings, or the other way round."""
    loaded = SANForSemanticSegmentation.from_pretrained(roads_folder)
    assert loaded.config.id2label == {0: "road", 1: "car"}
    pixel_values = inputs["pixel_values"]
    assert_equal(outputs_of(loaded, pixel_values=pixel_values), outputs_of(roads, pixel_values=pixel_values))
    without = SANForSemanticSegmentation.from_pretrained(roads_folder, vocabulary_size=0)
    assert without.class_embeds is None


def test_a_damaged_processor_is_not_replaced(adapter, tmp_path):
    """Another processor in place of the model's own, with other sizes and templates, because that couldn't be read."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    model = SANForSemanticSegmentation.from_pretrained(folder)
    (folder / "processor_config.json").write_text("{")
    with pytest.raises((OSError, ValueError)):
        model.save_pretrained(tmp_path / "again", adapter_only=True)
    assert not (tmp_path / "again").exists()


# ---- several on one CLIP


def enable_checkpointing(model):
    # The older name is deprecated from transformers 5.23 on.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@pytest.fixture
def several(adapter, roads_folder):
    model = SANForSemanticSegmentation.from_pretrained(adapter)
    model.load_side_adapter(roads_folder, "roads")
    return model


def test_choosing(several, model, roads, inputs):
    """An adapter's parts that stay when another is chosen: its size, its vocabulary, its place of recognition."""
    pixel_values = inputs["pixel_values"]
    first, second = outputs_of(model, **inputs), outputs_of(roads, pixel_values=pixel_values)
    assert several.active_side_adapter == "default" and several.side_adapters == ["default", "roads"]
    for _ in range(2):
        assert_equal(outputs_of(several, **inputs), first)
        assert_equal(outputs_of(several, pixel_values=pixel_values, side_adapter="roads"), second)
        assert_equal(outputs_of(several.get_side_adapter("roads"), pixel_values=pixel_values), second)
        several.set_side_adapter("roads")
        assert several.active_side_adapter == "roads" and several.config.id2label == {0: "road", 1: "car"}
        assert_equal(outputs_of(several, pixel_values=pixel_values), second)
        assert_equal(outputs_of(several, **inputs, side_adapter="default"), first)
        several.set_side_adapter("default")
    several.set_side_adapter("roads")
    several.delete_side_adapter("default")
    assert several.side_adapters == ["roads"]
    assert_equal(outputs_of(several, pixel_values=pixel_values), second)


def test_memory(several, model, roads):
    """A CLIP for each adapter; tensors that switching copies."""

    def addresses(tensors):
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

    def all_tensors():
        return [
            tensor for name in several.side_adapters for tensor in several.get_side_adapter(name).state_dict().values()
        ]

    before = addresses(all_tensors())
    own = [tensor for m in (model, roads) for tensor in select_side_adapter(m.state_dict()).values()]
    clip = sum(p.numel() * p.element_size() for p in model.state_dict().values()) - sum(
        p.numel() * p.element_size() for p in select_side_adapter(model.state_dict()).values()
    )
    assert sum(before.values()) <= clip + sum(tensor.numel() * tensor.element_size() for tensor in own) + 64
    several.set_side_adapter("roads")
    assert addresses(all_tensors()) == before


def test_training_trains_the_active_one(several, inputs):
    """Gradients, optimisers and checkpoints that reach an adapter that isn't in use, or miss the one that is."""
    several.set_side_adapter("roads")
    several.train()
    before = {
        name: {key: tensor.clone() for key, tensor in several.get_side_adapter(name).state_dict().items()}
        for name in several.side_adapters
    }
    optimizer = torch.optim.AdamW((p for p in several.parameters() if p.requires_grad), lr=1e-2)
    labels = torch.zeros(2, 64, 48, dtype=torch.int64)
    labels[:, 32:] = 1
    several(inputs["pixel_values"], labels=labels).loss.backward()
    optimizer.step()
    trained = select_side_adapter(several.state_dict())
    assert set(trained) == set(select_side_adapter(before["roads"]))
    moved = {key for key, tensor in several.state_dict().items() if not torch.equal(tensor, before["roads"][key])}
    assert moved and moved <= set(trained)
    assert {key for key in trained if key.startswith("model.side_adapter.layers.0")} <= moved
    for key, tensor in several.get_side_adapter("default").state_dict().items():
        assert torch.equal(tensor, before["default"][key]), key


def test_what_is_done_to_a_model_is_done_to_its_adapters(several, inputs):
    """An adapter left in another dtype, in training mode, without checkpointing, or with another attention."""
    several.set_attn_implementation("eager")
    enable_checkpointing(several.train())
    several.eval().to(torch.bfloat16)
    for name in several.side_adapters:
        other = several.get_side_adapter(name)
        assert {p.dtype for p in other.parameters()} == {torch.bfloat16}, name
        assert not any(module.training for module in other.modules()), name
        assert all(layer.gradient_checkpointing for layer in other.model.side_adapter.layers), name
        assert {layer.attention.config._attn_implementation for layer in other.model.side_adapter.layers} == {"eager"}
    copied = copy.deepcopy(several)
    shared = copied.get_side_adapter("roads").model.vision_model.encoder
    assert shared is copied.model.vision_model.encoder and shared is not several.model.vision_model.encoder
    several.set_side_adapter("roads")
    pixel_values = inputs["pixel_values"].bfloat16()
    expected = outputs_of(several, pixel_values=pixel_values)
    assert_equal(outputs_of(copied, pixel_values=pixel_values, side_adapter="roads"), expected)


def test_gradient_checkpointing_after_a_switch(several, inputs):
    """Recomputation by another adapter's blocks, or none at all."""
    labels = torch.zeros(2, 64, 48, dtype=torch.int64)
    gradients = []
    several.set_side_adapter("roads")
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(several)
        several.train().zero_grad()
        torch.manual_seed(0)
        several(inputs["pixel_values"], labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in several.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_compiled_after_a_switch(several, inputs):
    """A compiled graph with the weights of the adapter that was active when it was made."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(several, backend=counter)
    pixel_values = inputs["pixel_values"]
    for name in ("default", "roads", "default", "roads"):
        several.set_side_adapter(name)
        kwargs = inputs if name == "default" else {"pixel_values": pixel_values}
        assert_equal(outputs_of(compiled, **kwargs), outputs_of(several, **kwargs))
        frames = counter.frame_count if name == "roads" else 0
    assert counter.frame_count == frames, "compiled again for an adapter that was compiled before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, folder: model.load_side_adapter(folder, "default"), "'default' already"),
        (lambda model, folder: model.load_side_adapter(folder, ""), "Got '' as the side adapter's name"),
        (lambda model, folder: model.load_side_adapter(folder, None), "Got None as the side adapter's name"),
        (lambda model, folder: model.set_side_adapter("rods"), "no side adapter 'rods'; there are 'default', 'roads'"),
        (lambda model, folder: model(torch.zeros(1, 3, 64, 64), side_adapter="rods"), "no side adapter 'rods'"),
        (lambda model, folder: model.delete_side_adapter("default"), "active side adapter"),
        (lambda model, folder: model.load_side_adapter(folder.parent, "whole"), "config.json|side adapter"),
    ],
    ids=["taken", "empty", "no text", "unknown", "unknown in a call", "active", "none there"],
)
def test_names(several, roads_folder, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        change(several, roads_folder)


def test_an_adapter_of_another_clip(several, tmp_path):
    """An adapter that recognises by a CLIP that isn't there."""
    stranger = new_model(save_clip(tmp_path / "clip", seed=9))
    stranger.save_pretrained(tmp_path / "adapter", adapter_only=True)
    with pytest.raises(ValueError, match="isn't the CLIP that this side adapter was trained on"):
        several.load_side_adapter(tmp_path / "adapter", "stranger")
    assert several.side_adapters == ["default", "roads"]


# ---- LoRA


def add_lora(model, seed: int = 5):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "default")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def test_lora_beside_a_side_adapter(adapter, roads_folder, base, model, inputs, tmp_path):
    """LoRA that freezes the side adapter, is lost when saved or loaded, stays in force for other adapters, or makes the
    digest of CLIP another one."""
    adapted = SANForSemanticSegmentation.from_pretrained(adapter)
    add_lora(adapted)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(".lora_" in name for name in trainable)
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= trainable
    assert not any("base_layer" in name for name in trainable)
    adapted.set_vocabulary(["red", "green"], class_embeds=inputs["class_embeds"][:2])
    adapted.eval()
    expected = outputs_of(adapted, **inputs)
    for kind in (True, False):
        folder = tmp_path / f"{kind}"
        adapted.save_pretrained(folder, adapter_only=kind)
        assert (folder / "lora" / "adapter_config.json").is_file() and not (folder / "adapter_config.json").exists()
        loaded = SANForSemanticSegmentation.from_pretrained(folder)
        assert_equal(outputs_of(loaded, **inputs), expected)
        assert loaded.config.id2label == {0: "red", 1: "green"}
    assert torch.equal(loaded.class_embeds, adapted.class_embeds)

    several = SANForSemanticSegmentation.from_pretrained(adapter)
    several.load_side_adapter(tmp_path / "True", "lora")
    several.load_side_adapter(roads_folder, "roads")
    assert_equal(outputs_of(several, **inputs), outputs_of(model, **inputs))
    with pytest.raises(ValueError, match=r"set_side_adapter\('lora'\)"):
        several(**inputs, side_adapter="lora")
    several.set_side_adapter("lora")
    assert_equal(outputs_of(several, **inputs), expected)
    several.set_side_adapter("roads")
    road_model = SANForSemanticSegmentation.from_pretrained(roads_folder)
    pixel_values = inputs["pixel_values"]
    assert_equal(outputs_of(several, pixel_values=pixel_values), outputs_of(road_model, pixel_values=pixel_values))
    several.delete_side_adapter("lora")
    several.set_side_adapter("default")
    assert_equal(outputs_of(several, **inputs), outputs_of(model, **inputs))
    assert not any(".lora_" in name for name in several.state_dict())


def test_dora_beside_a_side_adapter(adapter, inputs, tmp_path):
    """DoRA's magnitudes, which Transformers' own loader leaves as new: another function, without a word."""
    adapted = SANForSemanticSegmentation.from_pretrained(adapter)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    magnitudes = [parameter for name, parameter in adapted.named_parameters() if "lora_magnitude_vector" in name]
    with torch.no_grad():
        for magnitude in magnitudes:
            magnitude.mul_(1.5)
    expected = outputs_of(adapted.eval(), **inputs)
    for kind in (True, False):
        adapted.save_pretrained(tmp_path / f"{kind}", adapter_only=kind)
        assert_equal(outputs_of(SANForSemanticSegmentation.from_pretrained(tmp_path / f"{kind}"), **inputs), expected)
    several = SANForSemanticSegmentation.from_pretrained(adapter)
    several.load_side_adapter(tmp_path / "True", "dora")
    several.set_side_adapter("dora")
    assert magnitudes and all(parameter.requires_grad for parameter in magnitudes)
    assert_equal(outputs_of(several, **inputs), expected)
    weights = tmp_path / "True" / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[next(key for key in tensors if "magnitude" in key)]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"1 LoRA tensors are missing or unknown .*magnitude"):
        SANForSemanticSegmentation.from_pretrained(tmp_path / "True")


@pytest.mark.parametrize("adapter_only", [True, False])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoHaConfig(target_modules=["q_proj"]), "PEFT's LOHA on it"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mask_decoder"]), "copies of mask_decoder"),
    ],
    ids=["another method", "copies of modules"],
)
def test_what_peft_has_that_is_not_saved(adapter, tmp_path, config, message, adapter_only):
    """Weights that are saved where nothing reads them, or a folder that can't be loaded again."""
    adapted = SANForSemanticSegmentation.from_pretrained(adapter)
    adapted.add_adapter(config)
    with pytest.raises(ValueError, match=message):
        adapted.save_pretrained(tmp_path / "folder", adapter_only=adapter_only)
    assert not (tmp_path / "folder").exists()


def test_lora_added_beside_others(adapter, inputs, tmp_path):
    """New LoRA weights without any effect, as those of another side adapter have been switched off."""
    adapted = SANForSemanticSegmentation.from_pretrained(adapter)
    add_lora(adapted)
    adapted.save_pretrained(tmp_path / "lora", adapter_only=True)
    several = SANForSemanticSegmentation.from_pretrained(adapter)
    several.load_side_adapter(tmp_path / "lora", "lora")
    plain = outputs_of(several, **inputs)
    add_lora(several.eval())
    added = outputs_of(several, **inputs)
    assert active_lora(several) == ("default",) and not torch.equal(added["mask_embeds"], plain["mask_embeds"])
    several.set_side_adapter("lora")
    assert active_lora(several) == ("lora",)
    several.set_side_adapter("default")
    assert_equal(outputs_of(several, **inputs), added)
    several.disable_adapters()
    assert_equal(outputs_of(several, **inputs), plain)
    several.set_adapter("default")
    assert_equal(outputs_of(several, **inputs), added)


def test_lora_of_the_side_adapter_itself(adapter, inputs, tmp_path):
    """LoRA on layers that change places with the side adapter, and stay behind: another function, without a word."""
    adapted = SANForSemanticSegmentation.from_pretrained(adapter)
    adapted.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path / "lora", adapter_only=True)
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path / "lora")
    assert_equal(outputs_of(loaded, **inputs), outputs_of(adapted, **inputs))
    several = SANForSemanticSegmentation.from_pretrained(adapter)
    with pytest.raises(ValueError, match=r"LoRA weights of \d+ of the side adapter's own layers"):
        several.load_side_adapter(tmp_path / "lora", "lora")
    assert several.side_adapters == ["default"] and active_lora(several) == ()


def test_a_file_that_is_none(adapter, tmp_path):
    """An error of another library, without the file's name."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "side_adapter.safetensors").write_bytes(b"no tensors at all")
    for load in (SANForSemanticSegmentation.from_pretrained, lambda name: new_model_of(adapter, name)):
        with pytest.raises(OSError, match="side_adapter.safetensors' can't be read"):
            load(folder)


def new_model_of(adapter, other) -> None:
    SANForSemanticSegmentation.from_pretrained(adapter).load_side_adapter(other, "other")
