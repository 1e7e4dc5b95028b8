"""Which pairs of tokens are edges, and how much they weigh: options from attention to a graph."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass
from math import inf, log
from typing import Literal

from huggingface_hub.dataclasses import strict

from .option_checks import check_count, check_positive

_SLOPES_IN_T = (
    "relu",
    "silu",
    "softplus",
    "sharp_softplus",
    "sigmoid",
    "flow",
    "silu+binary",
    "silu_below_binary_above",
    "softplus_below_binary_above",
)


@strict
@dataclass
class EdgeTransformConfig:
    """What becomes of an attention weight `a` of a visible pair before it weighs a message.

    Args:
        transform: "none" keeps `a`; "relu", "silu", "softplus" of (a - t); "sharp_softplus" is
            softplus(beta (a - t)) / beta; "sigmoid" is sigmoid(beta (a - t)); "flow" is sigmoid(5 a) times
            sigmoid(50 (a - t)); "binary" is [a > t]; "silu+binary" is silu(a - t) + s [a > t];
            "<f>_below_binary_above" is f(a - t) up to t and 1 above; "top_k" is 1 on the largest share of the row's
            visible keys; "scaled_topk" is 1 on the largest share of the strictly earlier ones, which may be none,
            where all weights below t count as equal.
        threshold: t, in [0, 1).
        steepness: beta.
        binary_weight: s.
        trains_threshold: whether t is a trainable number of each layer; for transforms that have a slope in t.
        fraction: of the visible keys that "top_k" keeps, at least one, and of the earlier ones that "scaled_topk"
            keeps; in (0, 1].
        straight_through: let the gradient pass hard selections as if `a` had been kept. Without it, "binary",
            "top_k" and "scaled_topk" teach queries and keys nothing.
    """

    transform: Literal[
        "none",
        "relu",
        "silu",
        "softplus",
        "sharp_softplus",
        "sigmoid",
        "flow",
        "binary",
        "silu+binary",
        "relu_below_binary_above",
        "silu_below_binary_above",
        "softplus_below_binary_above",
        "top_k",
        "scaled_topk",
    ] = "none"
    threshold: float | int = 0.2
    trains_threshold: bool = False
    steepness: float | int = 10.0
    binary_weight: float | int = 1.0
    fraction: float | int = 0.1
    straight_through: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must lie in [0, 1), got {self.threshold}.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1], got {self.fraction}.")
        check_positive(self, "steepness", "binary_weight")

    def validate_threshold(self) -> None:
        """Refuse a trainable threshold that would never get a gradient."""
        if self.trains_threshold and self.transform not in _SLOPES_IN_T:
            raise ValueError(
                f"`trains_threshold` needs a `transform` with a slope in the threshold, "
                f"{', '.join(_SLOPES_IN_T)}; got {self.transform!r}."
            )


@strict
@dataclass
class AdjacencyConfig:
    """How the attention maps of all heads become one weighted graph, or one for each head.

    Args:
        combine: "mean" over heads; "sum", at most 1; "any", the largest over heads of
            sigmoid((a - threshold) / temperature); "learned", w2 . relu(W1 [a_1 ... a_H]). Where each head keeps its
            own graph, "mean" and "sum" are `a` itself, "any" the sigmoid, and "learned" has an output per head.
        temperature: of "any".
        learned_activation: behind "learned": "sigmoid", or a "softmax" over what the row sees.
        learned_width: of "learned", between its two maps.
        distance: "far" favours distant tokens by ((1 + |i - j|) / n_i)^s, where row i sees n_i tokens; "near" close
            ones by (1 + |i - j|)^-s; None leaves weights as they are.
        distance_strength: s.
        sharpness: alpha in sigmoid(alpha (a - threshold)), applied to the combined weight; None leaves it out.
        threshold: see above.
        cutoff: weights up to it are no edges; None keeps all.
        self_loops: whether a token reads itself.
        normalises_rows: divide each row by the root mean square of its visible part, times one trainable number.
    """

    combine: Literal["mean", "sum", "any", "learned"] = "sum"
    temperature: float | int = 0.1
    learned_activation: Literal["sigmoid", "softmax"] = "softmax"
    learned_width: int = 128
    distance: Literal["far", "near"] | None = None
    distance_strength: float | int = 1.0
    sharpness: float | int | None = 10.0
    threshold: float | int = 0.1
    cutoff: float | int | None = 0.6
    self_loops: bool = True
    normalises_rows: bool = False

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        check_positive(self, "temperature", "sharpness", "distance_strength")
        check_count(self, "learned_width")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must lie in [0, 1), got {self.threshold}.")
        if self.cutoff is not None and not 0 <= self.cutoff < 1:
            raise ValueError(f"`cutoff` must lie in [0, 1) or be None, got {self.cutoff}.")

    def least_weight(self) -> float:
        """What the attention weight behind an edge exceeds: of a head ("any"), or combined. 0 or less is no limit."""
        if self.combine == "learned" or self.cutoff is None:
            return -inf
        least = float(self.cutoff)
        if self.sharpness is not None:
            least = self.threshold + _logit(least) / self.sharpness
        return least if self.combine != "any" else self.threshold + self.temperature * _logit(least)


def _logit(share: float) -> float:
    """Where the sigmoid takes the value `share`."""
    return -inf if share <= 0 else inf if share >= 1 else log(share / (1 - share))
