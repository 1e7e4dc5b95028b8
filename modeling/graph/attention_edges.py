"""From queries and keys to the edges of a graph, a block of rows at a time: no attention map of all rows is held."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .adjacency import AttentionAdjacency
from .attention_rows import AttentionRows, ScoredPairs, read_by
from .edge_storage import BlockedEdges, Edges, SparseEdges, edges_to_keep, largest_edges
from .summed_slices import SummedSlices
from .visible_rows import row_blocks

Connect = Callable[[Tensor, Tensor, range], tuple[Tensor, ...]]
"""From the attention weights of some rows, which are visible, and the rows, to their edges."""


def attention_edges(pairs: ScoredPairs, adjacency: AttentionAdjacency, storage: str, block_bytes: int) -> Edges:
    """The graph of softmax(scaling q k^T).

    Args:
        adjacency: what makes it of attention weights.
        storage: "auto", "dense" or "sparse", see `edges_to_keep`.
        block_bytes: largest block of attention weights.

    Returns:
        Edges of all rows, in float32 or wider.
    """
    kept = edges_to_keep(adjacency.bound, pairs.sizes[1], storage)
    connect = partial(_edges_of, True, pairs.sizes, adjacency, kept)
    parts = _in_blocks(partial(_edge_rows, AttentionRows(pairs), connect), pairs, adjacency, block_bytes)
    return _join(parts, pairs.sizes[1])


def attend_with_edges(
    pairs: ScoredPairs,
    value: Tensor,
    dropout: float,
    adjacency: AttentionAdjacency,
    storage: str,
    block_bytes: int,
    trains_adjacency: bool = True,
) -> tuple[Tensor, Edges]:
    """softmax(scaling q k^T) v and the graph of the same weights, which are made once.

    Args:
        value: (batch, heads or a divisor of them, source, width), each for as many heads as follow each other.
        dropout: of the weights that meet values; the graph is made of all.
        trains_adjacency: whether queries and keys have a gradient through the graph too.

    Returns:
        (batch, heads, target, width), and the edges as by `attention_edges`.
    """
    kept = edges_to_keep(adjacency.bound, pairs.sizes[1], storage)
    connect = partial(_edges_of, trains_adjacency, pairs.sizes, adjacency, kept)
    compute = partial(_attend_rows, AttentionRows(pairs), SummedSlices(value), dropout, connect)
    parts = _in_blocks(compute, pairs, adjacency, block_bytes)
    output = torch.cat([part[0] for part in parts], dim=-2)
    return output, _join([part[1:] for part in parts], pairs.sizes[1])


def _edge_rows(attention: AttentionRows, connect: Connect, rows: range) -> tuple[Tensor, ...]:
    return connect(*attention.weights(rows), rows)


def _attend_rows(
    attention: AttentionRows,
    values: SummedSlices,
    dropout: float,
    connect: Connect,
    rows: range,
) -> tuple[Tensor, ...]:
    weights, visible = attention.weights(rows)
    edges = connect(weights, visible, rows)
    # Last, for a block that is computed again in the backward pass stops before what no gradient needs.
    return read_by(weights, values, dropout), *edges


def _edges_of(
    trained: bool,
    sizes: tuple[int, int],
    adjacency: AttentionAdjacency,
    kept: int | None,
    weights: Tensor,
    visible: Tensor,
    rows: range,
) -> tuple[Tensor, ...]:
    behind = sizes[1] - sizes[0]
    weights = weights if trained else weights.detach()
    graph = adjacency(weights, visible, range(rows.start + behind, rows.stop + behind))
    return (graph,) if kept is None else largest_edges(graph, kept)


def _in_blocks(
    compute: partial[tuple[Tensor, ...]], pairs: ScoredPairs, adjacency: AttentionAdjacency, block_bytes: int
) -> list[tuple[Tensor, ...]]:
    row_bytes = 4 * pairs.query.shape[0] * adjacency.pair_width * pairs.sizes[1]
    return row_blocks(compute, pairs.sizes[0], row_bytes, block_bytes)


def _join(parts: list[tuple[Tensor, ...]], source: int) -> Edges:
    weights, *indices = zip(*parts, strict=True)
    if indices:
        return SparseEdges(torch.cat(weights, dim=-2), torch.cat(indices[0], dim=-2), source)
    return BlockedEdges(weights, source)
