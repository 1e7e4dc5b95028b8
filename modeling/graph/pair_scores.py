"""How much token i might read of token j, before it is normalised over all j."""

import math

from torch import Tensor
from torch.nn import functional


def dot_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """scaling q_i . k_j: (..., rows, width) and (..., source, width) to (..., rows, source)."""
    return (query * scaling) @ key.transpose(-1, -2)


def grouped_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """`dot_scores` of (batch, heads, rows, width) and (batch, groups, source, width), heads of a group side by side.

    One product for each group: keys are not repeated.
    """
    if query.shape[1] == key.shape[1]:
        return dot_scores(query, key, scaling)
    scores = dot_scores(_by_group(query, key.shape[1]), key, scaling)
    return scores.view(*query.shape[:3], key.shape[2])


def grouped_sum(weights: Tensor, value: Tensor) -> Tensor:
    """sum_j w_ij v_j of (batch, heads, rows, source) and (batch, groups, source, width), grouped as `grouped_scores`.

    Returns:
        (batch, heads, rows, width).
    """
    if weights.shape[1] == value.shape[1]:
        return weights @ value
    return (_by_group(weights, value.shape[1]) @ value).view(*weights.shape[:3], value.shape[3])


def _by_group(states: Tensor, groups: int) -> Tensor:
    """(batch, heads, rows, width) to (batch, groups, heads of a group x rows, width)."""
    return states.reshape(states.shape[0], groups, -1, states.shape[3])


def pair_scores(targets: Tensor, sources: Tensor, weight: Tensor) -> Tensor:
    """W silu(u_i + v_j), one score per head.

    Args:
        targets: u, (batch, rows, width).
        sources: v, (batch, source, width).
        weight: W, (heads, width).

    Returns:
        (batch, heads, rows, source). Holds batch x rows x source x width numbers meanwhile.
    """
    hidden = functional.silu(targets[:, :, None] + sources[:, None])
    return functional.linear(hidden, weight).permute(0, 3, 1, 2)


def differential_start(layer_idx: int) -> float:
    """lambda of differential attention in decoder layer l from 0: 0.8 - 0.6 exp(-0.3 l) (arXiv 2410.05258)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
