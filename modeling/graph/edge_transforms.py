"""From attention weights to weights of edges, pair by pair, and masked again: no transform makes a future edge."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...configuration.graph_edges_config import EdgeTransformConfig

_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "softplus": functional.softplus,
}
_OF_ZERO_IS_ZERO = ("relu", "binary", "relu_below_binary_above", "top_k", "scaled_topk")
"""Transforms of which nothing has to be masked again, if their threshold is not below 0."""


def edge_weights(
    weights: Tensor, visible: Tensor, options: EdgeTransformConfig, threshold: Tensor | float | None = None
) -> Tensor:
    """Apply `options.transform` to the visible pairs; all others are exactly 0.

    Args:
        weights: (..., rows, source) attention weights, 0 where not visible.
        visible: broadcast to `weights`, boolean.
        threshold: t, if it is not `options.threshold`.

    Returns:
        As `weights`. Hard selections have gradient 0, or 1 with `options.straight_through`.
    """
    if options.transform == "none":
        return weights
    keeps_zeros = threshold is None and options.threshold >= 0 and not options.straight_through
    threshold = options.threshold if threshold is None else threshold
    edges = _transform(weights, visible, options, threshold)
    return edges if keeps_zeros and options.transform in _OF_ZERO_IS_ZERO else torch.where(visible, edges, 0.0)


class EdgeTransform(nn.Module):
    """`edge_weights` with these options; the threshold is a parameter if `options.trains_threshold`."""

    def __init__(self, options: EdgeTransformConfig) -> None:
        super().__init__()
        self.options = options
        trained = nn.Parameter(torch.full((1,), float(options.threshold))) if options.trains_threshold else None
        self.threshold = trained

    def forward(self, weights: Tensor, visible: Tensor) -> Tensor:
        return edge_weights(weights, visible, self.options, self.threshold)


def top_k_of_row(weights: Tensor, visible: Tensor, fraction: float, least: int = 1) -> Tensor:
    """Whether a pair is among the max(least, ceil(fraction n)) largest of its row's n visible ones.

    The earlier wins ties. The count depends on what the row may read, never on the length of the input: later tokens
    change nothing.
    """
    visible = visible.expand_as(weights)
    # A product of floats may lie just above a whole number, which ceil would take for one more.
    kept = (visible.sum(-1, keepdim=True) * fraction - 1e-6).ceil().clamp(min=least)
    order = weights.masked_fill(~visible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(weights.shape[-1], device=weights.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return (rank < kept) & visible


def earlier_keys(visible: Tensor) -> Tensor:
    """What a row reads without its own key, which is the last visible one."""
    count = visible.cumsum(-1)
    return visible & (count < count[..., -1:])


def _transform(weights: Tensor, visible: Tensor, options: EdgeTransformConfig, threshold: Tensor | float) -> Tensor:
    name, steepness = options.transform, options.steepness
    above = weights - threshold
    if name in _SMOOTH:
        return _SMOOTH[name](above)
    if name == "sharp_softplus":
        return functional.softplus(steepness * above) / steepness
    if name == "sigmoid":
        return torch.sigmoid(steepness * above)
    if name == "flow":
        return torch.sigmoid(5 * weights) * torch.sigmoid(50 * above)
    if name == "top_k":
        return _hard(top_k_of_row(weights, visible, options.fraction), weights, options)
    if name == "scaled_topk":
        large = torch.where(above < 0, 0.0, weights)
        return _hard(top_k_of_row(large, earlier_keys(visible), options.fraction, least=0), weights, options)
    chosen = _hard(above > 0, weights, options)
    if name == "binary":
        return chosen
    if name == "silu+binary":
        return functional.silu(above) + options.binary_weight * chosen
    return torch.where(above > 0, chosen, _SMOOTH[name.partition("_")[0]](above))


def _hard(chosen: Tensor, weights: Tensor, options: EdgeTransformConfig) -> Tensor:
    """1 where chosen. The gradient is 0 rather than absent: distributed training wants one for every parameter."""
    slope = 1.0 if options.straight_through else 0.0
    return chosen.to(weights.dtype) + slope * (weights - weights.detach())
