"""Keys and values of encoded neighbours, as cross-attention reads them: one set per chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class NeighbourStates:
    """What one cross-attention layer reads of the neighbours of some chunks.

    Args:
        keys, values: (batch, chunks, key_value_heads, 1 + neighbours neighbour_length, head_dim); the null slot is
            first. Without the axis of chunks, those of one chunk per row.
        visible: (batch, chunks, 1 + neighbours neighbour_length) bool, False at padding; None if nothing is padded.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> NeighbourStates:
        """Apply an operation on batch or chunks to each tensor."""
        visible = None if self.visible is None else function(self.visible)
        return NeighbourStates(function(self.keys), function(self.values), visible)

    def with_chunk_axis(self) -> NeighbourStates:
        """One chunk per row as a list of one chunk."""
        return self.map(lambda states: states.unsqueeze(1))

    def seen(self) -> Tensor:
        """`visible`, made if it is None."""
        if self.visible is not None:
            return self.visible
        shape = (*self.keys.shape[:-3], self.keys.shape[-2])
        return torch.ones(shape, dtype=torch.bool, device=self.keys.device)


def join_chunks(parts: Sequence[NeighbourStates]) -> NeighbourStates:
    """Put the chunks of several states behind one another; shorter sets of neighbours are filled up, invisibly."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.keys.shape[-2] for part in parts)
    same = all(part.keys.shape[-2] == length and part.visible is None for part in parts)
    keys = torch.cat([_fill(part.keys, length) for part in parts], dim=1)
    values = torch.cat([_fill(part.values, length) for part in parts], dim=1)
    visible = None if same else torch.cat([pad(part.seen(), (0, length - part.keys.shape[-2])) for part in parts], 1)
    return NeighbourStates(keys, values, visible)


def _fill(states: Tensor, length: int) -> Tensor:
    """Fill (..., source, head_dim) up to `length` rows."""
    missing = length - states.shape[-2]
    return pad(states, (0, 0, 0, missing)) if missing else states
