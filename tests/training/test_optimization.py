"""Parameter groups and schedule: against the recipe's figures."""

import pytest
import torch
from transformers import CLIPConfig

from san_hf.modeling import SANConfig, SANForSemanticSegmentation
from san_hf.training import parameter_groups, polynomial_schedule
from tests.tiny import tiny_config


VIT_B16 = {}
VIT_L14 = {
    "clip_config": CLIPConfig(
        projection_dim=768,
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "recognition_layer": 18,
    "fusion_layers": [[0, 0], [6, 1], [12, 2], [18, 3]],
    "clip_image_scale": 0.7,
}


def names_of(model, groups) -> list[set[str]]:
    """The parameter names of each group."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{name_of[id(parameter)] for parameter in group["params"]} for group in groups]


@pytest.mark.parametrize(
    ("arguments", "width", "positions", "total"), [(VIT_B16, 768, 197, 8_370_866), (VIT_L14, 1024, 577, 9_321_650)]
)
def test_groups_of_the_published_models(arguments, width, positions, total):
    """The recipe's trainable parameters, those without decay counted by hand from the paper's sizes."""
    with torch.device("meta"):
        model = SANForSemanticSegmentation(SANConfig(**arguments))
    decayed, undecayed = sorted(parameter_groups(model, 1e-4), key=lambda group: -group["weight_decay"])
    assert [group["weight_decay"] for group in (decayed, undecayed)] == [1e-4, 0.0]
    assert all(set(group) == {"params", "weight_decay"} for group in (decayed, undecayed))
    counts = [sum(parameter.numel() for parameter in group["params"]) for group in (decayed, undecayed)]
    norms = 8 * 2 * 2 * 240 + 4 * 2 * width
    embeddings = 2 * 100 * 240 + 40 * 40 * 240 + positions * width
    assert counts == [total - norms - embeddings, norms + embeddings]


def test_which_are_decayed():
    """By name, on a small model: a norm, bias or token in the wrong group changes what is learned."""
    model = SANForSemanticSegmentation(tiny_config(recognition_token="learned"))
    groups = sorted(parameter_groups(model, 0.5), key=lambda group: -group["weight_decay"])
    decayed, undecayed = names_of(model, groups)
    adapter = "model.side_adapter."
    assert undecayed == {
        "model.vision_model.embeddings.position_embedding.weight",
        *(adapter + name for name in ("query_tokens", "query_position_embeddings", "position_embeddings")),
        *(f"{adapter}layers.{i}.norm{k}.{p}" for i in range(3) for k in (1, 2) for p in ("weight", "bias")),
        *(f"{adapter}fusions.{i}.norm.{p}" for i in range(3) for p in ("weight", "bias")),
    }
    assert {
        "no_object_embed",
        "model.recognition_tokens",
        "model.mask_decoder.bias_scaling.weight",
        adapter + "layers.0.attention.qkv.bias",
        adapter + "fusions.0.proj.bias",
        adapter + "patch_embedding.weight",
    } <= decayed
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed | undecayed == trainable and not decayed & undecayed


def test_decay_in_a_step():
    """With zero gradients a step of AdamW shrinks what is decayed by lr * decay, and leaves the rest alone."""
    model = SANForSemanticSegmentation(tiny_config())
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    for name, factor in (
        ("model.mask_decoder.pixel_mlp.layers.0.weight", 0.95),
        ("model.side_adapter.query_tokens", 1.0),
        ("model.vision_model.embeddings.position_embedding.weight", 1.0),
        ("model.vision_model.encoder.layers.0.mlp.fc1.weight", 1.0),
    ):
        torch.testing.assert_close(after[name].detach(), factor * before[name])


def test_clip_at_its_own_rate():
    """With CLIP unfrozen: all of it, and nothing else, at the rate given; its norms and embeddings not decayed."""
    model = SANForSemanticSegmentation(tiny_config(freeze_clip=False))
    groups = parameter_groups(model, 1e-4, clip_learning_rate=1e-6)
    names = names_of(model, groups)
    assert sum(map(len, names)) == len(set().union(*names)) == len(list(model.named_parameters()))
    of_clip = ("model.vision_model.", "model.visual_projection.", "text_model.", "text_projection.", "logit_scale")
    for group, members in zip(groups, names):
        assert {name.startswith(of_clip) for name in members} == {group.get("lr") == 1e-6}
        assert group.get("lr") in (1e-6, None)
    undecayed = set().union(*(members for group, members in zip(groups, names) if not group["weight_decay"]))
    assert {
        "logit_scale",
        "text_model.embeddings.token_embedding.weight",
        "model.vision_model.embeddings.class_embedding",
        "model.vision_model.pre_layrnorm.weight",
        "model.side_adapter.query_tokens",
    } <= undecayed
    assert "model.vision_model.encoder.layers.0.self_attn.q_proj.bias" not in undecayed
    rates = {group["lr"] for group in torch.optim.AdamW(groups, lr=1e-4).param_groups}
    assert rates == {1e-4, 1e-6}


def test_layers_added_to_a_frozen_clip():
    """What is put into CLIP to be trained there, as LoRA does, is trained and decayed; the frozen rest stays out."""
    model = SANForSemanticSegmentation(tiny_config())
    before = set().union(*names_of(model, parameter_groups(model)))
    attention = model.model.vision_model.encoder.layers[3].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Linear(32, 32, bias=False))
    groups = parameter_groups(model, 0.1)
    added = "model.vision_model.encoder.layers.3.self_attn.q_proj.1.weight"
    assert set().union(*names_of(model, groups)) == before | {added}
    assert [added in members for members in names_of(model, groups)] == [bool(g["weight_decay"]) for g in groups]


def test_nothing_to_train():
    """A frozen model would otherwise fail inside the optimiser."""
    model = SANForSemanticSegmentation(tiny_config()).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model)


def optimizer_of(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1e-4)


def test_schedule_of_the_recipe():
    """1e-4 * (1 - step / 60000) ** 0.9: worked out by hand, to the last step, from which the rate is zero."""
    (course,) = polynomial_schedule(optimizer_of(1e-4), 60_000).lr_lambdas
    expected = {0: 1.0, 6_000: 0.909532576083, 30_000: 0.535886731268, 59_999: 5.00799486e-5, 60_000: 0.0}
    for step, factor in expected.items():
        assert course(step) == pytest.approx(factor, rel=1e-8, abs=1e-15), step


def test_schedule_step_by_step():
    """The first step is made at the full rate; each group falls from its own; warm-up rises, and the fall ends at 0."""
    optimizer = optimizer_of(1e-4, 3.0)
    schedule = polynomial_schedule(optimizer, 5, power=2.0, warmup_steps=1)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    factors = [0.0, 1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert rates == [pytest.approx([1e-4 * factor, 3.0 * factor], abs=1e-12) for factor in factors]


def test_schedule_goes_on_where_it_was():
    """Its state holds all that resuming needs."""
    torch.manual_seed(0)
    optimizer = optimizer_of(1.0)
    schedule = polynomial_schedule(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    resumed_optimizer = optimizer_of(1.0)
    resumed = polynomial_schedule(resumed_optimizer, 10)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(6):
        for one, its_schedule in ((optimizer, schedule), (resumed_optimizer, resumed)):
            one.step()
            its_schedule.step()
        assert optimizer.param_groups[0]["lr"] == resumed_optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] == 0
