"""Graphs over tokens that come from elsewhere, and what tokens read along them; nothing here is tokens x tokens.

Token i READS token j, which is never later than i. `TokenEdges` lists such pairs; `ChunkGraph` weighs pairs of chunks,
as a graph of a document or the operators of a query plan are.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .external_graph import ExternalGraph, PassShape
from .sparse_rows import SparseRows

_BLOCK = 64  # rows whose pairs are written out


def sum_of_duplicates(key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each key (edges,) once, in order, with the sum of its weights."""
    once, place = torch.unique(key, return_inverse=True)
    return once, weight.new_zeros(once.shape[0]).index_add(0, place, weight)


def chunk_sizes(chunk_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many tokens each chunk has, (batch, count), and each token's place in its chunk from 1, (batch, source)."""
    in_chunk = (chunk_ids >= 0).long()
    sizes = in_chunk.new_zeros(chunk_ids.shape[0], count).scatter_add(1, chunk_ids.clamp(min=0), in_chunk)
    before = (sizes.cumsum(1) - sizes).gather(1, chunk_ids.clamp(min=0))
    return sizes, in_chunk.cumsum(1) - before


def segments(chunk_ids: Tensor, target: int, size: int, count: int) -> Tensor:
    """Numbers of runs of tokens in one chunk and one block of `size` rows; all tokens before the rows are one block.

    Args:
        chunk_ids: (batch, source); its last `target` are those of the rows.
        count: number given to tokens of no chunk, above all others.
    """
    latest = chunk_ids.cummax(1).values
    place = torch.arange(chunk_ids.shape[1], device=chunk_ids.device) - (chunk_ids.shape[1] - target)
    block = place.clamp(min=-1).div(size, rounding_mode="floor")
    begins = (latest.diff(dim=1, prepend=latest[:, :1]) != 0) | (block.diff(prepend=block[:1]) != 0)
    return begins.cumsum(1).masked_fill(chunk_ids < 0, count)


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """m_i = sum_{c' < c} a_cc' sum_{j in c'} z_j + b_i sum_{j <= i, j in c} z_j for a token i of chunk c.

    a_cc' = min(1, W_cc' / n_c') for the n_c' tokens of a chunk, and b_i = min(1, W_cc / n) for the n tokens of the own
    chunk up to i: means weighed by W, of edges that weigh at most 1. Tokens are cut into segments of one chunk and one
    block of rows each. A row reads sums of earlier segments, which are the same for all rows of its own, and the part
    of its own up to itself: O(source x width) and a product of segments x segments.

    Args:
        sums: (batch x (segments + 1)) x (batch x source): 1 for the tokens of each segment. Tokens of no chunk are the
            last of their row, which nobody reads.
        between: (batch, 2 x segments, segments): a for each pair, then which are earlier ones of the same chunk.
        far: (batch x target) x (batch x 2 x segments): a token reads what `between` gives its segment, by 1 and by b.
        within: (batch, blocks, size, size): b in the own segment up to the row itself.
        target: number of rows.
    """

    sums: SparseRows
    between: Tensor
    far: SparseRows
    within: Tensor
    target: int

    @classmethod
    def of(cls, chunk_ids: Tensor, weights: Tensor, target: int) -> Self:
        """What does not depend on nodes.

        Args:
            chunk_ids: (batch, source); its last `target` are those of the rows.
            weights: W (batch or 1, chunks, chunks).
            target: number of rows.
        """
        weights = weights.expand(chunk_ids.shape[0], -1, -1)
        rows, size = chunk_ids[:, chunk_ids.shape[1] - target :], max(1, min(_BLOCK, target))
        sizes, places = chunk_sizes(chunk_ids, weights.shape[-1])
        far = (weights.tril(-1) / sizes.clamp(min=1)[:, None]).clamp(max=1.0)
        near = weights.diagonal(dim1=1, dim2=2).gather(1, rows.clamp(min=0))
        near = (near / places[:, chunk_ids.shape[1] - target :].clamp(min=1)).clamp(max=1.0) * (rows >= 0)
        count = weights.shape[-1] + -(-target // size) + 1
        segment = segments(chunk_ids, target, size, count)
        (batch, source), starts = segment.shape, torch.arange(segment.shape[0], device=segment.device)[:, None]
        of_token, order = (segment + starts * (count + 1)).flatten().sort(stable=True)
        sums = SparseRows.of((of_token, order, None), batch * (count + 1), batch * source)
        holder = segment.new_full((batch, count + 1), -1).scatter(1, segment, chunk_ids)[:, :count]
        between = torch.cat([_of_pairs(far, holder), _same(holder).tril(-1).to(far.dtype)], dim=1)
        own = segment[:, source - target :].clamp(max=count - 1) + starts * 2 * count
        read = torch.stack([own, own + count], dim=-1).flatten()
        shares = torch.stack([(rows >= 0).to(near.dtype), near], dim=-1).flatten()
        begins = torch.arange(0, read.shape[0], 2, device=read.device)
        missing = (0, -target % size)
        within = _same(pad(rows, missing, value=-1).unflatten(1, (-1, size))).tril()
        within = within * pad(near, missing).unflatten(1, (-1, size))[..., None]
        return cls(sums, between, SparseRows(read, begins, shares, batch * 2 * count), within, target)

    def messages(self, nodes: Tensor) -> Tensor:
        """What the rows read of nodes (batch, source, width): (batch, target, width)."""
        (batch, blocks, size, _), (_, source, width), target = self.within.shape, nodes.shape, self.target
        sums = self.sums.times(nodes.reshape(-1, width)).unflatten(0, (batch, -1))[:, :-1]
        far = self.far.times((self.between.to(nodes.dtype) @ sums).flatten(0, 1)).unflatten(0, (batch, -1))
        own = nodes[:, source - target :]
        if missing := blocks * size - target:
            far, own = (pad(part, (0, 0, 0, missing)) for part in (far, own))
        far, own = (part.reshape(batch * blocks, size, width) for part in (far, own))
        read = torch.baddbmm(far, self.within.to(nodes.dtype).flatten(0, 1), own)
        return read.view(batch, blocks * size, width)[:, :target]


def _of_pairs(far: Tensor, holder: Tensor) -> Tensor:
    """(batch, chunks, chunks) for pairs of segments, of the chunks `holder` (batch, segments)."""
    index, count = holder.clamp(min=0), far.shape[-1]
    rows = far.gather(1, index[..., None].expand(-1, -1, count))
    return rows.gather(2, index[:, None].expand(-1, index.shape[1], -1))


def _same(numbers: Tensor) -> Tensor:
    """(..., n) to (..., n, n): whether two are of one chunk."""
    return (numbers[..., :, None] == numbers[..., None, :]) & (numbers >= 0)[..., None]


@dataclass(frozen=True, eq=False)
class EdgeSums:
    """sum_j e_ij z_j of one pass, O(edges x width).

    Args:
        edges: (batch x target) x (batch x source).
        target: number of rows.
    """

    edges: SparseRows
    target: int

    def messages(self, nodes: Tensor) -> Tensor:
        """What the rows read of nodes (batch, source, width): (batch, target, width)."""
        return self.edges.times(nodes.flatten(0, 1)).unflatten(0, (-1, self.target))


@dataclass(frozen=True, eq=False)
class TokenEdges(ExternalGraph):
    """Edges between tokens. Those listed twice are added up; then none weighs more than 1.

    Args:
        index: (edges, 3) integers: row of the batch, token i, token j <= i that it reads; places in `input_ids`.
        weight: (edges,), at least 0.
        batch: rows of the batch; some may have no edge.

    Raises:
        ValueError: an edge to a later token, a number out of range, or shapes that do not fit.
    """

    index: Tensor
    weight: Tensor
    batch: int = 1

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.index.shape[1] != 3 or _is_no_integer(self.index):
            raise ValueError(f"`index` must be integers of shape (edges, 3), got {_form(self.index)}.")
        if self.weight.shape != self.index.shape[:1]:
            raise ValueError(f"`weight` must be ({self.index.shape[0]},), one of each edge, got {_form(self.weight)}.")
        _check_weights("weight", self.weight)
        row, reader, read = self.index.unbind(1)
        wrong = ((self.index < 0).any(1) | (row >= self.batch)).nonzero()
        if wrong.numel():
            edge = self.index[wrong[0, 0]].tolist()
            raise ValueError(f"`index` must be (row in [0, {self.batch}), i >= 0, j >= 0), got {edge}.")
        future = (read > reader).nonzero()
        if future.numel():
            edge = self.index[future[0, 0]].tolist()
            raise ValueError(f"`index` must have j <= i, token i reads no later token j; got (row, i, j) = {edge}.")

    def to(self, device: torch.device) -> Self:
        """The same graph there."""
        return replace(self, index=self.index.to(device), weight=self.weight.to(device))

    def check_length(self, length: int) -> None:
        """Raise ValueError if an edge reaches behind token `length`."""
        latest = int(self.index[:, 1].max()) if self.index.shape[0] else -1
        if latest >= length:
            raise ValueError(f"`graph` has an edge of token {latest}, the input has {length} tokens.")

    def over(self, shape: PassShape) -> EdgeSums:
        """What the rows of a pass read; tokens that the graph does not know read nothing.

        Raises:
            ValueError: an edge begins or ends at padding.
        """
        place, edge = (shape.rows[:, None] == self.index[:, 0]).nonzero(as_tuple=True)
        reader, read = self.index[edge, 1], self.index[edge, 2]
        kept = (reader >= shape.past) & (reader < shape.source)
        place, reader, read, weight = place[kept], reader[kept], read[kept], self.weight[edge[kept]]
        if shape.mask is not None:
            hidden = (shape.mask[place, reader] == 0) | (shape.mask[place, read] == 0)
            if hidden.any():
                first = int(hidden.nonzero()[0, 0])
                found = [int(place[first]), int(reader[first]), int(read[first])]
                raise ValueError(f"`graph` must not touch padding, got the edge (row, i, j) = {found}.")
        row = place * shape.new + reader - shape.past
        key, total = sum_of_duplicates(row * shape.source + read, weight)
        row = key // shape.source
        source = row // shape.new * shape.source + key % shape.source
        batch = shape.rows.shape[0]
        edges = SparseRows.of((row, source, total.clamp(max=1.0)), batch * shape.new, batch * shape.source)
        return EdgeSums(edges, shape.new)


@dataclass(frozen=True, eq=False)
class ChunkGraph(ExternalGraph):
    """Weights between chunks of tokens: token i of chunk c reads sum_c' W[c, c'] mean_{j <= i, j in c'} z_j.

    Tokens generated behind those given belong to the last chunk.

    Args:
        chunk_ids: (batch, tokens) integers that never decrease, -1 for a token of no chunk, which neither reads nor is
            read. Padding has no chunk, whatever stands there.
        weights: (batch or 1, chunks, chunks), at least 0; row c is what chunk c reads, W[c, c] weighs its own past.

    Raises:
        ValueError: W[c, c'] with c' > c, chunks that go back, a number out of range, or shapes that do not fit.
    """

    chunk_ids: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        ids, weights = self.chunk_ids, self.weights
        if ids.dim() != 2 or _is_no_integer(ids):
            raise ValueError(f"`chunk_ids` must be integers of shape (batch, tokens), got {_form(ids)}.")
        if weights.dim() != 3 or weights.shape[1] != weights.shape[2] or weights.shape[0] not in (1, ids.shape[0]):
            wanted = f"({ids.shape[0]} or 1, chunks, chunks)"
            raise ValueError(f"`weights` must be {wanted} for chunk_ids {tuple(ids.shape)}, got {_form(weights)}.")
        _check_weights("weights", weights)
        future = weights.triu(1).nonzero()
        if future.numel():
            row, chunk, later = future[0].tolist()
            raise ValueError(
                f"`weights` must be 0 above the diagonal, chunk c reads no later chunk; got weights[{row}, {chunk}, "
                f"{later}] = {float(weights[row, chunk, later])}."
            )
        wrong = ((ids < -1) | (ids >= weights.shape[1])).nonzero()
        if wrong.numel():
            row, token = wrong[0].tolist()
            found = int(ids[row, token])
            raise ValueError(f"`chunk_ids` must be in [-1, {weights.shape[1]}), got {found} at [{row}, {token}].")
        back = ((ids >= 0) & (ids < ids.cummax(1).values)).nonzero() if ids.numel() else ids
        if back.numel():
            raise ValueError(f"`chunk_ids` must not decrease along a row, they do at {back[0].tolist()}.")

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.chunk_ids.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same graph there."""
        return replace(self, chunk_ids=self.chunk_ids.to(device), weights=self.weights.to(device))

    def check_length(self, length: int) -> None:
        """Raise ValueError if the input has not as many tokens as have ids."""
        if self.chunk_ids.shape[1] != length:
            raise ValueError(
                f"`graph` has chunk_ids of shape {tuple(self.chunk_ids.shape)}, the input has {length} tokens."
            )

    def inherit(self, length: int) -> Self:
        """The graph of the first `length` tokens; those behind the ones known belong to the last chunk."""
        return replace(self, chunk_ids=_inherited(self.chunk_ids, length))

    def append_chunk(self, weights_row: Tensor, tokens: int) -> Self:
        """The graph with a new chunk of `tokens` more tokens.

        Args:
            weights_row: (batch or 1, chunks + 1): what the new chunk reads of each chunk, its own past last.
            tokens: how many it begins with.

        Raises:
            ValueError: the row does not fit, as ChunkGraph does.
        """
        count = self.weights.shape[1]
        if weights_row.dim() != 2 or weights_row.shape[1] != count + 1 or weights_row.shape[0] not in (1, self.batch):
            raise ValueError(f"`weights_row` must be ({self.batch} or 1, {count + 1}), got {_form(weights_row)}.")
        rows = max(weights_row.shape[0], self.weights.shape[0])
        above = pad(self.weights, (0, 1)).expand(rows, -1, -1)
        weights = torch.cat([above, weights_row[:, None].to(above).expand(rows, -1, -1)], dim=1)
        return replace(self, chunk_ids=pad(self.chunk_ids, (0, tokens), value=count), weights=weights)

    def over(self, shape: PassShape) -> ChunkSums:
        """What the rows of a pass read."""
        ids = _inherited(self.chunk_ids, shape.source)[shape.rows]
        if shape.mask is not None:
            ids = ids.masked_fill(shape.mask == 0, -1)
        weights = self.weights if self.weights.shape[0] == 1 else self.weights[shape.rows]
        return ChunkSums.of(ids, weights, shape.new)


def expand_chunks(graph: ChunkGraph) -> Tensor:
    """The edges of a ChunkGraph as (batch, tokens, tokens), for small inputs: row i weighs j by W / n, at most 1."""
    ids = graph.chunk_ids
    reads = (ids[:, :, None] >= 0) & (ids[:, None] >= 0)
    reads = reads.tril()
    row = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    index = row if graph.weights.shape[0] > 1 else torch.zeros_like(row)
    pairs = graph.weights[index, ids.clamp(min=0)[:, :, None], ids.clamp(min=0)[:, None]] * reads
    same = (ids[:, :, None] == ids[:, None]).to(pairs.dtype)
    seen = reads.to(pairs.dtype) @ same  # [i, j]: tokens of the chunk of j up to i
    return (pairs / seen.clamp(min=1)).clamp(max=1.0)


def _inherited(chunk_ids: Tensor, length: int) -> Tensor:
    more = length - chunk_ids.shape[1]
    if more <= 0:
        return chunk_ids[:, :length]
    last = chunk_ids.amax(1, keepdim=True) if chunk_ids.shape[1] else chunk_ids.new_full((chunk_ids.shape[0], 1), -1)
    return torch.cat([chunk_ids, last.expand(-1, more)], dim=1)


def _is_no_integer(numbers: Tensor) -> bool:
    return numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _check_weights(name: str, weights: Tensor) -> None:
    if not weights.is_floating_point():
        raise ValueError(f"`{name}` must be floating-point numbers, got {_form(weights)}.")
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if wrong.numel():
        place = wrong[0].tolist()
        raise ValueError(f"`{name}` must be finite and at least 0, got {float(weights[tuple(place)])} at {place}.")
