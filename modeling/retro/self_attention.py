"""Self-attention with rotary positions, of the decoder (causal, with a cache) and of the encoder (bidirectional)."""

from torch import Tensor, nn
from transformers import Cache

from ...configuration.configuration_retro import RetroConfig
from .attention_weights import make_attention
from .partial_rotary import Rotary
from .projections import HeadProjection, HeadSets, OutputProjection


class CausalSelfAttention(nn.Module):
    """Queries, keys and values by one product; keys and values go through the cache."""

    def __init__(self, config: RetroConfig, layer_idx: int) -> None:
        super().__init__()
        heads, shared, head_dim = config.head_sizes
        self.layer_idx = layer_idx
        self.sets = HeadSets((heads, shared), shared, head_dim)
        self.query_key_value = HeadProjection(config.hidden_size, self.sets)
        self.attention = make_attention(config, config.attention_dropout, is_causal=True)
        self.output = OutputProjection(heads * head_dim, config.hidden_size)

    def forward(self, rows: Tensor, table: Rotary, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(batch, new, hidden_size) to the same; `mask` as transformers makes it for the implementation in use."""
        query, key, value = self.sets.split(self.query_key_value(rows), table)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, _ = self.attention(query, key, value, mask)
        return self.output(attended)


class NeighbourSelfAttention(nn.Module):
    """Every token of a neighbour attends to all of its tokens."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        heads, shared, head_dim = config.head_sizes
        width = config.encoder_width
        self.sets = HeadSets((heads, shared), shared, head_dim)
        self.query_key_value = HeadProjection(width, self.sets)
        self.attention = make_attention(config, config.encoder_attention_dropout, is_causal=False)
        self.output = OutputProjection(heads * head_dim, width)

    def forward(self, rows: Tensor, table: Rotary, visible: Tensor | None) -> Tensor:
        """(all neighbours, length, width) to the same; `visible` is (all neighbours, 1, 1, length) bool or None."""
        query, key, value = self.sets.split(self.query_key_value(rows), table)
        attended, _ = self.attention(query, key, value, visible)
        return self.output(attended)
