"""Attention with several aggregators: mean, largest, variance and smallest of what a head's neighbours send."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from ...configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from ..transformers_compat import take_cache
from .aggregation import Aggregates, variance, visible_maximum
from .llama_heads import attention_of_any_width, join_heads, query_key_value


def extremes(values: Tensor, mask: Tensor | None, target: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each coordinate among the keys a row may read.

    Every visible key has weight above 0 under softmax, so queries play no part.

    Args:
        values: (batch, key_value_heads, source, head_dim).
        mask: as transformers makes it. The keys that a row may read lie side by side: causal, padded on either end,
            packed documents, windows.
        target: number of rows.

    Returns:
        Two of (batch, key_value_heads, target, head_dim).
    """
    return visible_maximum(values, mask, target), -visible_maximum(-values, mask, target)


def without_sum(read: Aggregates) -> Tensor:
    """[mean, max, var, min]: what weights that sum to 1 have to say."""
    return torch.cat([read.mean, read.largest, read.variance, read.smallest], dim=-1)


def with_sum(read: Aggregates) -> Tensor:
    """[sum, mean, max, var], the original's."""
    return torch.cat([read.total, read.mean, read.largest, read.variance], dim=-1)


def reading(options: GNNConfig) -> Any:
    """The aggregates that the MLP reads: `without_sum` or `with_sum`."""
    if options.aggregates == "auto":
        sums_to_one = options.edges.transform == "none" and options.normalisation == "softmax"
        return without_sum if sums_to_one or options.attention == "pna_vector" else with_sum
    return with_sum if options.aggregates == "sum" else without_sum


class LlamaAttentionPNA(LlamaAttention):
    """y_h = W2 silu(W1 [mean, max, var, min]) over the values that token i reads, then the stock output map.

    mean and var are weighted by attention, max and min go over all visible keys. After Corso et al. 2020 (arXiv
    2004.05718) and Buehler 2025 (arXiv 2501.02393). With `residual_mean`, y_h = mean + W2 silu(...), W2 begins at 0.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options = config.gnn_config
        inner = max(1, int(options.mlp_ratio * self.head_dim))
        self.residual_mean = options.residual_mean
        self.reading = reading(options)
        self.aggregate_up = nn.Linear(4 * self.head_dim, inner, bias=config.mlp_bias)
        self.aggregate_down = nn.Linear(inner, self.head_dim, bias=config.mlp_bias)
        self.aggregate_down.starts_at_zero = options.residual_mean  # read by `_init_weights`

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token; arguments and results as in LlamaAttentionGIN."""
        states = query_key_value(self, hidden_states, position_embeddings, take_cache(kwargs))
        read, weights = self.aggregate(states, attention_mask, kwargs)
        update = self.aggregate_down(functional.silu(self.aggregate_up(self.reading(read))))
        output = self.o_proj(join_heads(read.mean + update if self.residual_mean else update))
        return output, weights

    def aggregate(
        self, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Aggregates, Tensor | None]:
        """Mean and second moment by one fused call; the weights if the implementation gives them."""
        query, key, value = states
        both = torch.cat([value, value.square()], dim=-1)
        moments, weights = attention_of_any_width(self, (query, key, both), mask, self.scaling, arguments)
        mean, second = moments.split(self.head_dim, dim=-1)
        largest, smallest = extremes(value, mask, query.shape[2])
        largest, smallest = (repeat_kv(part, self.num_key_value_groups) for part in (largest, smallest))
        return Aggregates(mean, mean, largest, smallest, variance(second, mean)), weights
