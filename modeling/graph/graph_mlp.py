"""Feed-forward parts of a graph-aware Llama: plainer ones, and three that send messages along attention.

A message is a sum over the attention of the layer, P_h u, computed as one more attention call with u in the
place of values: no attention map of all rows is written out. Buehler 2025, arXiv 2501.02393.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from ...configuration.configuration_gnn import LlamaGNNConfig
from .aggregation import visible_maximum
from .attention_rows import ScoredPairs
from .llama_heads import attention_of_any_width, join_heads, split_heads
from .node_cache import NodeCacheLayer


class LlamaSimpleMLP(nn.Module):
    """act(W x) with a square W."""

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__()
        self.map = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.activation(self.map(states))


class ShallowLlamaMLP(nn.Module):
    """W2 act(W1 x): Llama's feed-forward without its gate."""

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(states)))


class AttentionMessages(nn.Module):
    """P_h u for each head h, P the attention of `pairs`, with the attention implementation of the model."""

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__()
        self.config, self.is_causal, self.attention_dropout = config, True, 0.0
        self.num_key_value_groups = 1  # read by the attention functions: keys are repeated already

    def forward(self, pairs: ScoredPairs, sources: Tensor) -> Tensor:
        """What each token receives: sources (batch, heads, source, width) to (batch, heads, target, width)."""
        states = (pairs.query, pairs.key_of_heads, sources.to(pairs.query.dtype))
        received, _ = attention_of_any_width(self, states, pairs.mask, pairs.scaling, {})
        return received.to(sources.dtype)


def with_earlier(cache_layer: NodeCacheLayer | None, name: str, sources: Tensor) -> Tensor:
    """Sources of new tokens behind those of all earlier ones, which the cache holds under `name`."""
    return sources if cache_layer is None else cache_layer.append_nodes(name, sources)


class LlamaMLPHalfwayGIN(LlamaMLP):
    """W_down [(1 + eps_h) u_h + alpha_h P_h u_h] with u = act(W_gate x) W_up x, cut into a slice u_h for each head.

    eps begins at 0, alpha at `mlp_message_scale`; with alpha = 0 this is Llama's MLP.
    """

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__(config)
        heads = config.num_attention_heads
        self.slice_width = config.intermediate_size // heads
        self.first_message_weight = float(config.gnn_config.mlp_message_scale)
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.message_weight = nn.Parameter(torch.full((heads, 1, 1), self.first_message_weight))
        self.messages = AttentionMessages(config)

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        init.zeros_(self.epsilon)
        init.constant_(self.message_weight, self.first_message_weight)

    def forward(self, states: Tensor, pairs: ScoredPairs, cache_layer: NodeCacheLayer | None = None) -> Tensor:  # type: ignore[override]
        """Update each token.

        Args:
            states: (batch, target, hidden_size), normed.
            pairs: of the layer's attention.
            cache_layer: takes in and gives back what earlier tokens send.
        """
        inner = split_heads(self.act_fn(self.gate_proj(states)) * self.up_proj(states), self.slice_width)
        received = self.messages(pairs, with_earlier(cache_layer, "inner", inner))
        updated = (1 + self.epsilon) * inner + self.message_weight * received
        return self.down_proj(join_heads(updated).to(states.dtype))


_HOPS = (1.0, 0.5, 0.1)


class LlamaMLPMultiHop(LlamaMLP):
    """D_h [act(G_h x_h) * U_h ((1 + eps) x_h + a_1 P x_h + a_2 P^2 x_h + a_3 P^3 x_h)] for each head h, joined.

    x_h is head h's slice of the states and G_h, U_h, D_h the columns of gate and up and the rows of down that belong
    to it, so a stock MLP's weights fit. P and U_h commute, so messages are as narrow as a slice, and P^2 x = P (P x).
    The weights of hops begin at 1, 0.5, 0.1 times `mlp_message_scale`, eps at 0.
    """

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__(config)
        self.heads = config.num_attention_heads
        self.slice_width = config.hidden_size // self.heads
        self.first_hop_weights = [weight * float(config.gnn_config.mlp_message_scale) for weight in _HOPS]
        self.epsilon = nn.Parameter(torch.zeros(self.heads, 1, 1))
        self.hop_weights = nn.ParameterList(
            nn.Parameter(torch.full((self.heads, 1, 1), first)) for first in self.first_hop_weights
        )
        self.messages = AttentionMessages(config)

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        init.zeros_(self.epsilon)
        for weight, first in zip(self.hop_weights, self.first_hop_weights, strict=True):
            init.constant_(weight, first)

    def forward(self, states: Tensor, pairs: ScoredPairs, cache_layer: NodeCacheLayer | None = None) -> Tensor:  # type: ignore[override]
        """Update each token; arguments as in LlamaMLPHalfwayGIN."""
        slices = split_heads(states, self.slice_width)
        own, mixed, total = slices, (1 + self.epsilon) * slices, 1 + self.epsilon
        for hop, weight in enumerate(self.hop_weights):
            own = self.messages(pairs, with_earlier(cache_layer, f"hop {hop}", own))
            mixed, total = mixed + weight * own, total + weight
        gate = self._by_head(slices, self.gate_proj)
        up = self._by_head(mixed.to(states.dtype), self.up_proj, total)
        down = self.down_proj.weight.unflatten(0, (self.heads, self.slice_width)).transpose(1, 2)
        output = join_heads((self.act_fn(gate) * up) @ down)
        return output if self.down_proj.bias is None else output + self.down_proj.bias

    def _by_head(self, slices: Tensor, stock: nn.Linear, total: Any = 1) -> Tensor:
        """(batch, heads, source, slice) through each head's columns of a map; its bias counts `total` times."""
        weight = stock.weight.unflatten(1, (self.heads, self.slice_width)).permute(1, 2, 0)
        mapped = slices @ weight
        return mapped if stock.bias is None else mapped + total * stock.bias


class LlamaMLPMultiAggregation(LlamaMLP):
    """W_down [MLP(own, sum, largest, selected)_h] over slices u_h of u = act(W_gate x) W_up x, one MLP for all heads.

    own = (1 + eps_h) u_h; sum = alpha_h P_h u_h; largest = max over visible tokens, coordinate by coordinate; selected
    = softmax(Q K^T / sqrt(w) + log P_h) u_h with Q, K two maps of u_h of width w. log P_h is the attention's own score
    up to a number for each row, which the softmax takes away: one attention with both scores side by side.
    """

    def __init__(self, config: LlamaGNNConfig) -> None:
        super().__init__(config)
        options, heads = config.gnn_config, config.num_attention_heads
        width = config.intermediate_size // heads
        inner = max(1, int(options.mlp_ratio * width))
        self.slice_width, self.first_message_weight = width, float(options.mlp_message_scale)
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.message_weight = nn.Parameter(torch.full((heads, 1, 1), self.first_message_weight))
        self.query_map = nn.Linear(width, width, bias=False)
        self.key_map = nn.Linear(width, width, bias=False)
        self.aggregate_up = nn.Linear(4 * width, inner, bias=config.mlp_bias)
        self.aggregate_down = nn.Linear(inner, width, bias=config.mlp_bias)
        self.messages = AttentionMessages(config)

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        init.zeros_(self.epsilon)
        init.constant_(self.message_weight, self.first_message_weight)

    def forward(self, states: Tensor, pairs: ScoredPairs, cache_layer: NodeCacheLayer | None = None) -> Tensor:  # type: ignore[override]
        """Update each token; arguments as in LlamaMLPHalfwayGIN."""
        inner = split_heads(self.act_fn(self.gate_proj(states)) * self.up_proj(states), self.slice_width)
        sources = with_earlier(cache_layer, "inner", inner)
        keys = with_earlier(cache_layer, "keys", self.key_map(inner))
        received = self.messages(pairs, sources)
        largest = visible_maximum(sources, pairs.mask, inner.shape[2])
        selected = self.messages(self._selection(pairs, self.query_map(inner), keys), sources)
        read = [(1 + self.epsilon) * inner, self.message_weight * received, largest, selected]
        updated = self.aggregate_up(torch.cat([part.to(states.dtype) for part in read], dim=-1))
        return self.down_proj(join_heads(self.aggregate_down(functional.silu(updated))))

    def _selection(self, pairs: ScoredPairs, queries: Tensor, keys: Tensor) -> ScoredPairs:
        """Scores Q K^T / sqrt(w) + scaling q k^T as one product."""
        dtype = pairs.query.dtype
        query = torch.cat([queries.to(dtype) * self.slice_width**-0.5, pairs.query * pairs.scaling], dim=-1)
        return ScoredPairs(query, torch.cat([keys.to(dtype), pairs.key_of_heads], dim=-1), 1.0, pairs.mask)


_MLPS: dict[str, Any] = {
    "standard": LlamaMLP,
    "linear": LlamaSimpleMLP,
    "shallow": ShallowLlamaMLP,
    "none": lambda config: nn.Identity(),
    "halfway_gin": LlamaMLPHalfwayGIN,
    "multi_hop": LlamaMLPMultiHop,
    "multi_aggregation": LlamaMLPMultiAggregation,
}


def make_mlp(config: LlamaGNNConfig) -> nn.Module:
    """The feed-forward part that `gnn_config.mlp` names."""
    made: nn.Module = _MLPS[config.gnn_config.mlp](config)
    return made
