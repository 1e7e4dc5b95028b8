"""One weighted graph over tokens from the attention of all heads.

Row i weighs the edges j -> i: token i reads token j, which is never later.

Order of steps: combine heads, sharpen, cut, drop self-loops; what a row may not see is 0 after each.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...configuration.configuration_gnn import AdjacencyConfig
from .visible_rows import attention_rows, in_row_blocks, visible_rows


def combine_heads(weights: Tensor, options: AdjacencyConfig) -> Tensor:
    """(batch, heads, rows, source) to (batch, rows, source): "mean", "sum" up to 1, or "any", see AdjacencyConfig."""
    if options.combine == "mean":
        return weights.mean(1)
    if options.combine == "sum":
        return weights.sum(1).clamp(max=1.0)
    return torch.sigmoid((weights - options.threshold) / options.temperature).amax(1)


def adjacency_of(weights: Tensor, visible: Tensor, rows: range, options: AdjacencyConfig) -> Tensor:
    """The graph that attention makes.

    Args:
        weights: (batch, heads, rows, source), 0 where not visible.
        visible: (batch or 1, 1, rows, source).
        rows: place of each row among the keys; the own key is no neighbour without `options.self_loops`.

    Returns:
        (batch, rows, source), in [0, 1], 0 where not visible.
    """
    combined = combine_heads(weights, options)
    if options.sharpness is not None:
        combined = torch.sigmoid(options.sharpness * (combined - options.threshold))
    kept = visible[:, 0]
    if options.cutoff is not None:
        kept = kept & (combined > options.cutoff)
    if not options.self_loops:
        own = torch.arange(rows.start, rows.stop, device=weights.device)[:, None]
        kept = kept & (torch.arange(weights.shape[-1], device=weights.device) != own)
    return torch.where(kept, combined, 0.0)


def attention_adjacency(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, options: AdjacencyConfig, block_bytes: int
) -> Tensor:
    """The graph of softmax(scaling q k^T), without holding the attention of all heads and rows at once.

    Args:
        query: (batch, heads, target, head_dim).
        key: (batch, heads, source, head_dim); its last `target` are the rows' own.
        mask: as transformers makes it, see `visible_rows`.
        block_bytes: largest block of attention weights.

    Returns:
        (batch, target, source), float32 or wider.
    """
    sizes = query.shape[2], key.shape[2]
    compute = partial(_adjacency_rows, query, key, scaling, mask, options)
    row_bytes = 4 * query.shape[0] * query.shape[1] * sizes[1]
    return in_row_blocks(compute, sizes[0], row_bytes, block_bytes)


def _adjacency_rows(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, options: AdjacencyConfig, rows: range
) -> Tensor:
    target, source = query.shape[2], key.shape[2]
    seen = rows.stop if mask is None and target > 1 else source  # causal: no row of the block reads keys behind it
    visible = visible_rows(mask, rows, (target, source), query.device)[..., :seen]
    weights = attention_rows(query[:, :, rows.start : rows.stop], key[:, :, :seen], scaling, visible)
    behind = source - target
    graph = adjacency_of(weights, visible, range(rows.start + behind, rows.stop + behind), options)
    return functional.pad(graph, (0, source - seen))
