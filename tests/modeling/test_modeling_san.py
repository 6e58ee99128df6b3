"""What the model does: classes in, outputs, losses, freezing, variants, bad input. (Its numbers: tests/parity.)"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AutoModel,
    AutoModelForSemanticSegmentation,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
)
from transformers.testing_utils import CaptureLogger

import san_hf.modeling.modeling_san
from san_hf import SANConfig, SANForSemanticSegmentation, SANModel
from tests.tiny import randomized, relative_difference, tiny_config


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- what is trained


L14 = {
    "clip_config": {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "image_size": 336,
        },
    },
    "recognition_layer": 18,
    "fusion_layers": [[0, 0], [6, 1], [12, 2], [18, 3]],
    "clip_image_scale": 0.7,
}


@pytest.mark.parametrize(("overrides", "expected"), [({}, 8_370_866), (L14, 9_321_650)], ids=["B/16", "L/14"])
def test_published_number_of_trainable_parameters(overrides, expected):
    """A layer too many or of another width, something of CLIP's left trainable, something of ours frozen."""
    with torch.device("meta"):
        model = SANForSemanticSegmentation(SANConfig(**overrides))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected


def test_clip_is_frozen_but_for_its_vision_positions(config, tmp_path):
    """Loading, which makes new parameters, thaws CLIP; a prefix match that freezes too much or too little."""
    model = SANForSemanticSegmentation(config)
    clip_parts = ("model.vision_model.", "model.visual_projection.", "text_model.", "text_projection.", "logit_scale")
    expected = {name for name, _ in model.named_parameters() if not name.startswith(clip_parts)}
    expected.add("model.vision_model.embeddings.position_embedding.weight")
    assert trainable(model) == expected
    model.save_pretrained(tmp_path)
    assert trainable(SANForSemanticSegmentation.from_pretrained(tmp_path)) == expected
    base = SANModel.from_pretrained(tmp_path)
    assert trainable(base) == {name.removeprefix("model.") for name in expected if name.startswith("model.")}
    loaded, info = SANForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert trainable(loaded) == expected and not info["missing_keys"]
    thawed = SANForSemanticSegmentation.from_pretrained(tmp_path, freeze_clip=False)
    assert trainable(thawed) == {name for name, _ in model.named_parameters()}
    position = "model.vision_model.embeddings.position_embedding.weight"
    all_frozen = SANForSemanticSegmentation.from_pretrained(tmp_path, freeze_positions=True)
    assert trainable(all_frozen) == expected - {position}
    assert trainable(SANModel.from_pretrained(tmp_path, freeze_positions=True)) == trainable(base) - {
        position.removeprefix("model.")
    }


# ---- where classes come from


@torch.no_grad()
def test_three_sources_of_classes_agree(model, pixel_values, input_ids):
    """Class names, their embeddings and a carried vocabulary that give different logits."""
    from_names = model(pixel_values, input_ids=input_ids).class_queries_logits
    class_embeds = model.get_class_embeds(input_ids)
    from_embeds = model(pixel_values, class_embeds=class_embeds).class_queries_logits
    model.set_vocabulary(["a", "b", "c", "d"], class_embeds=class_embeds)
    carried = model(pixel_values).class_queries_logits
    assert torch.equal(from_names, from_embeds) and torch.equal(from_names, carried)
    assert from_names.shape == (2, 5, 4 + 1)
    # Arguments win over the vocabulary, in the caller's order.
    reversed_order = model(pixel_values, class_embeds=class_embeds.flip(0)).class_queries_logits
    torch.testing.assert_close(reversed_order[..., :4].flip(-1), carried[..., :4])
    assert torch.equal(reversed_order[..., 4], carried[..., 4])


@torch.no_grad()
def test_class_embeds_are_the_normalised_mean_of_normalised_prompts(model, input_ids):
    """Templates that are averaged before they are normalised, or mixed across classes."""
    rows = []
    for prompts in input_ids:
        pooled = [model.text_model(prompt[None]).pooler_output[0] for prompt in prompts]
        embeds = [vector @ model.text_projection.weight.T for vector in pooled]
        mean = sum(embed / embed.norm() for embed in embeds) / len(embeds)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(model.get_class_embeds(input_ids), torch.stack(rows), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_padding_of_the_prompts_changes_nothing(model, input_ids):
    """Pooling at the last token instead of the end-of-text token; padding that is attended to."""
    padded = F.pad(input_ids, (0, 77 - input_ids.shape[-1]), value=513)
    mask = (torch.arange(77) < input_ids.shape[-1]).long().expand(padded.shape)
    short = model.get_class_embeds(input_ids)
    for long in (model.get_class_embeds(padded), model.get_class_embeds(padded, mask)):
        torch.testing.assert_close(long, short, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_prompts_are_encoded_in_portions(model, input_ids, monkeypatch):
    """Portions that are lost or put together in another order."""
    whole = model.get_class_embeds(input_ids)
    monkeypatch.setattr(san_hf.modeling.modeling_san, "TEXT_BATCH_SIZE", 5)
    torch.testing.assert_close(model.get_class_embeds(input_ids), whole, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_class_logits_are_cosine_similarities_at_clip_s_temperature(model, pixel_values, class_embeds):
    """A missing normalisation or temperature; the no-object row not last."""
    outputs = model(pixel_values, class_embeds=class_embeds)
    rows = torch.cat([class_embeds, model.no_object_embed])
    assert relative_difference(outputs.class_embeds, rows / rows.norm(dim=-1, keepdim=True)) < 1e-6
    torch.testing.assert_close(outputs.mask_embeds.norm(dim=-1), torch.ones(2, 5))
    cosine = F.cosine_similarity(outputs.mask_embeds[:, :, None], rows, dim=-1)
    assert relative_difference(outputs.class_queries_logits, math.exp(model.logit_scale) * cosine) < 1e-5


@torch.no_grad()
def test_vocabulary_travels_with_the_checkpoint(model, pixel_values, input_ids, tmp_path):
    """Embeddings or names that are not saved, or saved under the wrong index; a second vocabulary that adds up."""
    model.set_vocabulary(["x", "y"], class_embeds=torch.ones(2, 16))
    model.set_vocabulary(["sky", "grass", "cat", "dog"], input_ids=input_ids)
    assert model.config.id2label == {0: "sky", 1: "grass", 2: "cat", 3: "dog"}
    assert model.config.label2id == {"sky": 0, "grass": 1, "cat": 2, "dog": 3}
    assert model.config.vocabulary_size == model.config.num_labels == 4
    model.save_pretrained(tmp_path)
    loaded = SANForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.id2label == model.config.id2label
    expected = model(pixel_values, input_ids=input_ids)
    assert torch.equal(loaded(pixel_values).class_queries_logits, expected.class_queries_logits)
    assert "class_embeds" not in trainable(loaded)
    # The side adapter alone doesn't mind the vocabulary.
    assert torch.equal(SANModel.from_pretrained(tmp_path)(pixel_values).mask_embeds, expected.mask_embeds)


NAMES = ["road", "car"]


@pytest.mark.parametrize("loader", [SANForSemanticSegmentation, AutoModelForSemanticSegmentation])
@pytest.mark.parametrize(
    "asked",
    [
        {"id2label": dict(enumerate(NAMES))},
        {"label2id": {name: label for label, name in enumerate(NAMES)}},
        {"num_labels": 3},
        {"vocabulary_size": 3},
        {"num_labels": 3, "id2label": dict(enumerate([*NAMES, "sign"])), "ignore_mismatched_sizes": True},
        {"config": {"id2label": dict(enumerate(NAMES)), "vocabulary_size": 2}},
        {"config": {"id2label": dict(enumerate([*NAMES, "sign"])), "vocabulary_size": 3}},
    ],
    ids=str,
)
def test_other_names_for_carried_embeddings_are_refused(model, tmp_path, loader, asked):
    """Class embeddings of one vocabulary under another's names, whichever way these are given."""
    model.set_vocabulary(["sky", "grass"], class_embeds=torch.ones(2, 16))
    model.save_pretrained(tmp_path)
    if "config" in asked:
        asked = {"config": tiny_config(**asked["config"]), "ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match="contradicts the 2 class names.*set_vocabulary"):
        loader.from_pretrained(tmp_path, **asked)


def test_carried_names_change_by_set_vocabulary_only(model, tmp_path):
    """A renamed configuration of a loaded model; a vocabulary that can't be left out, or is lost without a word."""
    model.set_vocabulary(["sky", "grass"], class_embeds=torch.ones(2, 16))
    for field, value in (("id2label", dict(enumerate(NAMES))), ("num_labels", 3), ("label2id", {"car": 0, "sky": 1})):
        with pytest.raises(ValueError, match="contradicts"):
            setattr(model.config, field, value)
    model.save_pretrained(tmp_path)
    same = SANForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "sky", 1: "grass"}, num_labels=2)
    assert torch.equal(same.class_embeds, model.class_embeds)
    other = SANForSemanticSegmentation.from_pretrained(tmp_path, id2label=dict(enumerate(NAMES)), vocabulary_size=0)
    assert other.class_embeds is None and other.config.id2label == dict(enumerate(NAMES))
    model.set_vocabulary(NAMES, class_embeds=model.class_embeds)
    assert model.config.id2label == dict(enumerate(NAMES))
    model.model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="lacks the embeddings of the 2 classes"):
        SANForSemanticSegmentation.from_pretrained(tmp_path / "base")


@torch.no_grad()
def test_prompts_without_their_end_are_refused(model, input_ids):
    """Tokens of another tokenizer: every class would have the embedding of the beginning."""
    with pytest.raises(ValueError, match="without CLIP's end-of-text token"):
        model.get_class_embeds(input_ids[..., :-1])


def test_base_model_loads_in_silence(model, tmp_path):
    """A list of the text tower's parameters, as if something were wrong."""
    model.save_pretrained(tmp_path)
    with CaptureLogger(transformers.utils.logging.get_logger("transformers.modeling_utils")) as logged:
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not logged.out and type(loaded) is SANModel


# ---- on CLIP


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_towers_are_still_stock_clip(config, attn_implementation):
    """The hook in the deep layers that changes CLIP itself; parts that device maps and FSDP don't find."""
    config._attn_implementation = attn_implementation
    model = randomized(config)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}
    vision = CLIPVisionModel._from_config(config.clip_config.vision_config).eval()
    vision.load_state_dict(model.model.vision_model.state_dict())
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = vision(pixel_values, output_hidden_states=True)
    got = model.model.vision_model(pixel_values, output_hidden_states=True)
    for a, b in zip([got.pooler_output, *got.hidden_states], [expected.pooler_output, *expected.hidden_states]):
        torch.testing.assert_close(a, b)
    if attn_implementation == "eager":
        expected = vision(pixel_values, output_attentions=True).attentions
        got = model.model.vision_model(pixel_values, output_attentions=True).attentions
        assert len(got) == len(expected) == 4
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)
    text = CLIPTextModel._from_config(config.clip_config.text_config).eval()
    text.load_state_dict(model.text_model.state_dict())
    ids = torch.tensor([[512, 5, 6, 513]])
    torch.testing.assert_close(model.text_model(ids).pooler_output, text(ids).pooler_output)


@pytest.fixture
def clip_folder(config, tmp_path):
    """A CLIP checkpoint with 8 vision layers and patches of 14 pixels."""
    clip_config = config.clip_config.to_dict()
    clip_config["vision_config"] |= {"num_hidden_layers": 8, "patch_size": 14, "image_size": 28}
    clip = CLIPModel(CLIPConfig(**clip_config))
    with torch.no_grad():
        clip.logit_scale.fill_(1.5)
    clip.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@torch.no_grad()
def test_from_clip_takes_over_clip(clip_folder, tmp_path):
    """Weights left random or mixed up, a preprocessing of its own, defaults that don't follow CLIP's depth."""
    small = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    model = SANForSemanticSegmentation.from_clip(
        clip_folder, **small, num_queries=5, deep_supervision_layers=[3], image_size=64
    ).eval()
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    assert (model.config.hidden_size, model.config.num_queries) == (24, 5)
    model.save_pretrained(tmp_path / "san")
    assert str(clip_folder) not in (tmp_path / "san" / "config.json").read_text()  # it is a path of this machine
    assert (model.config.recognition_layer, model.config.clip_image_scale) == (6, 0.7)
    assert model.config.fusion_layers == [[0, 0], [2, 1], [4, 2], [6, 3]]
    state = model.state_dict()
    for name, tensor in clip.state_dict().items():
        ours = f"model.{name}" if name.startswith("vis") else name
        assert torch.equal(state[ours], tensor), name
    pixel_values, ids = torch.randn(1, 3, 28, 28), torch.tensor([[512, 5, 6, 513]])
    embeds = model.model.visual_projection(model.model.vision_model(pixel_values).pooler_output)
    torch.testing.assert_close(embeds, clip.visual_projection(clip.vision_model(pixel_values).pooler_output))
    expected = F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)
    torch.testing.assert_close(model.get_class_embeds(ids[None]), expected)
    assert not any(name.startswith("text_model") for name in trainable(model))


def test_from_clip_with_overrides(clip_folder):
    """Overrides that go to the wrong place: CLIP's loader or the configuration."""
    model = SANForSemanticSegmentation.from_clip(
        clip_folder,
        recognition_layer=4,
        fusion_layers=[[0, 0], [4, 2]],
        clip_image_scale=1.0,
        freeze_clip=False,
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    assert (model.config.recognition_layer, model.config.fusion_layers) == (4, [[0, 0], [4, 2]])
    assert model.config.clip_image_scale == 1.0
    assert model.dtype == torch.bfloat16
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert model.model.vision_model.config._attn_implementation == "eager"


def test_from_clip_refuses_what_is_no_clip(tmp_path, config):
    """A missing folder or another model's that ends in random weights."""
    with pytest.raises(OSError):
        SANForSemanticSegmentation.from_clip(tmp_path / "nothing")
    with pytest.raises(TypeError, match="num_querys"):
        CLIPModel(CLIPConfig(**config.clip_config.to_dict())).save_pretrained(tmp_path)
        SANForSemanticSegmentation.from_clip(tmp_path, num_querys=5)


# ---- outputs on request


@torch.no_grad()
def test_hidden_states_are_what_the_masks_are_decoded_from(model, pixel_values):
    """States collected at another place than they are used, of another layer, or that change the result."""
    plain = model.model(pixel_values)
    outputs = model.model(pixel_values, output_hidden_states=True, output_clip_feature_maps=True)
    assert torch.equal(outputs.masks_queries_logits, plain.masks_queries_logits)
    assert torch.equal(outputs.mask_embeds, plain.mask_embeds)
    assert plain.hidden_states is None and plain.clip_feature_maps is None
    assert len(outputs.hidden_states) == 3 + 1
    mask_logits, attention_bias = model.model.mask_decoder(outputs.hidden_states[-1], (7, 11))
    assert torch.equal(mask_logits, plain.masks_queries_logits)
    assert torch.equal(attention_bias, plain.attention_bias)
    # CLIP's maps are those of a stock CLIP on the image it sees.
    clip_image = F.interpolate(pixel_values, scale_factor=0.5, mode="bilinear")
    stock = model.model.vision_model(clip_image, output_hidden_states=True, interpolate_pos_encoding=True)
    assert len(outputs.clip_feature_maps) == 2 + 1
    for feature_map, tokens in zip(outputs.clip_feature_maps, stock.hidden_states):
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens[:, 1:])


@torch.no_grad()
def test_hidden_states_by_index(model, pixel_values):
    """An index that selects another layer, or a list that counts as True."""
    everything = model.model(pixel_values, output_hidden_states=True).hidden_states
    for selection, kept in [([0, -1], {0, 3}), (2, {2}), ([1], {1})]:
        some = model.model(pixel_values, output_hidden_states=selection).hidden_states
        assert {i for i, state in enumerate(some) if state is not None} == kept
        assert all(torch.equal(some[i], everything[i]) for i in kept)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attentions_are_distributions(config, pixel_values, class_embeds, attn_implementation):
    """Weights that are not what was applied; a recognition token that sees another; requests that change the result."""
    config._attn_implementation = attn_implementation
    model = randomized(config)
    plain = model(pixel_values, class_embeds=class_embeds)
    outputs = model(pixel_values, class_embeds=class_embeds, output_attentions=True)
    torch.testing.assert_close(outputs.class_queries_logits, plain.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert plain.attentions is None and plain.recognition_attentions is None
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 5 + 77, 5 + 77)] * 3
    # CLIP's grid is 3 x 5; behind its patches come the recognition tokens.
    assert [tuple(weights.shape) for weights in outputs.recognition_attentions] == [(2, 2, 5, 15 + 5)] * 2
    for weights in (*outputs.attentions, *outputs.recognition_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for weights in outputs.recognition_attentions:
        among_themselves = weights[..., 15:]
        assert torch.equal(among_themselves, among_themselves * torch.eye(5))
        assert (among_themselves.diagonal(dim1=-2, dim2=-1) > 0).all()


@torch.no_grad()
def test_tuple_outputs_and_what_is_handed_through(model, pixel_values, class_embeds):
    """`return_dict=False` with another order or content; image sizes that get lost."""
    image_sizes = torch.tensor([[56, 80], [48, 88]])
    named = model(pixel_values, class_embeds=class_embeds, image_sizes=image_sizes)
    unnamed = model(pixel_values, class_embeds=class_embeds, image_sizes=image_sizes, return_dict=False)
    assert named.image_sizes is image_sizes
    assert isinstance(unnamed, tuple) and len(unnamed) == len(named.to_tuple())
    assert all(torch.equal(a, b) for a, b in zip(unnamed, named.to_tuple()))
    assert torch.equal(unnamed[0], named.class_queries_logits)


@torch.no_grad()
def test_auxiliary_logits_are_those_of_the_earlier_layers(pixel_values, class_embeds):
    """Supervised layers that see each other in the deep pass they share, or come back in another order."""
    model = randomized(tiny_config(deep_supervision_layers=[1, 2, 3]))
    outputs = model(pixel_values, class_embeds=class_embeds, output_auxiliary_logits=True)
    assert len(outputs.auxiliary_logits) == 2
    for layer, logits in zip([1, 2, 3], [*outputs.auxiliary_logits, outputs]):
        model.config.deep_supervision_layers = [layer]
        alone = model(pixel_values, class_embeds=class_embeds)
        assert relative_difference(logits["masks_queries_logits"], alone.masks_queries_logits) < 1e-5
        assert relative_difference(logits["class_queries_logits"], alone.class_queries_logits) < 1e-5


@torch.no_grad()
def test_images_of_a_batch_are_independent(model, pixel_values, class_embeds):
    """Anything that mixes images: a reshape over the batch, a statistic of the batch."""
    together = model(pixel_values, class_embeds=class_embeds)
    for i in range(2):
        alone = model(pixel_values[i : i + 1], class_embeds=class_embeds)
        for name in ("class_queries_logits", "masks_queries_logits", "mask_embeds", "attention_bias"):
            assert relative_difference(together[name][i : i + 1], alone[name]) < 1e-5, name


# ---- losses


def test_loss_is_the_sum_of_its_weighted_parts(pixel_values, class_embeds, labels):
    """A part that is not added, not weighted, or weighted with another's weight."""
    config = tiny_config(deep_supervision_layers=[1, 2, 3])
    model = randomized(config)
    torch.manual_seed(0)
    outputs = model(pixel_values, class_embeds=class_embeds, labels=labels)
    parts = [f"loss_{part}{suffix}" for suffix in ("", "_0", "_1") for part in ("cross_entropy", "mask", "dice")]
    assert sorted(outputs.loss_dict) == sorted(parts)
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    config.class_weight, config.mask_weight, config.dice_weight = 4.0, 10.0, 10.0  # twice each: the same matching
    torch.manual_seed(0)
    doubled = model(pixel_values, class_embeds=class_embeds, labels=labels)
    for name, loss in outputs.loss_dict.items():
        torch.testing.assert_close(doubled.loss_dict[name], 2 * loss)


def test_semantic_map_equals_one_mask_for_each_class(model, pixel_values, class_embeds, labels):
    """Classes taken from the wrong value, the ignore index taken for a class, masks of another image."""
    torch.manual_seed(0)
    from_map = model(pixel_values, class_embeds=class_embeds, labels=labels)
    masks = [torch.stack([labels[0] == c for c in range(4)]).float(), (labels[1:] == 1).float()]
    torch.manual_seed(0)
    from_masks = model(
        pixel_values, class_embeds=class_embeds, mask_labels=masks, class_labels=[torch.arange(4), torch.tensor([1])]
    )
    assert from_map.loss_dict == from_masks.loss_dict
    # Another ignore index: 255 would be a class of its own, which isn't there.
    model.config.semantic_loss_ignore_index = 254
    torch.manual_seed(0)
    labels = labels.where(labels != 255, 254)
    assert model(pixel_values, class_embeds=class_embeds, labels=labels).loss_dict == from_map.loss_dict


def test_every_trainable_parameter_learns(model, pixel_values, class_embeds, labels):
    """A detached path: something trainable that no gradient reaches, or a frozen one that collects gradients."""
    model.train()(pixel_values, class_embeds=class_embeds, labels=labels).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == trainable(model)
    without = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    assert not without


@pytest.mark.parametrize("annotated", [0, 1])
def test_images_without_annotations(model, pixel_values, class_embeds, labels, annotated):
    """NaN from a division by no masks; with none in the batch, parameters that get no gradient (which stops
    distributed training)."""
    labels[annotated:] = 255
    outputs = model.train()(pixel_values, class_embeds=class_embeds, labels=labels)
    assert all(loss.isfinite() for loss in outputs.loss_dict.values())
    if not annotated:
        masks = [loss.item() for name, loss in outputs.loss_dict.items() if "cross_entropy" not in name]
        assert masks == [0.0] * 4
        # All queries are no-object.
        log_probability = outputs.class_queries_logits.log_softmax(-1)[..., -1]
        assert outputs.loss_dict["loss_cross_entropy"].item() == pytest.approx(-2 * log_probability.mean().item())
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.no_object_embed.grad.abs().max() > 0


def test_stochastic_depth(pixel_values):
    """Dropped branches at inference or in the first block; kept ones that aren't scaled up."""
    model = randomized(tiny_config(drop_path_rate=0.5)).model
    rates = [layer.drop_path.rate for layer in model.side_adapter.layers]
    assert rates == [0.0, 0.25, 0.5]
    with torch.no_grad():
        first, second = model(pixel_values), model(pixel_values)
        assert torch.equal(first.masks_queries_logits, second.masks_queries_logits)
        first, second = (model.train()(pixel_values).masks_queries_logits for _ in range(2))
        assert not torch.equal(first, second)
    drop_path = model.side_adapter.layers[2].drop_path
    kept = drop_path(torch.ones(20_000, 1, 1))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


# ---- variants


# Variants with the default's parameters, or fewer: the same weights must give another result.
VARIANTS = {
    "learned": {"recognition_token": "learned"},
    "class+learned": {"recognition_token": "class+learned"},
    "avg": {"bias_pooling": "avg"},
    "nearest": {"bias_pooling": "nearest"},
    "bilinear": {"bias_pooling": "bilinear"},
    "bicubic": {"bias_pooling": "bicubic"},
    "not rescaled": {"rescale_attention_bias": False},
    "scale 0.7": {"clip_image_scale": 0.7},
    "symmetric": {"clip_image_scale": 1.0},
    "other fusion": {"fusion_layers": [[2, 0], [1, 1], [0, 2]]},
    "earlier recognition": {"recognition_layer": 1, "fusion_layers": [[0, 0], [1, 1]]},
}
# Those with parameters of their own shape.
SHAPES = {
    "one bias head": {"num_bias_heads": 1},
    "deep biases": {"num_bias_layers": 2},
    "no bias": {"num_bias_layers": 0},
    "three supervised layers": {"deep_supervision_layers": [1, 2, 3]},
    "patch 14": {"patch_size": 14, "image_size": 56},
    "grey": {"num_channels": 1},
}


@pytest.mark.parametrize("name", [*VARIANTS, *SHAPES])
def test_variants_train_and_differ(name, model, pixel_values, class_embeds, labels):
    """A switch without effect; a variant that fails, or gives NaN, forward or backward."""
    overrides = (VARIANTS | SHAPES)[name]
    if "num_channels" in overrides:
        overrides = overrides | {"clip_config": tiny_config().clip_config.to_dict()}
        overrides["clip_config"]["vision_config"]["num_channels"] = 1
        pixel_values = pixel_values[:, :1]
    variant = randomized(tiny_config(**overrides))
    outputs = variant.train()(pixel_values, class_embeds=class_embeds, labels=labels)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in variant.parameters() if p.requires_grad)
    if name in VARIANTS:
        variant.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            default = model(pixel_values, class_embeds=class_embeds).class_queries_logits
            other = variant.eval()(pixel_values, class_embeds=class_embeds).class_queries_logits
        assert relative_difference(other, default) > 1e-3


# ---- bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), "pixel_values must be of shape (batch, 3, height, width), got (3, 64, 64)"),
        ((64,), "got (64,)"),
        ((1, 4, 64, 64), "got (1, 4, 64, 64)"),
        ((1, 3, 7, 64), "pixel_values of 7 x 64 are too small"),
        ((1, 3, 64, 15), "times 0.5, one of CLIP's (8)"),
        ((1, 3, 0, 0), "too small"),
    ],
)
def test_images_of_another_shape_are_refused(model, class_embeds, shape, message):
    """An error from the depths of a convolution."""
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(shape), class_embeds=class_embeds)


def test_raw_pixels_are_refused(model, class_embeds):
    """Pixel values 0..255 taken for normalised ones."""
    with pytest.raises(ValueError, match=re.escape("normalised floating point numbers, got torch.uint8")):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), class_embeds=class_embeds)


@torch.no_grad()
def test_smallest_image(model, class_embeds):
    """An image of one CLIP patch that fails in the interpolation of positions."""
    outputs = model(torch.randn(1, 3, 16, 16), class_embeds=class_embeds)
    assert outputs.masks_queries_logits.shape == (1, 5, 2, 2)
    assert outputs.class_queries_logits.isfinite().all()


def test_classes_that_do_not_fit_are_refused(model, pixel_values, input_ids, class_embeds):
    """No classes, two sources of them, embeddings of another CLIP, token ids of another shape or tokenizer."""
    cases = [
        ({}, "No classes: pass input_ids"),
        ({"input_ids": input_ids, "class_embeds": class_embeds}, "Got both input_ids and class_embeds"),
        ({"class_embeds": torch.ones(4, 15)}, "class_embeds must be of shape (classes, 16)"),
        ({"class_embeds": torch.ones(0, 16)}, "with at least one class, got (0, 16)"),
        ({"class_embeds": torch.ones(16)}, "got (16,)"),
        ({"input_ids": input_ids[0]}, "input_ids must be integers of shape (classes, templates, tokens)"),
        ({"input_ids": input_ids[:0]}, "No classes or no templates: input_ids is of shape (0, 3, 9)"),
        ({"input_ids": F.pad(input_ids, (0, 69))}, "at most 77 tokens"),
        ({"input_ids": input_ids.float()}, "torch.float32"),
        ({"input_ids": input_ids + 100}, "outside CLIP's vocabulary of 514 tokens"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            model(pixel_values, **arguments)


def test_unknown_arguments_are_refused(model, pixel_values, class_embeds, labels):
    """A misspelt argument that is silently ignored."""
    with pytest.raises(TypeError, match="semantic_labels"):
        model(pixel_values, class_embeds=class_embeds, semantic_labels=labels)


def test_vocabularies_that_do_not_fit_are_refused(model, input_ids, class_embeds):
    """Labels that name nothing, or two classes; a vocabulary half set."""
    cases = [
        ((["a", "b", "c", "d"],), {}, "either input_ids or class_embeds"),
        ((["a", "b", "c", "d"],), {"input_ids": input_ids, "class_embeds": class_embeds}, "and not both"),
        ((["a", "b", "c"],), {"class_embeds": class_embeds}, "Got 3 class names for 4 class embeddings"),
        ((["a", "b", "a", "d"],), {"class_embeds": class_embeds}, "repeated: ['a']"),
        (([],), {"class_embeds": class_embeds[:0]}, "at least one class"),
        (("abcd",), {"class_embeds": class_embeds}, "class_names must be a list of strings"),
        ((set("abcd"),), {"class_embeds": class_embeds}, "class_names must be a list of strings"),
        ((["a", "b", "c", 4],), {"class_embeds": class_embeds}, "class_names must be a list of strings"),
    ]
    before = model.config.to_dict()
    for arguments, keywords, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            model.set_vocabulary(*arguments, **keywords)
    assert model.config.to_dict() == before and model.class_embeds is None


def test_labels_that_do_not_fit_are_refused(model, pixel_values, class_embeds, labels):
    """A label outside the classes that becomes no-object, a map matched with another image's masks."""
    masks, classes = [torch.ones(2, 8, 8)] * 2, [torch.tensor([0, 1])] * 2
    cases = [
        ({"labels": labels + 1}, "labels of image 0 hold [4, 256], but there are 4 classes (0..3)"),
        ({"labels": labels - 1}, "hold [-1, 254]"),
        ({"labels": labels.float()}, "and dtype torch.float32"),
        ({"labels": labels[0]}, "of shape (batch, height, width), got shape (56, 88)"),
        ({"labels": labels[:1]}, "one entry for each of the 2 images, got 1"),
        ({"labels": labels, "mask_labels": masks, "class_labels": classes}, "Got both labels and mask_labels"),
        ({"mask_labels": masks}, "go together"),
        ({"class_labels": classes}, "go together"),
        ({"mask_labels": masks[:1], "class_labels": classes[:1]}, "one entry for each of the 2 images, got 1 and 1"),
        ({"mask_labels": masks, "class_labels": [classes[0], classes[0][:1]]}, "Image 1 needs mask_labels"),
        ({"mask_labels": [masks[0], masks[0][0]], "class_labels": classes}, "got (8, 8) and (2,)"),
        ({"mask_labels": masks, "class_labels": [classes[0], classes[0] + 3]}, "class_labels of image 1 hold [3, 4]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            model(pixel_values, class_embeds=class_embeds, **arguments)
