"""Exact nearest-neighbour search by inner product in torch: score every vector, keep the best, sum what was kept.

Each function takes any leading batch axes and works where its tensors lie. Half-precision vectors on a CPU are
widened block by block, because few CPUs multiply them natively and a block stays in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 1024
"""Vectors scored per block: a block of 768 float32 numbers a row is 3 MB, about the cache of a core."""


def _is_wide(vectors: Tensor) -> bool:
    return vectors.device.type != "cpu" or vectors.dtype not in (torch.float16, torch.bfloat16)


def inner_products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Score every vector against every query: s_ij = q_i . v_j.

    Args:
        queries: (..., count, dim).
        vectors: (..., source, dim), leading axes as in `queries`; may be stored in half precision.

    Returns:
        (..., count, source) in the dtype of `queries`.
    """
    if _is_wide(vectors):
        return queries @ vectors.to(queries.dtype).transpose(-1, -2)
    blocks = vectors.split(BLOCK_ROWS, dim=-2)
    return torch.cat([queries @ block.to(queries.dtype).transpose(-1, -2) for block in blocks], dim=-1)


def weighted_sums(weights: Tensor, vectors: Tensor) -> Tensor:
    """Sum all vectors with weights: u_i = sum_j w_ij v_j.

    Args:
        weights: (..., count, source).
        vectors: (..., source, dim), leading axes as in `weights`; may be stored in half precision.

    Returns:
        (..., count, dim) in the dtype of `weights`.
    """
    if _is_wide(vectors):
        return weights @ vectors.to(weights.dtype)
    pairs = zip(weights.split(BLOCK_ROWS, dim=-1), vectors.split(BLOCK_ROWS, dim=-2), strict=True)
    total = weights.new_zeros(*weights.shape[:-1], vectors.shape[-1])
    for part, block in pairs:
        total += part @ block.to(weights.dtype)
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
