"""SANConfig: defaults, what it refuses, and its way through JSON."""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPConfig, PreTrainedConfig

from san_hf import SANConfig, SANForSemanticSegmentation
from tests.tiny import tiny_config


def test_defaults_are_the_paper_s_on_clip_b16():
    """A default that drifts from the releases: checkpoints converted without a configuration would be built wrong."""
    config = SANConfig()
    vision, text = config.clip_config.vision_config, config.clip_config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.patch_size, vision.image_size, vision.intermediate_size) == (16, 224, 3072)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (512, 12, 8)
    assert (config.clip_config.projection_dim, vision.hidden_act, vision.layer_norm_eps) == (512, "quick_gelu", 1e-5)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (240, 8, 6)
    assert (config.intermediate_size, config.hidden_act, config.layer_norm_eps) == (960, "gelu", 1e-6)
    assert (config.patch_size, config.image_size, config.num_queries) == (16, 640, 100)
    assert config.fusion_layers == [[0, 0], [3, 1], [6, 2], [9, 3]]
    assert (config.recognition_layer, config.num_deep_layers) == (9, 3)
    assert config.deep_supervision_layers == [7, 8]
    assert (config.clip_image_scale, config.recognition_token, config.bias_pooling) == (0.5, "class", "max")
    assert (config.num_bias_heads, config.num_bias_layers, config.rescale_attention_bias) == (None, 1, True)
    assert (config.mask_embed_dim, config.decoder_hidden_size, config.decoder_num_layers) == (256, 256, 3)
    assert (config.train_num_points, config.oversample_ratio, config.importance_sample_ratio) == (12544, 3.0, 0.75)
    assert (config.no_object_weight, config.class_weight, config.mask_weight, config.dice_weight) == (0.1, 2, 5, 5)
    assert config.freeze_clip and config.semantic_loss_ignore_index == 255 and config.vocabulary_size == 0


@pytest.mark.parametrize("auto", [False, True], ids=["SANConfig", "AutoConfig"])
def test_saved_and_loaded_equals(auto, tmp_path):
    """A field lost on disk, tuples that come back as lists, CLIP's sizes back at their defaults."""
    config = tiny_config(fusion_layers=((0, 0), (2, 1)), recognition_token="learned", id2label={0: "cat", 1: "dog"})
    config.save_pretrained(tmp_path)
    loaded = (AutoConfig if auto else SANConfig).from_pretrained(tmp_path)
    assert type(loaded) is SANConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.clip_config.vision_config.hidden_size == 32
    assert loaded.id2label == {0: "cat", 1: "dog"}


def test_clip_config_comes_as_dict_or_object():
    """A dict that stays a dict, or an object that is copied with other values."""
    as_dict = tiny_config()
    as_object = tiny_config(clip_config=CLIPConfig(**as_dict.clip_config.to_dict()))
    assert isinstance(as_dict.clip_config, CLIPConfig)
    assert as_object.to_dict() == as_dict.to_dict()


CONTRADICTIONS = {
    "heads": ({"num_attention_heads": 5}, "hidden_size (24) must be a multiple of num_attention_heads (5)"),
    "no deep layer": ({"recognition_layer": 4}, "recognition_layer (4) must leave at least one of CLIP's 4"),
    "negative recognition layer": ({"recognition_layer": -1}, "recognition_layer (-1)"),
    "no pair": ({"fusion_layers": [[0, 0, 0]]}, "fusion_layers must hold pairs"),
    "fusion from a deep layer": ({"fusion_layers": [[3, 1]]}, "fusion_layers has [3, 1], outside CLIP layers 0..2"),
    "fusion into no layer": ({"fusion_layers": [[0, 4]]}, "side adapter layers 0..3"),
    "fusion into one layer twice": ({"fusion_layers": [[0, 1], [2, 1]]}, "names a side adapter layer twice"),
    "no supervision": ({"deep_supervision_layers": []}, "must be ascending and not empty"),
    "unordered supervision": ({"deep_supervision_layers": [3, 2]}, "must be ascending and not empty, got [3, 2]"),
    "supervision out of range": ({"deep_supervision_layers": [0, 4]}, "must lie in 1..3"),
    "recognition token": ({"recognition_token": "cls"}, "recognition_token must be one of"),
    "pooling": ({"bias_pooling": "min"}, "bias_pooling must be one of"),
    "bias heads": ({"num_bias_heads": 3}, "num_bias_heads must be None, 1 or CLIP's 2 heads, got 3"),
    "bias layers": ({"num_bias_layers": 3}, "num_bias_layers must be 0, 1 or the number of deep CLIP layers"),
    "scale": ({"clip_image_scale": 0}, "clip_image_scale must be a number in 0.001..4.0, got 0"),
    "drop path": ({"drop_path_rate": 1.0}, "drop_path_rate must be a number in 0.0..0.999, got 1.0"),
    "CLIP's channels": ({"num_channels": 4}, "num_channels (4) must be CLIP's"),
    "image smaller than a patch": ({"image_size": 4, "patch_size": 8}, "image_size (4) must hold 1..1024 patches"),
    "nothing left for CLIP": ({"clip_image_scale": 0.01}, "clip_image_scale (0.01) must leave at least one"),
    "activation": ({"hidden_act": "nope"}, "hidden_act must be one of"),
    "vocabulary without names": ({"vocabulary_size": 3}, "vocabulary_size (3) must be the number of names in id2label"),
    "no queries": ({"num_queries": 0}, "num_queries must be an integer in 1..10000, got 0"),
    "no decoder": ({"decoder_num_layers": 0}, "decoder_num_layers must be an integer in 1..256, got 0"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name):
    """A contradiction that surfaces as a shape error, or as a model that is silently another one."""
    overrides, message = CONTRADICTIONS[name]
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        tiny_config(**overrides)


def test_all_contradictions_are_named_at_once():
    """A user who mends one value only to meet the next error."""
    with pytest.raises(StrictDataclassError, match="(?s)num_attention_heads.*bias_pooling.*num_bias_heads"):
        tiny_config(num_attention_heads=5, bias_pooling="min", num_bias_heads=3)
    with pytest.raises(StrictDataclassError, match="(?s)num_queries.*class_weight.*vision_config.patch_size"):
        tiny_config(
            num_queries=0,
            class_weight=float("nan"),
            clip_config={"vision_config": {"patch_size": 0}, "text_config": {}},
        )


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "24"), ("num_queries", 2.5), ("bias_pooling", None)])
def test_wrong_types_are_refused(field, value):
    """A string or fraction that passes for a number until deep in the model."""
    with pytest.raises(StrictDataclassError, match=field):
        tiny_config(**{field: value})


VALUES = (0, 1, -1, 3, 2.5, 1e9, 10**9, math.nan, math.inf, True, None, "nope")
CLIP_PARTS = (("clip_config",), ("clip_config", "vision_config"), ("clip_config", "text_config"))


def fields_of(*path: str) -> list[tuple[str, ...]]:
    part = tiny_config()
    for name in path:
        part = getattr(part, name)
    return [(*path, field.name) for field in dataclasses.fields(part) if not (path and "label" in field.name)]


FIELDS = [path for part in ((), *CLIP_PARTS) for path in fields_of(*part)]


def accepted(path: tuple[str, ...]) -> Iterator[tuple[object, SANConfig]]:
    """The values of a field that make a configuration; the others are refused in the field's name."""
    *parts, field = path
    clip_values = tiny_config().clip_config.to_dict()
    for value in VALUES:
        overrides = {field: value}
        if parts:
            clip_config = copy.deepcopy(clip_values)
            (clip_config if len(parts) == 1 else clip_config[parts[1]])[field] = value
            overrides = {"clip_config": clip_config}
        try:
            config = tiny_config(**overrides)
        except (StrictDataclassError, ValueError) as error:
            assert field in str(error), f"{value!r}: {error}"
        else:
            yield value, config


INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)}
NO_MATTER = {*INHERITED} - {"dtype", "output_hidden_states", "id2label", "label2id"}


@pytest.mark.parametrize(
    "path",
    [path for path in FIELDS if path[-1] not in (NO_MATTER if len(path) == 1 else INHERITED)],
    ids=".".join,
)
def test_every_field_is_refused_by_its_name(path):
    """A value that ends in a division by zero or another error of Python's that names no field."""
    assert len(list(accepted(path))) < len(VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_what_is_accepted_trains(path):
    """A value that surfaces as a shape error, a NaN or an empty memory deep in the model."""
    for value, config in accepted(path):
        if config.to_dict() == tiny_config().to_dict():
            continue
        model = SANForSemanticSegmentation(config).train()
        images, embeds = torch.randn(1, config.num_channels, 64, 64), torch.randn(2, config.clip_embed_dim)
        inputs = {"class_embeds": embeds, "labels": torch.randint(0, 2, (1, 64, 64)), "return_dict": True}
        if config.semantic_loss_ignore_index in (0, 1) and not config.ignore_index_is_class:
            # What the classes are is known with the labels only.
            with pytest.raises(ValueError, match="ignore_index_is_class"):
                model(images, **inputs)
            continue
        outputs = model(images, **inputs)
        outputs.loss.backward()
        assert outputs.loss.isfinite(), f"{path}={value!r}"
