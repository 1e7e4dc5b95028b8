"""Exact nearest-neighbour search by inner product in torch: score every vector, keep the best, sum what was kept.

Each function takes any leading batch axes and works where its tensors lie. On a CPU, a few queries against many wide
vectors are a product that BLAS does at a fraction of the memory's speed; oneDNN does it two to three times faster
(benchmarks/memory_attention.py). Half-precision vectors are widened there block by block, because few CPUs multiply
them natively and a block stays in cache.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..cpu import AVX512_MAKER, HAS_ONEDNN, onednn_linear

BLOCK_ROWS = 1024
"""Vectors widened at a time: a block of 768 float32 numbers a row is 3 MB, about the cache of a core."""
FEW_QUERIES = 256
WIDE = 256
"""oneDNN takes over for at most so many queries of at least so many dimensions."""
VERY_FEW_QUERIES = 4
LONG = 8192
"""At most so many queries of at least so many vectors are multiplied from the right where that is faster."""
RIGHT_IS_FASTER = AVX512_MAKER != "Intel"
"""Measured for one query: up to three times as fast on AMD processors, half as fast on an Intel one with AVX-512. Its
BLAS reaches the memory's rate from the left."""
FEW_THREADS = 0 if AVX512_MAKER == "AMD" else 4
"""numpy's vectorised selection, on one thread, takes over from torch.topk on at most so many. Not on AMD's AVX-512, to
which its writing of chosen numbers is foreign: measured 1.3 to 9 times as slow there as torch.topk on two."""
GROUP = 8
"""Scores of which the largest stands for all, where the best are first looked for among groups."""
MANY = 32768
"""From so many scores on that pays, if there are four groups for each score that is kept."""
SELECTED_AT_ONCE = 2**18
"""Scores numpy selects from at a time, so that its copy of them stays in cache."""


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_narrow(vectors: Tensor) -> bool:
    """Whether vectors are stored in half precision where that is not multiplied natively."""
    return vectors.device.type == "cpu" and vectors.dtype in (torch.float16, torch.bfloat16)


def _widened_blocks(vectors: Tensor, dtype: torch.dtype, reuse: bool) -> Iterator[Tensor]:
    """The vectors block by block in `dtype`; with `reuse` each block overwrites the one before."""
    buffer: Tensor | None = None
    for block in vectors.split(BLOCK_ROWS, dim=-2):
        if not reuse:
            yield block.to(dtype)
            continue
        if buffer is None or buffer.shape != block.shape:
            buffer = torch.empty(block.shape, dtype=dtype)
        yield buffer.copy_(block)


def _products(queries: Tensor, vectors: Tensor) -> Tensor:
    (count, dim), source = queries.shape[-2:], vectors.shape[-2]
    on_cpu = queries.device.type == "cpu"
    suits = on_cpu and queries.dtype == torch.float32 and count <= FEW_QUERIES and dim >= WIDE
    if not (HAS_ONEDNN and suits):
        if RIGHT_IS_FASTER and on_cpu and count <= VERY_FEW_QUERIES and source >= LONG:
            return (vectors @ queries.transpose(-1, -2)).transpose(-1, -2)
        return queries @ vectors.transpose(-1, -2)
    pairs = zip(queries.reshape(-1, count, dim), vectors.reshape(-1, source, dim), strict=True)
    scores = torch.stack([onednn_linear(them, us.contiguous()).T for us, them in pairs])
    return scores.view(*queries.shape[:-1], -1)


def inner_products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Score every vector against every query: s_ij = q_i . v_j.

    Args:
        queries: (..., count, dim).
        vectors: (..., source, dim), leading axes as in `queries`; may be stored in half precision.

    Returns:
        (..., count, source) in the dtype of `queries`.
    """
    if not _is_narrow(vectors):
        return _products(queries, vectors.to(queries.dtype))
    blocks = _widened_blocks(vectors, queries.dtype, reuse=not _needs_gradient(queries, vectors))
    return torch.cat([_products(queries, block) for block in blocks], dim=-1)


def largest(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The `kept` largest of the last axis, exactly so many also on ties, and their ids, both in no order.

    Numpy finds the smallest kept score with vector instructions and reads off which scores reach it: several times as
    fast a thread as `torch.topk`, which moves pairs of score and id. Where that is not so, `torch.topk` selects twice
    from long rows: groups of scores, then scores.

    Args:
        scores: (..., source).
        kept: from 1 to `source`.

    Returns:
        (..., kept) in the dtype of `scores`, and (..., kept) int64.
    """
    suits = scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64)
    if not suits or _needs_gradient(scores) or torch.compiler.is_compiling():
        return _topk(scores, kept)
    if torch.get_num_threads() > FEW_THREADS:
        is_long = scores.shape[-1] >= max(MANY, 4 * GROUP * kept)
        return _largest_of_groups(scores, kept) if is_long else _topk(scores, kept)
    rows = scores.detach().reshape(-1, scores.shape[-1]).numpy()
    best, ids = np.empty((len(rows), kept), rows.dtype), np.empty((len(rows), kept), np.int64)
    step = max(1, SELECTED_AT_ONCE // rows.shape[-1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        best[block], ids[block] = _largest_of_rows(rows[block], kept)
    shape = (*scores.shape[:-1], kept)
    return torch.from_numpy(best).view(shape), torch.from_numpy(ids).view(shape)


def _topk(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    values, ids = scores.topk(kept, dim=-1, sorted=False)
    return values, ids


def _largest_of_groups(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """`largest` in half the time of one selection: of the `kept` groups whose largest scores are largest.

    A score outside of these groups is no larger than `kept` others, one of each group.
    """
    groups = scores.shape[-1] // GROUP
    whole = groups * GROUP
    largest_of_each = scores[..., :whole].unflatten(-1, (GROUP, groups)).amax(-2)
    found = _topk(largest_of_each, kept)[1]
    ids = (found.unsqueeze(-2) + torch.arange(0, whole, groups).unsqueeze(-1)).flatten(-2)
    rest = torch.arange(whole, scores.shape[-1]).expand(*ids.shape[:-1], -1)
    ids = torch.cat([ids, rest], dim=-1)
    values, places = _topk(scores.gather(-1, ids), kept)
    return values, ids.gather(-1, places)


def _largest_of_rows(rows: NDArray[Any], kept: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The `kept` largest scores of each row and their ids, in the order of ids."""
    source = rows.shape[-1]
    smallest = np.partition(rows, source - kept, axis=-1)[:, source - kept, None]
    reaches = rows >= smallest
    if np.count_nonzero(reaches) != len(rows) * kept:  # ties at the smallest, or NaN, which torch ranks first
        for row in np.flatnonzero(np.count_nonzero(reaches, axis=-1) != kept):
            ids = torch.from_numpy(rows[row]).topk(kept, sorted=False).indices
            reaches[row] = False
            reaches[row, ids.numpy()] = True
    flat = np.flatnonzero(reaches)
    return rows.reshape(-1)[flat].reshape(-1, kept), (flat % source).reshape(-1, kept)


def weighted_sums(weights: Tensor, vectors: Tensor) -> Tensor:
    """Sum all vectors with weights: u_i = sum_j w_ij v_j.

    Args:
        weights: (..., count, source).
        vectors: (..., source, dim), leading axes as in `weights`; may be stored in half precision.

    Returns:
        (..., count, dim) in the dtype of `weights`.
    """
    if not _is_narrow(vectors):
        return weights @ vectors.to(weights.dtype)
    blocks = _widened_blocks(vectors, weights.dtype, reuse=not _needs_gradient(weights, vectors))
    total = weights.new_zeros(*weights.shape[:-1], vectors.shape[-1])
    for part, block in zip(weights.split(BLOCK_ROWS, dim=-1), blocks, strict=True):
        total = total + part @ block
    return total


def gathered_sums(weights: Tensor, ids: Tensor, vectors: Tensor) -> Tensor:
    """Sum a few chosen vectors with weights: u_i = sum_k w_ik v_{ids_ik}, without copying the vectors out.

    Args:
        weights, ids: (batch, heads, count, kept); ids point into `source`.
        vectors: (batch, heads, source, dim), contiguous; may be stored in half precision.

    Returns:
        (batch, heads, count, dim) in the dtype of `weights`. Sums run in the dtype of `vectors` or wider.
    """
    batch, heads, count, kept = ids.shape
    source, dim = vectors.shape[-2:]
    starts = torch.arange(batch * heads, device=ids.device).view(batch, heads, 1, 1) * source
    bags = (ids + starts).reshape(-1, kept)
    sums = F.embedding_bag(
        bags, vectors.reshape(-1, dim), per_sample_weights=weights.reshape(-1, kept).to(vectors.dtype), mode="sum"
    )
    return sums.view(batch, heads, count, dim).to(weights.dtype)
