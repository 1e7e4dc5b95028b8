"""Chunked cross-attention: each token reads the neighbours of the last chunk that was complete at its position.

Borgeaud et al. 2021, arXiv 2112.04426, section 2.4.
"""

import torch
from torch import Tensor, nn

from ...configuration.configuration_retro import RetroConfig
from .attention_weights import make_attention
from .neighbour_states import NeighbourStates, join_chunks
from .projections import HeadProjection, HeadSets, OutputProjection
from .retrieval_cache import RetrievalCacheLayer
from .retrieval_pass import RetrievalPass


class ChunkedCrossAttention(nn.Module):
    """Attention of decoder rows to the encoded neighbours of their chunk, behind one learned null slot per head.

    The null slot is a key and a value that nothing rotates or masks, so that a row may attend to nothing and a chunk
    whose neighbours are all padding gives no NaN. All neighbours of a chunk share the positions 0 ... r - 1, so their
    order does not matter.
    """

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        heads, shared, head_dim = config.head_sizes
        self.query_sets, self.key_value_sets = HeadSets((heads,), 0, head_dim), HeadSets((shared,), shared, head_dim)
        self.query = HeadProjection(config.hidden_size, self.query_sets)
        self.key_value = HeadProjection(config.hidden_size, self.key_value_sets)
        self.null_key = nn.Parameter(torch.zeros(shared, head_dim))
        self.null_value = nn.Parameter(torch.zeros(shared, head_dim))
        self.attention = make_attention(config, config.attention_dropout, is_causal=False)
        self.output = OutputProjection(heads * head_dim, config.hidden_size)

    def forward(
        self,
        rows: Tensor,
        reading: RetrievalPass,
        encoded: Tensor | None,
        layer_cache: RetrievalCacheLayer | None = None,
    ) -> Tensor:
        """What each row reads.

        Args:
            rows: (batch, new, hidden_size), normed.
            reading: what this forward pass knows of retrieval.
            encoded: (batch, chunks, neighbours, neighbour_length, hidden_size) neighbours of the chunks that this
                pass completes; None if none were retrieved.
            layer_cache: holds those of the chunk before, and takes in the new ones.

        Returns:
            (batch, new, hidden_size): exact 0 where a row has no neighbours.
        """
        fresh = None if encoded is None else self.project_neighbours(encoded, reading)
        states = self._states_to_read(reading, fresh, layer_cache)
        if states is None:
            return torch.zeros_like(rows)
        projected = self.query(reading.grid.group(rows, reading.skips_past))  # (batch groups, rows, heads head_dim)
        (query,) = self.query_sets.split(projected, reading.row_table(projected))
        mask = None if states.visible is None else states.visible[:, None, None]
        attended, _ = self.attention(query, states.keys, states.values, mask)
        return reading.grid.ungroup(self.output(attended), reading.skips_past)

    def project_neighbours(self, encoded: Tensor, reading: RetrievalPass) -> NeighbourStates:
        """Keys and values of encoded neighbours, once for all rows that will read them."""
        batch, chunks = encoded.shape[:2]
        projected = self.key_value(encoded.flatten(2, 3).flatten(0, 1))
        key, value = self.key_value_sets.split(projected, reading.key_table(projected))
        null_key, null_value = (
            null.to(key.dtype)[None, :, None].expand(batch * chunks, -1, -1, -1)
            for null in (self.null_key, self.null_value)
        )
        visible = reading.visible
        if visible is not None:
            visible = torch.cat([visible.new_ones(batch, chunks, 1), visible.flatten(2)], dim=2)
        return NeighbourStates(
            torch.cat([null_key, key], dim=2).unflatten(0, (batch, chunks)),
            torch.cat([null_value, value], dim=2).unflatten(0, (batch, chunks)),
            visible,
        )

    def _states_to_read(
        self, reading: RetrievalPass, fresh: NeighbourStates | None, layer_cache: RetrievalCacheLayer | None
    ) -> NeighbourStates | None:
        """What the groups of this pass read, (batch groups, ...) as if all were rows; None if no row reads any."""
        past = None if layer_cache is None else layer_cache.latest
        grid = reading.grid
        if layer_cache is not None:
            layer_cache.complete(fresh, grid)
            if grid.new == 1:
                return layer_cache.latest
        parts = ([] if past is None else [past.with_chunk_axis()]) + ([] if fresh is None else [fresh])
        if not parts:
            return None
        states = join_chunks(parts)
        unread = grid.group_start(reading.skips_past) - (past is None)
        return states.map(lambda held: held[:, unread:].flatten(0, 1))
