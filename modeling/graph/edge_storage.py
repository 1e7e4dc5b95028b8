"""A graph over tokens, as a weight for each pair or as the edges of each row; sums over edges look the same."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from .summed_slices import SummedSlices

_SHORT = 1024  # tokens up to which a product of matrices is faster than looking edges up


@dataclass(frozen=True)
class DenseEdges:
    """`weight` (..., rows, source): row i weighs the edges j -> i, and 0 is no edge."""

    weight: Tensor

    @property
    def source(self) -> int:
        """Number of tokens that may be read."""
        return self.weight.shape[-1]

    def whole(self) -> Self:
        """The graph with all its rows in one tensor."""
        return self

    def with_weight(self, weight: Tensor) -> Self:
        """The same pairs, weighed otherwise."""
        return replace(self, weight=weight)

    def spread(self) -> Self:
        """The same graph for each slice of the nodes: an axis in front of rows and source."""
        return replace(self, weight=self.weight.unsqueeze(-3))

    def block(self, rows: range) -> Self:
        """Some of the rows."""
        return replace(self, weight=self.weight[..., rows.start : rows.stop, :])

    def sum(self, sources: Tensor) -> Tensor:
        """sum_j w_ij z_j of sources z (..., source, width)."""
        return self.weight.to(sources.dtype) @ sources

    def take(self, values: Tensor) -> Tensor:
        """A number of each source (..., source), broadcast to `weight`."""
        return values.unsqueeze(-2)

    def gather(self, sources: Tensor) -> Tensor:
        """Sources (..., source, width), broadcast to (..., rows, source, width)."""
        return sources.unsqueeze(-3)

    def places(self) -> Tensor:
        """The source of each weight, broadcast to `weight`."""
        return torch.arange(self.weight.shape[-1], device=self.weight.device)


@dataclass(frozen=True)
class BlockedEdges:
    """As DenseEdges in `blocks` of rows (..., rows, seen), without the keys at the end that no row of a block reads.

    `source`: number of tokens that may be read.
    """

    blocks: tuple[Tensor, ...]
    source: int

    def whole(self) -> DenseEdges:
        """The graph with all its rows in one tensor."""
        return DenseEdges(torch.cat([pad(block, (0, self.source - block.shape[-1])) for block in self.blocks], dim=-2))

    def sum(self, sources: Tensor) -> Tensor:
        """sum_j w_ij z_j of sources z (..., source, width)."""
        slices = SummedSlices(sources)
        parts = [block.to(sources.dtype) @ slices.take(0, block.shape[-1]) for block in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


@dataclass(frozen=True)
class SparseEdges:
    """The edges of each row: their sources and weights, each (..., rows, edges); weight 0 is no edge.

    `source`: number of tokens that may be read.
    """

    weight: Tensor
    index: Tensor
    source: int

    def whole(self) -> Self:
        """The graph with all its rows in one tensor."""
        return self

    def with_weight(self, weight: Tensor) -> Self:
        """The same pairs, weighed otherwise."""
        return replace(self, weight=weight)

    def spread(self) -> Self:
        """The same graph for each slice of the nodes: an axis in front of rows and edges."""
        return replace(self, weight=self.weight.unsqueeze(-3), index=self.index.unsqueeze(-3))

    def block(self, rows: range) -> Self:
        """Some of the rows."""
        part = slice(rows.start, rows.stop)
        return replace(self, weight=self.weight[..., part, :], index=self.index[..., part, :])

    def sum(self, sources: Tensor) -> Tensor:
        """sum_j w_ij z_j of sources z (..., source, width)."""
        leading, width = sources.shape[:-2], sources.shape[-1]
        index, weight = self._flat_index(leading), self.weight.expand(*leading, *self.weight.shape[-2:])
        summed = embedding_bag(
            index.reshape(-1, index.shape[-1]),
            sources.reshape(-1, width),
            per_sample_weights=weight.reshape(-1, weight.shape[-1]).to(sources.dtype),
            mode="sum",
        )
        return summed.view(*leading, -1, width)

    def take(self, values: Tensor) -> Tensor:
        """A number of each source (..., source), for each weight."""
        return values.reshape(-1)[self._flat_index(values.shape[:-1])]

    def gather(self, sources: Tensor) -> Tensor:
        """Sources (..., source, width), as (..., rows, edges, width)."""
        return sources.reshape(-1, sources.shape[-1])[self._flat_index(sources.shape[:-2])]

    def places(self) -> Tensor:
        """The source of each weight."""
        return self.index

    def _flat_index(self, leading: torch.Size) -> Tensor:
        """Places among all sources of all leading axes, (*leading, rows, edges)."""
        starts = torch.arange(leading.numel(), device=self.index.device) * self.source
        return self.index.expand(*leading, *self.index.shape[-2:]) + starts.view(*leading, 1, 1)


WholeEdges = DenseEdges | SparseEdges
Edges = WholeEdges | BlockedEdges


def edges_to_keep(bound: int | None, source: int, storage: str) -> int | None:
    """How many edges of each row are stored; None for a weight of each pair.

    Args:
        bound: the most that a row can have, None where there is no bound.
        source: number of tokens that may be read.
        storage: "auto", "dense" or "sparse".
    """
    if bound is None or storage == "dense":
        return None
    if storage == "auto" and source <= max(2 * bound, _SHORT):
        return None
    return max(1, min(bound, source))


def largest_edges(graph: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Weights and sources of the `kept` largest weights of each row, filled up with 0 where the row is shorter."""
    weight, index = graph.topk(min(kept, graph.shape[-1]), dim=-1, sorted=False)
    missing = (0, kept - weight.shape[-1])
    return pad(weight, missing), pad(index, missing)
