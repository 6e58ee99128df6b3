"""CLIP's text tower on a prefix tree: beginnings that prompts share are computed once.

The tower is causal, so a token's state depends on the tokens before it only. Prompts are therefore one tree, in which
"a photo of a cat" and "a photo of a car" share four nodes, and nothing after an end-of-text token is needed: 171 class
names in 14 templates, at CLIP's context 184,338 tokens, are a tree of 10,144.

The nodes go through the stock layers of `CLIPTextModel` as if they were short prompts, their depths as positions, and
the attention function registered below lets each see its ancestors. In depth-first order the ancestors of the nodes of
a block are in the block, or ancestors of its first node: few keys serve a whole block. Of the last layer only the ends
of the prompts are read: it gets them alone, and the attention function adds the keys and values of all nodes.
Shapes: P prompts of L tokens; b blocks of n nodes; a, the most ancestors of a block's first node; h CLIP's heads.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, CLIPTextModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .fast_linear_san import small_products


# A name for each copy of this code: checkpoints may bring their own.
TREE_ATTENTION = f"san_text_tree of {__name__}"
# Nodes that attend together, at most.
BLOCK_SIZE = 32
# Nodes that go through the text tower at once, at most: bounds memory for large vocabularies. On a CPU also so few that
# no activation is of the sizes for which malloc asks the system for new pages each time, which costs a fifth of it all.
TREE_SIZE = 4096
ACTIVATION_BYTES = 3_500_000
# Prompts, where they share nothing.
PLAIN_BATCH_SIZE = 256


class TextTree(NamedTuple):
    """
    A prefix tree, its nodes in depth-first order.

    Attributes:
        input_ids, position_ids: (b, n) int64, token and depth of each node. What fills the last block repeats the last.
        keys: (b, a + n) int64, nodes that a block attends to: the ancestors of its first node, then its own nodes.
        mask: (b, 1, n, a + n) float32: 0 where a node attends, to its ancestors and itself, -inf elsewhere.
        ends: (P,) int64, the last node of each prompt.
        paths: (P, L) int64, the nodes of each prompt.
        path_mask: (P, 1, 1, L) float32: 0 for these nodes, -inf behind the last.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    ends: torch.Tensor
    paths: torch.Tensor
    path_mask: torch.Tensor


def grow_trees(prompts: np.ndarray, tree_size: int) -> Iterator[TextTree]:
    """
    Args:
        prompts: (P, L) token ids, -1 after each prompt's end; in lexicographic order.
        tree_size: most nodes of a tree, unless a single prompt is longer.

    Yields:
        Trees on the CPU, of one prompt after the other.
    """
    is_token = prompts >= 0
    # Where a prompt has left the one before it: a new node.
    is_node = np.ones_like(is_token)
    is_node[1:] = np.logical_or.accumulate(prompts[1:] != prompts[:-1], axis=1)
    is_node &= is_token
    num_nodes = np.cumsum(is_node.sum(axis=1))
    start = 0
    while start < len(prompts):
        is_node[start] = is_token[start]  # shares nothing with an earlier tree
        limit = num_nodes[start] - is_token[start].sum() + tree_size
        stop = max(start + 1, int(np.searchsorted(num_nodes, limit, side="right")))
        yield _grow_tree(prompts[start:stop], is_node[start:stop])
        start = stop


def _grow_tree(prompts: np.ndarray, is_node: np.ndarray) -> TextTree:
    rows, depths = np.nonzero(is_node)
    # The nodes of each prompt by depth: where it has no new one, it shares that of the prompts before it.
    paths = np.zeros(prompts.shape, np.int64)
    paths[rows, depths] = np.arange(len(rows))
    paths = np.maximum.accumulate(paths, axis=0)

    num_blocks = -(-len(rows) // BLOCK_SIZE)
    places = np.arange(num_blocks * -(-len(rows) // num_blocks)).reshape(num_blocks, -1)
    nodes = np.minimum(places, len(rows) - 1)  # (b, n)
    first = nodes[:, :1]
    above = np.arange(depths[first].max())  # (a,)
    keys = np.concatenate([paths[rows[first], above], nodes], axis=1)
    is_key = np.concatenate([above < depths[first], places < len(rows)], axis=1)
    # On the way to a node, that is what its prompt has at the key's depth.
    rows_of_nodes, depths_of_nodes = rows[nodes][:, :, None], depths[nodes][:, :, None]
    depths_of_keys = depths[keys][:, None]
    attends = paths[rows_of_nodes, depths_of_keys] == keys[:, None]
    attends &= is_key[:, None] & (depths_of_keys <= depths_of_nodes)  # (b, n, a + n)
    return TextTree(
        input_ids=torch.from_numpy(prompts[rows, depths][nodes]),
        position_ids=torch.from_numpy(depths[nodes]),
        keys=torch.from_numpy(keys),
        mask=torch.from_numpy(np.where(attends, np.float32(0), np.float32(-np.inf))[:, None]),
        ends=torch.from_numpy(paths[np.arange(len(prompts)), (prompts >= 0).sum(axis=1) - 1]),
        paths=torch.from_numpy(paths),
        path_mask=torch.from_numpy(np.where(prompts >= 0, np.float32(0), np.float32(-np.inf))[:, None, None]),
    )


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    keys: torch.Tensor | None = None,
    nodes: Callable[[], torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of a text layer over the blocks of a tree, of the last one over single nodes; without keys, CLIP's own.

    Args:
        module: the layer's `CLIPAttention`.
        query, key, value: (b, h, n, head_dim).
        attention_mask: additive, (b, 1, n, m).
        scaling: factor of the dot products.
        dropout: dropout rate of the attention weights.
        keys: (b, m) nodes that a block attends to.
        nodes: where query, key and value are not of all nodes: gives the layer's normalised states of all.

    Returns:
        (b, n, h, head_dim), and the weights if the implementation returns them.
    """
    text_config = cast(Any, module.config).text_config  # made by `hook_text_tree`
    implementation = text_config._attn_implementation
    if keys is None:
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if nodes is None:
        states = [part.transpose(1, 2).flatten(0, 1) for part in (key, value)]
    else:
        normed = nodes().flatten(0, 1)
        projections = (module.get_submodule(name)(normed) for name in ("k_proj", "v_proj"))
        states = [part.unflatten(1, (-1, query.shape[-1])) for part in projections]
    # (nodes, h, head_dim) -> (b, h, m, head_dim)
    key, value = (part.index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2) for part in states)
    # Of the fused kernels only sdpa takes an arbitrary mask.
    attention = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]
    mask = cast(torch.Tensor, attention_mask).to(query.dtype)
    with small_products():
        return attention(module, query, key, value, mask, scaling=scaling, dropout=dropout)


AttentionInterface.register(TREE_ATTENTION, tree_attention_forward)


def hook_text_tree(text_model: CLIPTextModel) -> None:
    """
    Makes the layers of a stock `CLIPTextModel` use [`tree_attention_forward`], in place: they get a copy of their
    configuration that names it and remembers the model's own, so that `set_attn_implementation` works as ever.
    """
    tree_config: Any = copy.copy(text_model.config)
    tree_config._attn_implementation = TREE_ATTENTION
    tree_config.text_config = text_model.config
    for layer in text_model.encoder.layers:
        layer.get_submodule("self_attn").config = tree_config


def encode_prompts(text_model: CLIPTextModel, input_ids: torch.Tensor) -> torch.Tensor:
    """
    The pooled output of a text tower, with each beginning of a prompt computed once.

    Args:
        text_model: prepared by [`hook_text_tree`].
        input_ids: (P, L) integers, padded on the right.

    Returns:
        (P, W), equal to `text_model(input_ids).pooler_output`.
    """
    # What is shared depends on the data, which a compiler doesn't have; and dropout is drawn for each prompt.
    if torch.compiler.is_compiling() or _drops_out(text_model):
        return torch.cat([text_model(input_ids=ids).pooler_output for ids in input_ids.split(PLAIN_BATCH_SIZE)])
    prompts = input_ids.cpu().numpy().astype(np.int64)
    # As CLIPTextModel finds the end; 2 stands for the highest id, in configurations of old.
    eos_token_id = text_model.eos_token_id
    ends = (prompts if eos_token_id == 2 else prompts == eos_token_id).argmax(axis=1)
    prompts = np.where(np.arange(ends.max() + 1) <= ends[:, None], prompts[:, : ends.max() + 1], -1)
    order = np.lexsort(prompts.T[::-1])
    pooled = []
    tree_size = TREE_SIZE
    if input_ids.device.type == "cpu":
        bytes_of_node = text_model.config.intermediate_size * text_model.dtype.itemsize
        tree_size = min(tree_size, max(BLOCK_SIZE, ACTIVATION_BYTES // bytes_of_node))
    for tree in grow_trees(prompts[order], tree_size):
        tree = TextTree(*(tensor.to(input_ids.device, non_blocking=True) for tensor in tree))
        pooled.append(_encode_tree(text_model, tree))
    return torch.cat(pooled).index_select(0, torch.from_numpy(np.argsort(order)).to(input_ids.device))


def _encode_tree(text_model: CLIPTextModel, tree: TextTree) -> torch.Tensor:
    """The text tower's pooled output (P, W)."""
    hidden_states = text_model.embeddings(input_ids=tree.input_ids, position_ids=tree.position_ids)
    *layers, last = text_model.encoder.layers
    for layer in layers:
        hidden_states = layer(hidden_states, tree.mask, keys=tree.keys)
    if hidden_states.requires_grad:  # reentrant gradient checkpointing would drop the gradients of `nodes`
        ends = last(hidden_states, tree.mask, keys=tree.keys).flatten(0, 1).index_select(0, tree.ends)
    else:
        # Blocks of one node.
        ends = hidden_states.flatten(0, 1).index_select(0, tree.ends)[:, None]
        nodes = partial(last.get_submodule("layer_norm1"), hidden_states)
        ends = last(ends, tree.path_mask, keys=tree.paths, nodes=nodes)[:, 0]
    return text_model.final_layer_norm(ends)


def _drops_out(text_model: CLIPTextModel) -> bool:
    """Whether anything is dropped at random, by CLIP's attention or by adapters."""
    layers = (module for module in text_model.modules() if isinstance(module, nn.Dropout))
    own = text_model.training and bool(text_model.config.attention_dropout)
    return own or any(layer.training and layer.p > 0 for layer in layers)
