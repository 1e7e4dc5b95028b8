"""One weighted graph over tokens from the attention of all heads, or one for each head.

Row i weighs the edges j -> i: token i reads token j, which is never later.

Order of steps: combine heads, weigh by distance, sharpen, cut, drop self-loops, normalise rows; what a row may not see
is 0 after each.
"""

from math import floor, isinf

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from ...configuration.graph_edges_config import AdjacencyConfig

_CLEARLY_CUT = 1e-3  # an edge takes more attention than this: what is not visible, and so weighs 0, is none


def combine_heads(weights: Tensor, options: AdjacencyConfig, per_head: bool) -> Tensor:
    """(batch, heads, rows, source) to (batch, 1, rows, source), or with `per_head` to the same shape.

    "mean", "sum" up to 1, or "any", see AdjacencyConfig.
    """
    if options.combine == "any":
        near = torch.sigmoid((weights - options.threshold) / options.temperature)
        return near if per_head else near.amax(1, keepdim=True)
    if per_head:
        return weights
    if options.combine == "mean":
        return weights.mean(1, keepdim=True)
    return weights.sum(1, keepdim=True).clamp(max=1.0)


class LearnedHeadCombination(nn.Module):
    """w2 . relu(W1 [P_1ij ... P_Hij]) for each pair, then a sigmoid, or a softmax over what the row sees.

    Args:
        heads: of the attention.
        outputs: 1, or one graph for each head.
        width: between the maps.
        activation: "sigmoid" or "softmax".
    """

    def __init__(self, heads: int, outputs: int, width: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(heads, width)
        self.down = nn.Linear(width, outputs)
        self.activate = _softmax_over_visible if activation == "softmax" else _sigmoid_of_visible

    def forward(self, weights: Tensor, visible: Tensor) -> Tensor:
        """(batch, heads, rows, source) to (batch, outputs, rows, source); `visible` (batch or 1, 1, rows, source)."""
        inner = functional.relu(self.up(weights.movedim(1, -1).to(self.up.weight.dtype)))
        scores = self.down(inner).movedim(-1, 1).to(weights.dtype)
        return self.activate(scores, visible)


def _softmax_over_visible(scores: Tensor, visible: Tensor) -> Tensor:
    filled = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return filled.softmax(-1) * visible.any(-1, keepdim=True)


def _sigmoid_of_visible(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.sigmoid(scores) * visible


def distance_weights(visible: Tensor, rows: range, options: AdjacencyConfig, dtype: torch.dtype) -> Tensor:
    """((1 + |i - j|) / n_i)^s ("far") or (1 + |i - j|)^-s ("near"), at most 1, where row i sees n_i keys.

    Row by row: the length of the input plays no part, and neither does padding.

    Args:
        visible: (batch or 1, 1, rows, source).
        rows: place of each row among the keys.

    Returns:
        Broadcast to `visible`, of `dtype`.
    """
    own = torch.arange(rows.start, rows.stop, device=visible.device)[:, None]
    apart = 1 + (own - torch.arange(visible.shape[-1], device=visible.device)).abs().to(dtype)
    if options.distance == "near":
        return apart ** -float(options.distance_strength)
    share = apart / visible.sum(-1, keepdim=True).clamp(min=1)
    return share.clamp(max=1.0) ** float(options.distance_strength)


def sharpen_and_cut(combined: Tensor, visible: Tensor, rows: range, options: AdjacencyConfig) -> Tensor:
    """The graph that combined attention makes.

    Args:
        combined: (batch, graphs, rows, source), of attention weights that are 0 where not visible.
        visible: (batch or 1, 1, rows, source).
        rows: place of each row among the keys; the own key is no neighbour without `options.self_loops`.

    Returns:
        As `combined`, in [0, 1], 0 where not visible.
    """
    if options.distance is not None:
        combined = combined * distance_weights(visible, rows, options, combined.dtype)
    if options.sharpness is not None:
        combined = torch.sigmoid(options.sharpness * (combined - options.threshold))
    if options.cutoff is not None:
        combined = functional.threshold(combined, options.cutoff, 0.0)
    if options.least_weight() < _CLEARLY_CUT:
        combined = combined.masked_fill(~visible, 0.0)
    if not options.self_loops:
        own = torch.arange(rows.start, rows.stop, device=combined.device)[:, None]
        combined = combined.masked_fill(torch.arange(combined.shape[-1], device=combined.device) == own, 0.0)
    return combined


def normalise_rows(graph: Tensor, visible: Tensor) -> Tensor:
    """A_ij / sqrt(mean_j A_ij^2 + 1e-6), the mean over what row i sees."""
    seen = visible.sum(-1, keepdim=True).clamp(min=1)
    return graph * torch.rsqrt(graph.square().sum(-1, keepdim=True) / seen + 1e-6)


def bound_on_edges(options: AdjacencyConfig, heads: int, per_head: bool = False) -> int | None:
    """The most edges that any row can have, whatever the length; None where there is no bound.

    The weights of a head in a row sum to 1, and an edge takes more than a* = `options.least_weight()` of them: of one
    head that is 1 / a* edges, of the sum over heads H / a*, and as many where any head suffices.
    """
    least = options.least_weight()
    if least <= 0:
        return None
    if least >= 1 or isinf(least):
        return 0
    shares = heads if not per_head and options.combine != "mean" else 1
    # Rounding may lift a sum of weights above the number of heads: then one more edge is allowed, which is harmless.
    if options.combine == "any":
        return shares * floor((1 + 1e-5) / least)
    return floor(shares * (1 + 1e-5) / least)


class AttentionAdjacency(nn.Module):
    """From the attention weights of a block of rows to their graph.

    Args:
        options: the steps.
        heads: of the attention.
        per_head: make a graph for each head, and not one for all.
    """

    def __init__(self, options: AdjacencyConfig, heads: int, per_head: bool = False) -> None:
        super().__init__()
        self.options, self.per_head = options, per_head
        self.bound = bound_on_edges(options, heads, per_head)
        self.learned = None
        if options.combine == "learned":
            outputs = heads if per_head else 1
            self.learned = LearnedHeadCombination(heads, outputs, options.learned_width, options.learned_activation)
        self.row_gain = nn.Parameter(torch.ones(1)) if options.normalises_rows else None
        # Floats that a pair of tokens takes while its row is computed.
        self.pair_width = heads + (options.learned_width if self.learned is not None else 0)

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        if self.row_gain is not None:
            init.ones_(self.row_gain)

    def forward(self, weights: Tensor, visible: Tensor, rows: range) -> Tensor:
        """The graph of some rows.

        Args:
            weights: (batch, heads, rows, source), 0 where not visible.
            visible: (batch or 1, 1, rows, source).
            rows: place of each row among the keys.

        Returns:
            (batch, rows, source), or (batch, heads, rows, source) for a graph of each head; 0 where not visible.
        """
        if self.learned is not None:
            combined = self.learned(weights, visible)
        else:
            combined = combine_heads(weights, self.options, self.per_head)
        graph = sharpen_and_cut(combined, visible, rows, self.options)
        if self.row_gain is not None:
            graph = normalise_rows(graph, visible) * self.row_gain.to(graph.dtype)
        return graph if self.per_head else graph[:, 0]


class OwnAdjacency(AttentionAdjacency):
    """The self-loops of the graph alone: no message passes between tokens, whatever their weights.

    This is what the sparse network of the paper's code computes: its edges point to earlier tokens and are cut there.
    """

    def __init__(self, options: AdjacencyConfig, heads: int, per_head: bool = False) -> None:
        super().__init__(options, heads, per_head)
        self.bound = 1

    def forward(self, weights: Tensor, visible: Tensor, rows: range) -> Tensor:
        """As in AttentionAdjacency, 0 but for each row's own key."""
        own = torch.arange(rows.start, rows.stop, device=weights.device)[:, None]
        graph: Tensor = super().forward(weights, visible, rows)
        return graph * (torch.arange(graph.shape[-1], device=graph.device) == own)
