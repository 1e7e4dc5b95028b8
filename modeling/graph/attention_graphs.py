"""The token graph of an attention module's call, made again from its input: for looking, never for training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .edge_storage import Edges, SparseEdges
from .gin_attention import rotated_pair, sliced
from .llama_heads import rotated_heads
from .pair_scores import dot_scores
from .visible_rows import normalisation, visible_block


@dataclass(frozen=True)
class CallOfAttention:
    """What an attention module was called with.

    Args:
        states: (batch, target, hidden_size), normed.
        table: cosine and sine of the positions.
        mask: as transformers makes it, see `visible_rows`.
        cache_layer: of the generation, with the keys of this call in it; None without a cache.
    """

    states: Tensor
    table: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache_layer: Any


WeightsAndGraph = Callable[[range, Tensor], tuple[Tensor, Tensor]]
"""From rows and the keys that they see to attention weights and graph, each (batch, heads, rows, seen)."""


@dataclass(frozen=True)
class AttentionGraph:
    """One call's graph, a block of rows at a time.

    Args:
        sizes: numbers of rows and of keys.
        mask: as transformers makes it.
        compute: makes the rows.
    """

    sizes: tuple[int, int]
    mask: Tensor | None
    compute: WeightsAndGraph

    def rows(self, rows: range, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Attention weights, graph (batch, heads, rows, seen), and which keys are visible (batch or 1, 1, ...)."""
        visible = visible_block(self.mask, rows, self.sizes, device)
        return *self.compute(rows, visible), visible


def graph_of_call(attention: Any, call: CallOfAttention) -> AttentionGraph | None:
    """The graph that `attention` made of this call; None if it has none over pairs of tokens.

    That of GIN and PNA is what their messages or values are weighed by, that of others the softmax itself.
    """
    gin = getattr(attention, "gin", attention)  # beside a stock attention, or alone
    if hasattr(gin, "pass_messages"):
        return _graph_of_gin(gin, attention, call)
    if not hasattr(attention, "q_proj") or hasattr(attention, "levels") or hasattr(attention, "cg"):  # latents
        return None
    return _graph_of_scores(attention, call)


def _graph_of_gin(gin: Any, attention: Any, call: CallOfAttention) -> AttentionGraph:
    first = [rotated_pair(attention, call.states, call.table)] if gin.reads_first_pair else []
    pairs = first + gin.own_pairs(call.states, call.table)
    if call.cache_layer is not None:
        widths = [key.shape[-1] for _, key in pairs]
        if gin is not attention and not gin.reads_first_pair:  # the stock attention's keys stand in front
            widths = [attention.head_dim, *widths]
        keys = _held(call.cache_layer).split(widths, -1)[-len(pairs) :]
        pairs = [(query, key) for (query, _), key in zip(pairs, keys, strict=True)]
    source = pairs[0][1].shape[2]
    sharpened = sliced([gin._sharpened(query, key) for query, key in pairs])
    normalise = normalisation(gin.options.normalisation, call.mask)

    def compute(rows: range, visible: Tensor) -> tuple[Tensor, Tensor]:
        weights = gin.weights(sharpened, normalise, rows, visible)
        return weights, gin.edges(weights, visible)

    return AttentionGraph((call.states.shape[1], source), call.mask, compute)


def _graph_of_scores(attention: Any, call: CallOfAttention) -> AttentionGraph:
    """Of queries and keys by dot products: stock attention and PNA."""
    queries, keys = attention.q_proj(call.states), attention.k_proj(call.states)
    query, key = rotated_heads(queries, keys, attention.head_dim, call.table)
    if call.cache_layer is not None:
        key = _held(call.cache_layer)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    normalise = normalisation(getattr(attention, "normalisation", "softmax"), call.mask)
    transform = getattr(attention, "edges", None)

    def compute(rows: range, visible: Tensor) -> tuple[Tensor, Tensor]:
        part = query[:, :, rows.start : rows.stop]
        weights = normalise(dot_scores(part, key[:, :, : visible.shape[-1]], attention.scaling), visible)
        return weights, weights if transform is None else transform(weights, visible)

    return AttentionGraph((call.states.shape[1], key.shape[2]), call.mask, compute)


def _held(cache_layer: Any) -> Tensor:
    """The keys of all tokens so far, without a static cache's empty room."""
    keys: Tensor = cache_layer.keys
    return keys[:, :, : int(cache_layer.get_seq_length())]


def rows_of_edges(edges: Edges, rows: range, source: int) -> Tensor:
    """Some rows of a stored graph as (batch, graphs, rows, source): one graph of all heads, or one for each."""
    part = edges.whole().block(rows)
    weight = part.weight
    if isinstance(part, SparseEdges):
        empty = weight.new_zeros((*weight.shape[:-1], source))
        weight = empty.scatter_add(-1, part.index.expand(weight.shape), weight)
    return weight if weight.dim() == 4 else weight.unsqueeze(1)
