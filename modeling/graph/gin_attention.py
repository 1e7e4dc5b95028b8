"""Attention as a GIN layer: each head sums the states of its neighbours and sends the sum through its own MLP."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from ...configuration.configuration_gnn import LlamaGNNConfig
from ..transformers_compat import take_cache
from .edge_transforms import EdgeTransform
from .llama_heads import active_dropout, attention_of_any_width, join_heads, rotated_heads, split_heads
from .pair_scores import differential_start, dot_scores, pair_scores
from .per_head_mlp import PerHeadMLP
from .summed_slices import SummedSlices
from .visible_rows import Normalise, in_row_blocks, normalisation, visible_block

Pair = tuple[Tensor, Tensor]
"""What scores are made of: of the rows, (batch, heads, target, width), and of the keys, (batch, heads, source, width).

In `LlamaAttentionGINScored`: (batch, target, width) and (batch, source, width), the same for all heads.
"""

SlicedPair = tuple[SummedSlices, SummedSlices]
"""A pair of which blocks of rows and the keys that they see are taken."""


def sliced(pairs: list[Pair]) -> list[SlicedPair]:
    """The same, to take blocks of."""
    return [(SummedSlices(query), SummedSlices(key)) for query, key in pairs]


def sum_over_edges(
    edges: Callable[[range, Tensor], Tensor],
    nodes: Tensor,
    mask: Tensor | None,
    target: int,
    memory: tuple[int, int],
) -> Tensor:
    """A x, in blocks of rows that are computed again in the backward pass.

    Args:
        edges: from rows and the keys they see (batch or 1, 1, rows, seen) to their rows of A, (batch, heads, rows,
            seen): all keys that any row of the block sees lie among the first `seen`.
        nodes: x, (batch, heads, source, width).
        mask: as transformers makes it, see `visible_rows`.
        target: number of rows.
        memory: bytes that one row takes while it is computed, and bytes that a block may take.

    Returns:
        (batch, heads, target, width).
    """

    slices = SummedSlices(nodes)

    def compute(rows: range) -> Tensor:
        visible = visible_block(mask, rows, (target, nodes.shape[2]), nodes.device)
        return edges(rows, visible).to(nodes.dtype) @ slices.take(0, visible.shape[-1])

    return in_row_blocks(compute, target, *memory)


class LlamaAttentionGIN(nn.Module):
    """y_h = MLP_h(eps_h x_h + T(softmax(alpha q k^T / (T sqrt d))) x_h), where x_h is head h's slice of the input.

    There are no values: the normed hidden state itself, cut into heads, is what neighbours send. The cache holds it in
    the place of values. Buehler 2025 (arXiv 2501.02393), "GIN-Attention".

    Args:
        config: of the model.
        layer_idx: decoder layer.
        beside: whether another module makes the queries and keys of `first_pair`, and caches for this one.
    """

    reads_first_pair = True

    def __init__(self, config: LlamaGNNConfig, layer_idx: int, beside: bool = False) -> None:
        super().__init__()
        options = config.gnn_config
        heads, groups, width = config.num_attention_heads, int(config.num_key_value_heads or 0), config.hidden_size
        self.config, self.layer_idx, self.options = config, layer_idx, options
        self.head_dim = int(config.head_dim or width // heads)
        self.heads, self.groups, self.repeats = heads, groups, heads // groups
        self.node_width = width // heads
        self.num_key_value_groups = 1  # read by the attention functions: keys are repeated here
        self.is_causal = True
        self.attention_dropout = float(config.attention_dropout or 0)
        self.scaling = self.head_dim**-0.5 / options.temperature
        if self.reads_first_pair and not beside:
            self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
            self.k_proj = nn.Linear(width, groups * self.head_dim, bias=config.attention_bias)
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.sharpening = None if options.sharpening is None else nn.Parameter(torch.full((1,), options.sharpening))
        inner = max(1, int(options.mlp_ratio * self.node_width))
        self.update = PerHeadMLP(heads, self.node_width, inner, options.mlp_dropout, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, width, bias=config.attention_bias) if options.output_projection else None
        self.edges = EdgeTransform(options.edges)
        self.is_fused = options.edges.transform == "none" and options.normalisation == "softmax"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token.

        Args:
            hidden_states: (batch, target, hidden_size), normed.
            position_embeddings: cosine and sine of the positions.
            attention_mask: as transformers makes it for "sdpa" and "eager".
            kwargs: `cache` of the generation, and what the attention function takes.

        Returns:
            (batch, target, hidden_size), and the attention weights where the implementation gives them.
        """
        cache = take_cache(kwargs)
        first = [rotated_pair(self, hidden_states, position_embeddings)] if self.reads_first_pair else []
        pairs = first + self.own_pairs(hidden_states, position_embeddings)
        packed = self.packed_nodes(hidden_states)
        if cache is not None:
            widths = [key.shape[-1] for _, key in pairs]
            keys, packed = cache.update(torch.cat([key for _, key in pairs], -1), packed, self.layer_idx)
            pairs = [(query, key) for (query, _), key in zip(pairs, keys.split(widths, -1), strict=True)]
        return self.pass_messages(hidden_states, pairs, packed, attention_mask, kwargs)

    def own_pairs(self, hidden_states: Tensor, table: tuple[Tensor, Tensor]) -> list[Pair]:
        """Further queries and keys of new tokens; keys in (batch, key_value_heads, target, width), as caches hold."""
        return []

    def packed_nodes(self, hidden_states: Tensor) -> Tensor:
        """x by groups of heads, so that keys and values agree in their number of heads, as caches expect."""
        return split_heads(hidden_states, self.repeats * self.node_width)

    def pass_messages(
        self,
        hidden_states: Tensor,
        pairs: list[Pair],
        packed: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """MLP(eps x + A x), with keys and `packed` of all tokens so far; results as in `forward`."""
        nodes = split_heads(hidden_states, self.node_width)
        sources = packed.unflatten(-1, (self.repeats, self.node_width)).transpose(2, 3).flatten(1, 2)
        pairs = [self._sharpened(query, key) for query, key in pairs]
        weights = None
        if self.is_fused:
            messages, weights = self._attend(pairs, sources, mask, arguments)
        else:
            edges = partial(self._edges, sliced(pairs), normalisation(self.options.normalisation, mask))
            memory = self._row_bytes(nodes.shape[0], sources.shape[2]), self.options.block_bytes
            messages = sum_over_edges(edges, sources, mask, nodes.shape[2], memory)
        output = join_heads(self.update(self.epsilon * nodes + self._finished(messages)))
        return (output if self.o_proj is None else self.o_proj(output)), weights

    def _sharpened(self, query: Tensor, key: Tensor) -> Pair:
        return query if self.sharpening is None else query * self.sharpening, repeat_kv(key, self.repeats)

    def _attend(
        self, pairs: list[Pair], sources: Tensor, mask: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A x by fused attention, if nothing lies between softmax and sum."""
        return attention_of_any_width(self, (*pairs[0], sources), mask, self.scaling, arguments)

    def _edges(self, pairs: list[SlicedPair], normalise: Normalise, rows: range, visible: Tensor) -> Tensor:
        dropout = active_dropout(self)
        weights = functional.dropout(self.weights(pairs, normalise, rows, visible), dropout, dropout > 0)
        return self.edges(weights, visible)

    def weights(self, pairs: list[SlicedPair], normalise: Normalise, rows: range, visible: Tensor) -> Tensor:
        """(batch, heads, rows, seen), what the edges are made of."""
        return self._normalised(pairs[0], normalise, rows, visible)

    def _normalised(self, pair: SlicedPair, normalise: Normalise, rows: range, visible: Tensor) -> Tensor:
        query, key = pair[0].take(rows.start, rows.stop), pair[1].take(0, visible.shape[-1])
        return normalise(dot_scores(query, key, self.scaling), visible)

    def _row_bytes(self, batch: int, source: int) -> int:
        return 4 * batch * self.heads * source

    def _finished(self, messages: Tensor) -> Tensor:
        return messages


class LlamaAttentionGINDifferential(LlamaAttentionGIN):
    """The graph is A1 - lambda A2, of two pairs of queries and keys (Ye et al. 2024, arXiv 2410.05258).

    (A1 - lambda A2) x = A1 x - lambda A2 x: two fused attention calls. lambda is one trainable number of the layer.
    With `differential_norm`, RMS norm of each token's and head's sum, times 1 minus the first lambda: never of the
    weights, whose norm would mix later rows in. The cache holds both keys side by side.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int, beside: bool = False) -> None:
        super().__init__(config, layer_idx, beside)
        width, bias = config.hidden_size, config.attention_bias
        self.second_q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.second_k_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
        self.first_lambda = differential_start(layer_idx)
        self.differential_lambda = nn.Parameter(torch.full((1,), self.first_lambda))
        norms = config.gnn_config.differential_norm
        self.differential_norm = nn.RMSNorm(self.node_width, eps=config.rms_norm_eps) if norms else None

    def own_pairs(self, hidden_states: Tensor, table: tuple[Tensor, Tensor]) -> list[Pair]:
        queries, keys = self.second_q_proj(hidden_states), self.second_k_proj(hidden_states)
        return [rotated_heads(queries, keys, self.head_dim, table)]

    def _attend(
        self, pairs: list[Pair], sources: Tensor, mask: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        first, weights = attention_of_any_width(self, (*pairs[0], sources), mask, self.scaling, arguments)
        second, others = attention_of_any_width(self, (*pairs[1], sources), mask, self.scaling, arguments)
        if weights is not None and others is not None:
            weights = weights - self.differential_lambda * others
        return first - self.differential_lambda * second, weights

    def weights(self, pairs: list[SlicedPair], normalise: Normalise, rows: range, visible: Tensor) -> Tensor:
        """(batch, heads, rows, seen), what the edges are made of."""
        first, second = (self._normalised(pair, normalise, rows, visible) for pair in pairs)
        return first - self.differential_lambda * second

    def _row_bytes(self, batch: int, source: int) -> int:
        return 2 * super()._row_bytes(batch, source)

    def _finished(self, messages: Tensor) -> Tensor:
        if self.differential_norm is None:
            return messages
        return (1 - self.first_lambda) * self.differential_norm(messages)


class LlamaAttentionGINScored(LlamaAttentionGIN):
    """Pairs are scored by one small MLP for all heads: s_ij = W2 silu(U n_i + V n_j), which is W2 silu(W1 [n_i; n_j]).

    Positions play no part. Costs target x source x `scoring_width`, a block of rows at a time. The cache holds V n_j.
    """

    reads_first_pair = False

    def __init__(self, config: LlamaGNNConfig, layer_idx: int, beside: bool = False) -> None:
        super().__init__(config, layer_idx, beside)
        width, inner = config.hidden_size, config.gnn_config.scoring_width
        self.score_target = nn.Linear(width, inner)
        self.score_source = nn.Linear(width, inner, bias=False)
        self.score_heads = nn.Linear(inner, self.heads, bias=False)
        self.is_fused = False

    def own_pairs(self, hidden_states: Tensor, table: tuple[Tensor, Tensor]) -> list[Pair]:
        sources = self.score_source(hidden_states)
        return [(self.score_target(hidden_states), split_heads(sources, sources.shape[-1] // self.groups))]

    def _sharpened(self, query: Tensor, key: Tensor) -> Pair:
        return query, join_heads(key)

    def weights(self, pairs: list[SlicedPair], normalise: Normalise, rows: range, visible: Tensor) -> Tensor:
        """(batch, heads, rows, seen), what the edges are made of."""
        target, source = pairs[0][0].take(rows.start, rows.stop), pairs[0][1].take(0, visible.shape[-1])
        scores = pair_scores(target, source, self.score_heads.weight) / self.options.temperature
        return normalise(scores if self.sharpening is None else scores * self.sharpening, visible)

    def _row_bytes(self, batch: int, source: int) -> int:
        return 4 * batch * source * (2 * self.score_target.out_features + self.heads)


def gin_class(options: Any) -> type[LlamaAttentionGIN]:
    """The GIN attention that these options name."""
    if options.scores == "mlp":
        return LlamaAttentionGINScored
    return LlamaAttentionGINDifferential if options.differential else LlamaAttentionGIN


def rotated_pair(module: Any, hidden_states: Tensor, table: tuple[Tensor, Tensor]) -> Pair:
    """Queries and keys of `q_proj` and `k_proj`, by heads and rotated."""
    return rotated_heads(module.q_proj(hidden_states), module.k_proj(hidden_states), module.head_dim, table)


class LlamaAttentionBesideGIN(LlamaAttention):
    """The stock attention plus lambda times GIN attention over the same queries and keys; lambda is trainable.

    At lambda 0 it is the stock attention, bit for bit. The cache holds what GIN needs beside keys and values.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gin = gin_class(config.gnn_config)(config, layer_idx, beside=True)
        self.first_scale = float(config.gnn_config.scale)
        self.graph_scale = nn.Parameter(torch.full((1,), self.first_scale))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token; arguments and results as in LlamaAttentionGIN."""
        cache = take_cache(kwargs)
        query, key = rotated_pair(self, hidden_states, position_embeddings)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        packed = self.gin.packed_nodes(hidden_states)
        own = self.gin.own_pairs(hidden_states, position_embeddings)
        own_keys = [part for _, part in own]
        if cache is not None:
            parts = [key, *own_keys], [value, packed]
            held = cache.update(torch.cat(parts[0], -1), torch.cat(parts[1], -1), self.layer_idx)
            key, *own_keys = held[0].split([part.shape[-1] for part in parts[0]], -1)
            value, packed = held[1].split([part.shape[-1] for part in parts[1]], -1)
        attended, weights = attention_of_any_width(self, (query, key, value), attention_mask, self.scaling, kwargs)
        first = [(query, key)] if self.gin.reads_first_pair else []
        pairs = first + [(part, keys) for (part, _), keys in zip(own, own_keys, strict=True)]
        messages, _ = self.gin.pass_messages(hidden_states, pairs, packed, attention_mask, kwargs)
        return self.o_proj(join_heads(attended)) + self.graph_scale * messages, weights
