"""The nearest vectors of each query, exactly: by squared distance, ties by the smaller number, own document left out.

One product per block gives float32 scores; two passes of maxima find the few that can matter; those are measured again
in float64, which is exact enough for ties. A bound on the error of the product tells which queries need a second look,
so the result is what measuring every pair in float64 would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sharded_rows import ShardedRows
from .threads import single_threaded

QUERY_ROWS, VECTOR_ROWS, GROUP = 1024, 4096, 64
PAIRS = 2**15
PAIRS_AT_ONCE = 128
"""Measured at once: vectors widened to float64 that stay in the cache, on memory that is used again."""
SPARE = 8
"""Candidates beyond k: the error of a product can swap close neighbours, seldom more than a few."""


@dataclass(frozen=True)
class _Block:
    """Some vectors, widened.

    Args:
        start: number of the first.
        vectors: (rows, dim) float32.
        halves: (rows,) half squared lengths; infinite for what nobody may find.
        longest: the largest length.
    """

    start: int
    vectors: Tensor
    halves: Tensor
    longest: float


def exact_neighbours(
    queries: np.ndarray,
    vectors: ShardedRows,
    k: int,
    exclude: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    workers: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` vectors with the least |q - v|^2, sorted by (distance, number).

    Args:
        queries: (count, dim) float16 or float32; a row of zeros finds nothing.
        vectors: (source, dim) float16 or float32; a row of zeros is no entry.
        k: neighbours per query.
        exclude: (count, 2) first number and end of a range that a query must not find, such as its own document.
        allowed: (source,) bool; what is false is found by nobody.
        workers: threads; their number changes no bit of the result.

    Returns:
        ids (count, k) int64 and distances (count, k) float64; where fewer are left, -1 and infinity at the end.

    Raises:
        ValueError: `k` is below 1, or a shape does not fit.
    """
    _check(queries, vectors, k, exclude, allowed)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf)
    starts = list(range(0, len(queries), QUERY_ROWS))

    def work(start: int) -> None:
        rows = slice(start, start + QUERY_ROWS)
        ranges = exclude[rows] if exclude is not None else None
        ids[rows], distances[rows] = _search_block(queries[rows], vectors, k, ranges, allowed)

    with single_threaded() as begin:
        if workers == 1 or len(starts) == 1:
            for start in starts:
                work(start)
        else:
            with ThreadPoolExecutor(workers, initializer=begin) as pool:
                list(pool.map(work, starts))
    return ids, distances


def _check(
    queries: np.ndarray, vectors: ShardedRows, k: int, exclude: np.ndarray | None, allowed: np.ndarray | None
) -> None:
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if queries.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(f"`queries` must be (count, {vectors.shape[1]}) as the vectors are, got {queries.shape}.")
    if exclude is not None and exclude.shape != (len(queries), 2):
        raise ValueError(f"`exclude` must be ({len(queries)}, 2), first and end for each query, got {exclude.shape}.")
    if allowed is not None and allowed.shape != (len(vectors),):
        raise ValueError(f"`allowed` must be ({len(vectors)},), one for each vector, got {allowed.shape}.")


def _wide(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).float()


@torch.inference_mode()
def _search_block(
    queries: np.ndarray, vectors: ShardedRows, k: int, ranges: np.ndarray | None, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    wide = _wide(queries)
    kept = min(k + SPARE, len(vectors))
    scores, ids, longest = _best_candidates(wide, vectors, kept, ranges, allowed)
    exact = exact_distances(queries, vectors, ids)
    order = np.lexsort((ids, exact))[:, :k]  # by distance, then by number
    ids, exact = np.take_along_axis(ids, order, 1), np.take_along_axis(exact, order, 1)
    unsure, least = _unsure(wide, scores[:, -1], exact[:, -1], longest)
    if len(unsure) and kept < len(vectors):
        theirs = ranges[unsure] if ranges is not None else None
        ids[unsure], exact[unsure] = _second_look(queries[unsure], vectors, ids.shape[1], theirs, allowed, least)
    exact[~wide.any(dim=1).numpy()] = np.inf
    ids[~np.isfinite(exact)] = -1
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(ids, missing, constant_values=-1), np.pad(exact, missing, constant_values=np.inf)


def _unsure(queries: Tensor, last_scores: Tensor, last: np.ndarray, longest: float) -> tuple[np.ndarray, Tensor]:
    """Rows whose last neighbour might be beaten by a vector that was not kept, and the score it would have at least.

    A product of `dim` numbers errs by at most dim 2^-24 |q| |v|; what was not kept scores at most `last_scores`.
    """
    squares = queries.double().square().sum(1).numpy()
    error = (queries.shape[1] + 8) * 2.0**-24 * (np.sqrt(squares) + longest) ** 2
    beyond = squares - 2 * last_scores.double().numpy() - error
    rows = np.flatnonzero((last >= beyond) & np.isfinite(beyond))
    return rows, torch.from_numpy((squares - last - error)[rows] / 2)


def _best_candidates(
    queries: Tensor, vectors: ShardedRows, kept: int, ranges: np.ndarray | None, allowed: np.ndarray | None
) -> tuple[Tensor, np.ndarray, float]:
    """The `kept` best q . v - |v|^2 / 2 of each query, best first (count, kept), whose they are, the largest |v|."""
    longest = 0.0
    best = torch.full((len(queries), kept), -torch.inf)
    best_ids = torch.zeros(len(queries), kept, dtype=torch.int64)
    for block in _blocks(vectors, allowed):
        longest = max(longest, block.longest)
        scores = _scores(queries, block, ranges)
        found, where = _top(scores, min(kept, scores.shape[1]))
        joined, joined_ids = torch.cat([best, found], 1), torch.cat([best_ids, where + block.start], 1)
        best, order = joined.topk(kept, dim=1)
        best_ids = joined_ids.gather(1, order)
    best_ids[best == -torch.inf] = -1
    return best, best_ids.numpy(), longest


def _blocks(vectors: ShardedRows, allowed: np.ndarray | None) -> Iterator[_Block]:
    for start, rows in vectors.blocks(VECTOR_ROWS):
        wide = _wide(rows)
        halves = wide.square().sum(1) / 2
        longest = float((2 * halves.max()).sqrt())
        halves[halves == 0] = torch.inf  # no entry
        if allowed is not None:
            halves[~torch.from_numpy(allowed[start : start + len(rows)])] = torch.inf
        yield _Block(start, wide, halves, longest)


def _scores(queries: Tensor, block: _Block, ranges: np.ndarray | None) -> Tensor:
    """q . v - |v|^2 / 2, (count, rows): the larger, the nearer; -inf for what a query must not find."""
    scores = torch.addmm(-block.halves[None], queries, block.vectors.T)
    if ranges is not None:
        _mask_ranges(scores, ranges - block.start)
    return scores


def _mask_ranges(scores: Tensor, ranges: np.ndarray) -> None:
    """Set scores in each row's range to -inf; neighbouring rows with one range are done together."""
    clipped = ranges.clip(0, scores.shape[1])
    changes = np.flatnonzero((np.diff(clipped, axis=0) != 0).any(1)) + 1
    for first, end in zip([0, *changes], [*changes, len(clipped)], strict=True):
        start, stop = clipped[first]
        if stop > start:
            scores[first:end, start:stop] = -torch.inf


def _top(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(kept)`, faster for many columns: the best `kept` lie in the `kept` groups with the best maxima."""
    groups = scores.shape[1] // GROUP
    if groups <= 2 * kept:
        found, where = scores.topk(kept, dim=1)
        return found, where
    whole = groups * GROUP
    members = scores[:, :whole].unflatten(1, (GROUP, groups))  # a group is a column: its maximum runs along rows
    chosen = members.amax(1).topk(kept, dim=1).indices
    columns = (chosen[:, :, None] + torch.arange(GROUP) * groups).flatten(1)
    columns = torch.cat([columns, torch.arange(whole, scores.shape[1]).expand(len(scores), -1)], 1)
    found, where = scores.gather(1, columns).topk(kept, dim=1)
    return found, columns.gather(1, where)


def exact_distances(queries: np.ndarray, vectors: ShardedRows, ids: np.ndarray) -> np.ndarray:
    """|q - v|^2 in float64, (count, kept); infinite for id -1."""
    distances = np.empty(ids.shape)
    rows = max(PAIRS_AT_ONCE // max(ids.shape[1], 1), 1)
    for at in range(0, len(ids), rows):
        part = ids[at : at + rows]
        found = torch.from_numpy(vectors.take(np.maximum(part, 0).reshape(-1))).double().view(*part.shape, -1)
        gaps = torch.from_numpy(np.ascontiguousarray(queries[at : at + rows])).double()[:, None] - found
        torch.sum(gaps.square_(), -1, out=torch.from_numpy(distances[at : at + rows]))
    distances[ids < 0] = np.inf
    return distances


def _second_look(
    queries: np.ndarray,
    vectors: ShardedRows,
    k: int,
    ranges: np.ndarray | None,
    allowed: np.ndarray | None,
    least: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure all vectors that score at least `least`: many stand at one distance, such as copies of a text."""
    wide = _wide(queries)
    pairs = []
    for block in _blocks(vectors, allowed):
        found = torch.nonzero(_scores(wide, block, ranges).double() >= least[:, None])
        pairs.append(found + torch.tensor([0, block.start]))
    rows, ids = torch.cat(pairs).numpy().T
    exact = np.concatenate(
        [
            exact_distances(queries[rows[at : at + PAIRS]], vectors, ids[at : at + PAIRS, None])[:, 0]
            for at in range(0, len(rows), PAIRS)
        ]
    )
    order = np.lexsort((ids, exact, rows))
    firsts = np.searchsorted(rows[order], np.arange(len(queries)))[:, None] + np.arange(k)
    return ids[order][firsts], exact[order][firsts]
