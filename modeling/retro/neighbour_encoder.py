"""The encoder of neighbours: bidirectional, and conditioned on the chunk whose neighbours they are.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.3 and algorithm 1.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...configuration.configuration_retro import RetroConfig
from .attention_weights import make_attention
from .normalisation import make_norm, make_residual
from .partial_rotary import Rotary, rotary_table
from .projections import HeadProjection, HeadSets, OutputProjection, make_feed_forward
from .self_attention import NeighbourSelfAttention


class ChunkConditioning(nn.Module):
    """Cross-attention of neighbours to their chunk, whose keys and values all of its neighbours share."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        heads, shared, head_dim = config.head_sizes
        width = config.encoder_width
        self.query_sets, self.key_value_sets = HeadSets((heads,), 0, head_dim), HeadSets((shared,), shared, head_dim)
        self.query = HeadProjection(width, self.query_sets)
        self.key_value = HeadProjection(config.hidden_size, self.key_value_sets)
        self.attention = make_attention(config, config.encoder_attention_dropout, is_causal=False)
        self.output = OutputProjection(heads * head_dim, width)

    def forward(self, rows: Tensor, chunks: Tensor, row_table: Rotary, chunk_table: Rotary) -> Tensor:
        """Let each row read its chunk.

        Args:
            rows: (chunks neighbours, length, encoder_hidden_size).
            chunks: (chunks, m, hidden_size).
            row_table, chunk_table: rotary tables of the positions 0 ... length - 1 and 0 ... m - 1.
        """
        count, length = chunks.shape[0], rows.shape[1]
        (query,) = self.query_sets.split(self.query(rows), row_table)  # (chunks neighbours, heads, length, head_dim)
        query = query.unflatten(0, (count, -1)).transpose(1, 2).flatten(2, 3)
        key, value = self.key_value_sets.split(self.key_value(chunks), chunk_table)
        attended, _ = self.attention(query, key, value, None)
        return self.output(attended).reshape(-1, length, rows.shape[-1])


class NeighbourEncoderLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention to the chunk where the config says so, feed-forward."""

    def __init__(self, config: RetroConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.encoder_width
        self.self_attention = NeighbourSelfAttention(config)
        self.self_residual = make_residual(config, width, of_encoder=True)
        self.has_cross_attention = layer_idx in (config.encoder_cross_attention_layers or ())
        if self.has_cross_attention:
            self.cross_attention = ChunkConditioning(config)
            self.cross_residual = make_residual(config, width, of_encoder=True)
        self.feed_forward = make_feed_forward(config, of_encoder=True)
        self.feed_forward_residual = make_residual(config, width, of_encoder=True)

    def forward(
        self, rows: Tensor, chunks: Tensor, row_table: Rotary, chunk_table: Rotary, visible: Tensor | None
    ) -> Tensor:
        """(chunks neighbours, length, encoder_hidden_size) to the same; arguments as in NeighbourEncoder."""
        rows = self.self_residual(rows, partial(self.self_attention, table=row_table, visible=visible))
        if self.has_cross_attention:
            tables = {"row_table": row_table, "chunk_table": chunk_table}
            rows = self.cross_residual(rows, partial(self.cross_attention, chunks=chunks, **tables))
        return self.feed_forward_residual(rows, partial(self.feed_forward))


class NeighbourEncoder(nn.Module):
    """Encodes embedded neighbours into rows of the decoder's width."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        width = config.encoder_width
        self.config = config
        self.layers = nn.ModuleList(NeighbourEncoderLayer(config, i) for i in range(config.num_encoder_layers))
        self.norm = make_norm(config, width) if config.residual == "prenorm" else nn.Identity()
        self.output = nn.Linear(width, config.hidden_size)

    def forward(self, embedded: Tensor, visible: Tensor | None, chunks: Tensor) -> Tensor:
        """Encode the neighbours of each chunk.

        Args:
            embedded: (batch, chunks, neighbours, length, encoder_hidden_size).
            visible: (batch, chunks, neighbours, length) bool, False at padding; None if nothing is padded.
            chunks: (batch, chunks, m, hidden_size), what conditions them.

        Returns:
            (batch, chunks, neighbours, length, hidden_size); finite where a neighbour is all padding.
        """
        rows = embedded.flatten(0, 2)
        mask = None
        if visible is not None:
            first = torch.arange(rows.shape[1], device=rows.device) == 0
            empty = ~visible.any(-1, keepdim=True)  # these may see their first token, so that no softmax is empty
            mask = (visible | (empty & first)).flatten(0, 2)[:, None, None]
        row_table, chunk_table = self._table(rows), self._table(chunks.flatten(0, 1))
        for layer in self.layers:
            rows = layer(rows, chunks.flatten(0, 1), row_table, chunk_table, mask)
        return self.output(self.norm(rows)).view(*embedded.shape[:-1], -1)

    def _table(self, rows: Tensor) -> Rotary:
        """The rotary table of positions 0, 1, ... of (any, length, width)."""
        positions = torch.arange(rows.shape[1], device=rows.device)[None]
        return rotary_table(positions, self.config.rotary_width, self.config.rope_theta, rows.dtype)
