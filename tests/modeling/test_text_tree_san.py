"""Prompts as a prefix tree: the text tower's own numbers, with each beginning computed once."""

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

import san_hf.modeling.text_tree_san as text_tree_san
from san_hf import SANImageProcessor, SANProcessor
from san_hf.conversion import clip_tokenizer
from san_hf.modeling.text_tree_san import encode_prompts, grow_trees, hook_text_tree
from san_hf.vocabularies import load_vocabulary
from tests.tiny import randomized, relative_difference, tiny_config, tiny_tokenizer


BEGIN, END = 512, 513


def text_config(**overrides):
    config = copy.deepcopy(tiny_config().clip_text_config)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def two_towers(dtype=torch.float32, **overrides) -> tuple[CLIPTextModel, CLIPTextModel]:
    """A stock text tower, and the same prepared for trees."""
    torch.manual_seed(0)
    stock = CLIPTextModel._from_config(text_config(**overrides)).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
    hooked = copy.deepcopy(stock)
    hook_text_tree(hooked)
    return stock, hooked


def random_prompts(seed: int) -> torch.Tensor:
    """(P, L) of random lengths up to CLIP's context, from so few words that many beginnings are shared."""
    chance = random.Random(seed)
    words, longest = chance.choice([2, 3, 30, 500]), chance.choice([1, 3, 8, 20, 75])
    prompts = [
        [chance.randrange(words) for _ in range(chance.randint(0, longest))] for _ in range(chance.randint(1, 60))
    ]
    prompts += [list(prompt) for prompt in chance.choices(prompts, k=chance.randint(0, 5))]  # repeated ones
    length = chance.choice([max(map(len, prompts)) + 2, 77])
    # Behind the end there may be anything.
    padding = chance.choice([[0], [END], [3, END, BEGIN]])
    rows = [[BEGIN, *prompt, END] for prompt in prompts]
    return torch.tensor([row + [chance.choice(padding) for _ in range(length - len(row))] for row in rows])


@pytest.fixture
def tokens(monkeypatch):
    """The shapes of what goes through text towers."""
    shapes, forward = [], CLIPTextEmbeddings.forward

    def count(self, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(CLIPTextEmbeddings, "forward", count)
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("legacy", [False, True])
def test_trees_give_the_text_tower_s_own_numbers(legacy, monkeypatch):
    """A node that sees too much, too little or one key twice, at a wrong depth, or the state of another prompt."""
    stock, hooked = two_towers(eos_token_id=2 if legacy else END)
    for seed in range(80):
        monkeypatch.setattr(text_tree_san, "TREE_SIZE", [4096, 100, 33, 5, 1][seed % 5])
        monkeypatch.setattr(text_tree_san, "BLOCK_SIZE", [32, 7, 1][seed % 3])
        prompts = random_prompts(seed)
        expected = stock(prompts).pooler_output
        assert relative_difference(encode_prompts(hooked, prompts), expected) < 2e-6, seed
        assert relative_difference(hooked(prompts).pooler_output, expected) < 2e-6, seed


def test_nodes_are_the_beginnings_that_differ():
    """A beginning that is computed twice, or prompts that end in another's node."""
    for seed in range(40):
        prompts = [tuple(row[: list(row).index(END) + 1]) for row in random_prompts(seed).tolist()]
        longest = max(map(len, prompts))
        ordered = sorted(prompts)
        (tree,) = grow_trees(np.array([[*row, *[-1] * (longest - len(row))] for row in ordered]), 100_000)
        beginnings = {prompt[:length] for prompt in prompts for length in range(1, len(prompt) + 1)}
        num_blocks, block_size = tree.input_ids.shape
        assert num_blocks * block_size - len(beginnings) in range(num_blocks) and block_size <= 32
        assert len(set(tree.ends.tolist())) == len(set(prompts))
        # Read upwards, each node's ancestors and itself are its beginning.
        ids, own = tree.input_ids.flatten(), tree.mask.shape[-1] - block_size
        for end, prompt in zip(tree.ends.tolist(), ordered):
            block, row = divmod(end, block_size)
            sees = tree.keys[block][tree.mask[block, 0, row] == 0]
            assert tuple(ids[sees].tolist()) == prompt and own < longest


@torch.no_grad()
def test_benchmark_s_prompts_take_a_fraction_of_the_tokens(tokens):
    """Shared beginnings computed again, or padding that is not skipped: 184,338 tokens at CLIP's context."""
    processor = SANProcessor(SANImageProcessor(), clip_tokenizer())
    config = tiny_config()
    for name, value in {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}.items():
        setattr(config.clip_text_config, name, value)
    model = randomized(config)
    names = load_vocabulary("coco-stuff")
    embeds = model.get_class_embeds(**processor(text=names))
    assert sum(np.prod(shape) for shape in tokens) <= 10_200
    assert max(np.prod(shape) for shape in tokens) <= 4096 + 128
    tokens.clear()
    padded = processor(text=names, padding="max_length")
    assert torch.equal(model.get_class_embeds(**padded), embeds) and padded["input_ids"].shape[-1] == 77
    assert sum(np.prod(shape) for shape in tokens) <= 10_200
    # A few of them by themselves.
    for index in (0, 17):
        alone = model.get_class_embeds(**processor(text=[names[index]]))
        assert relative_difference(alone, embeds[index : index + 1]) < 1e-5


@torch.no_grad()
def test_large_vocabularies_go_in_trees_of_bounded_size(tokens):
    """Memory that grows with the vocabulary; a prompt that is repeated at the edge of two trees, computed twice."""
    stock, hooked = two_towers()
    chance = random.Random(0)
    prompts = torch.tensor([[BEGIN, *chance.choices(range(40), k=6), END] for _ in range(3000)] * 2)
    pooled = encode_prompts(hooked, prompts)
    assert len(tokens) > 2 and max(np.prod(shape) for shape in tokens) <= 4096 + 128
    # The sizes of ViT-L/14's text tower: 3072 numbers of 4 bytes for each node.
    large, hooked.config.intermediate_size = len(tokens), 3072
    encode_prompts(hooked, prompts)
    assert max(np.prod(shape) for shape in tokens[large:]) * 3072 * 4 < 4e6
    hooked.config.intermediate_size = 32
    tokens[:] = tokens[:large]
    once = sum(np.prod(shape) for shape in tokens)
    tokens.clear()
    encode_prompts(hooked, prompts[:3000])
    assert sum(np.prod(shape) for shape in tokens) == once
    assert relative_difference(pooled, stock(prompts).pooler_output) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_without_a_tree(dtype, monkeypatch):
    """A mask or a state in another dtype than the tower's."""
    monkeypatch.setattr(text_tree_san, "TREE_SIZE", 64)
    exact, _ = two_towers()
    stock, hooked = two_towers(dtype)
    prompts = random_prompts(3)
    expected = exact(prompts).pooler_output
    pooled = encode_prompts(hooked, prompts)
    assert pooled.dtype == dtype
    plain = relative_difference(stock(prompts).pooler_output.float(), expected)
    assert relative_difference(pooled.float(), expected) < 2 * plain
    _, hooked = two_towers()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_difference(encode_prompts(hooked, prompts).float(), expected) < 0.1


@torch.no_grad()
def test_attention_implementation_is_the_chosen_one(monkeypatch):
    """Fused attention where eager was asked for, before or after the model was made."""
    stock, hooked = two_towers()
    prompts = random_prompts(3)
    expected = stock(prompts).pooler_output
    hooked.set_attn_implementation("eager")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", pytest.fail)
    assert relative_difference(encode_prompts(hooked, prompts), expected) < 2e-6
    assert relative_difference(hooked(prompts).pooler_output, expected) < 2e-6


def test_gradients_are_those_of_the_plain_tower(monkeypatch):
    """A text tower that is trained: what is shared gets the gradients of all prompts, with checkpointing, too."""
    monkeypatch.setattr(text_tree_san, "TREE_SIZE", 100)
    prompts = random_prompts(13)
    stock, hooked = two_towers()
    weights = torch.randn(len(prompts), 16)
    (stock.train()(prompts).pooler_output * weights).sum().backward()
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        hooked.train().zero_grad()
        if options is not None:
            kind = "activation" if hasattr(hooked, "activation_checkpointing_enable") else "gradient"
            getattr(hooked, f"{kind}_checkpointing_enable")(options)
            hooked.enable_input_require_grads()
        (encode_prompts(hooked, prompts) * weights).sum().backward()
        for (name, parameter), own in zip(hooked.named_parameters(), stock.parameters()):
            if parameter.dim() > 1:
                assert relative_difference(parameter.grad, own.grad) < 2e-5, name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by the old name
@torch.no_grad()
def test_lora_on_the_text_tower(model, tokens):
    """An adapter that is passed by."""
    tokenizer = tiny_tokenizer()
    inputs = SANProcessor(SANImageProcessor(), tokenizer)(text=["sky", "a cat", "skyscraper"])
    plain = model.get_class_embeds(**inputs)
    targets = r"text_model\..*(q_proj|v_proj|out_proj|fc1|fc2)"
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.5))
    adapted = lora.eval().get_class_embeds(**inputs)
    assert relative_difference(adapted, plain) > 0.1
    tokens.clear()
    prompts = inputs["input_ids"].flatten(0, 1)
    pooled = model.text_model(prompts).pooler_output
    assert relative_difference(encode_prompts(model.text_model, prompts), pooled) < 1e-5
    assert tokens[0] == tuple(prompts.shape) and tokens[1] != tokens[0]
    # Dropout is drawn for each prompt: they share nothing.
    lora.train()
    encode_prompts(model.text_model, prompts)
    assert tokens[-1] == tuple(prompts.shape)


@torch.no_grad()
def test_compiled_and_with_dropout_prompts_share_nothing(tokens):
    """A tree where its shape can't be known, or one mask of dropout for many prompts."""
    stock, hooked = two_towers()
    prompts = random_prompts(13)
    compiled = torch.compile(lambda ids: encode_prompts(hooked, ids), backend="eager", fullgraph=True)
    assert relative_difference(compiled(prompts), stock(prompts).pooler_output) < 2e-6
    hooked.config.attention_dropout = 0.5
    tokens.clear()
    for training in (False, True):
        hooked.train(training)
        encode_prompts(hooked, prompts)
    assert tokens[0] != tuple(prompts.shape) and tokens[1] == tuple(prompts.shape)


@torch.no_grad()
@pytest.mark.parametrize("templates", ["vild", "imagenet", ["{}"], ["{} !", "a {}", "a {}"]])
def test_embeddings_of_many_vocabularies(templates, model):
    """Averages over templates that mix classes, whatever the portions."""
    processor = SANProcessor(SANImageProcessor(), tiny_tokenizer())
    chance = random.Random(1)
    for size in (1, 2, 19):
        names = sorted({"".join(chance.choices("ab é", k=chance.randint(1, 9))).strip() + f"z{i}" for i in range(size)})
        inputs = processor(text=names, prompt_templates=templates)["input_ids"]
        rows = []
        for prompts in inputs:
            pooled = model.text_projection(model.text_model(prompts).pooler_output)
            rows.append(torch.nn.functional.normalize(pooled, dim=-1).mean(0))
        expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        assert relative_difference(model.get_class_embeds(inputs), expected) < 1e-5
