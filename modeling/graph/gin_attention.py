"""Attention as a GIN layer: each head sums the states of its neighbours and sends the sum through its own MLP."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import repeat_kv

from ...configuration.configuration_gnn import EdgeTransformConfig, LlamaGNNConfig
from ..transformers_compat import take_cache
from .edge_transforms import edge_weights
from .llama_heads import active_dropout, equal_width_attention, join_heads, rotated_heads, split_heads
from .per_head_mlp import PerHeadMLP
from .visible_rows import attention_rows, in_row_blocks, visible_rows


def sum_over_edges(
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    options: EdgeTransformConfig,
    dropout: float,
    block_bytes: int,
) -> Tensor:
    """T(softmax(scaling q k^T)) x, in blocks of rows that are computed again in the backward pass.

    Args:
        states: query (batch, heads, target, head_dim), key (batch, heads, source, head_dim), and the nodes x
            (batch, heads, source, width).
        mask: as transformers makes it, see `visible_rows`.
        dropout: of the attention weights, before T.
        block_bytes: largest block of attention weights.

    Returns:
        (batch, heads, target, width).
    """
    query, key, _ = states
    compute = partial(_sum_rows, states, mask, scaling, options, dropout)
    row_bytes = 4 * query.shape[0] * query.shape[1] * key.shape[2]
    return in_row_blocks(compute, query.shape[2], row_bytes, block_bytes)


def _sum_rows(
    states: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    options: EdgeTransformConfig,
    dropout: float,
    rows: range,
) -> Tensor:
    query, key, nodes = states
    target, source = query.shape[2], key.shape[2]
    if mask is None and target > 1:  # causal: the keys behind the block's last row are seen by none of its rows
        seen = rows.stop
        key, nodes = key[:, :, :seen], nodes[:, :, :seen]
    visible = visible_rows(mask, rows, (target, source), query.device)[..., : key.shape[2]]
    weights = attention_rows(query[:, :, rows.start : rows.stop], key, scaling, visible)
    weights = functional.dropout(weights, dropout, dropout > 0)
    return edge_weights(weights, visible, options).to(nodes.dtype) @ nodes


class LlamaAttentionGIN(nn.Module):
    """y_h = MLP_h(eps_h x_h + T(softmax(alpha q k^T / (T sqrt d))) x_h), where x_h is head h's slice of the input.

    There are no values: the normed hidden state itself, cut into heads, is what neighbours send. The cache holds it in
    the place of values. Buehler 2025 (arXiv 2501.02393), "GIN-Attention".
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__()
        options = config.gnn_config
        heads, groups, width = config.num_attention_heads, int(config.num_key_value_heads or 0), config.hidden_size
        self.config, self.layer_idx, self.options = config, layer_idx, options
        self.head_dim = int(config.head_dim or width // heads)
        self.repeats = heads // groups
        self.node_width = width // heads
        self.num_key_value_groups = 1  # read by the attention functions: keys are repeated here
        self.is_causal = True
        self.attention_dropout = float(config.attention_dropout or 0)
        self.scaling = self.head_dim**-0.5 / options.temperature
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=config.attention_bias)
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.sharpening = None if options.sharpening is None else nn.Parameter(torch.full((1,), options.sharpening))
        inner = max(1, int(options.mlp_ratio * self.node_width))
        self.update = PerHeadMLP(heads, self.node_width, inner, options.mlp_dropout, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, width, bias=config.attention_bias) if options.output_projection else None

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
        queries, keys = self.q_proj(hidden_states), self.k_proj(hidden_states)
        query, key = rotated_heads(queries, keys, self.head_dim, position_embeddings)
        nodes = split_heads(hidden_states, self.node_width)
        sources = nodes
        if cache is not None:
            # Stored by groups of heads, so that keys and values agree in their number of heads as caches expect.
            packed = split_heads(hidden_states, self.repeats * self.node_width)
            key, packed = cache.update(key, packed, self.layer_idx)
            sources = packed.unflatten(-1, (self.repeats, self.node_width)).transpose(2, 3).flatten(1, 2)
        key = repeat_kv(key, self.repeats)
        if self.sharpening is not None:
            query = query * self.sharpening
        messages, weights = self._messages((query, key, sources), attention_mask, kwargs)
        output = join_heads(self.update(self.epsilon * nodes + messages))
        return (output if self.o_proj is None else self.o_proj(output)), weights

    def _messages(
        self, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What the neighbours of each token send, (batch, heads, target, node_width)."""
        if self.options.edges.transform == "none":
            return equal_width_attention(self, states, mask, self.scaling, arguments)
        edges, block_bytes = self.options.edges, self.options.block_bytes
        return sum_over_edges(states, mask, self.scaling, edges, active_dropout(self), block_bytes), None
