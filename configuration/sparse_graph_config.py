"""A graph network beside attention: its options."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from huggingface_hub.dataclasses import strict

from .option_checks import check_count, check_positive, check_share


@strict
@dataclass
class SparseGraphConfig:
    """A graph network on the sparse graph that a layer's own attention makes; its output is added to the residual.

    Args:
        layer: "gin" sends the sum over edges through an MLP; "gcn" sends it through one linear map; "pna" reads
            several aggregators of its neighbours (arXiv 2004.05718); "recombination" averages earlier neighbours by a
            softmax over the edges (GAT, arXiv 1710.10903).
        rank: width of the nodes.
        num_layers: graph layers, each one message step.
        per_head: one network for each head, on its slice of the hidden state and its own graph, each of width `rank`.
        mixes_heads: with `per_head`, a square map of the joined outputs.
        mlp: whether "gin" has an MLP; one linear map otherwise.
        mlp_norm: in the MLP of "gin".
        mlp_ratio: width inside the MLP of "gin" over `rank`.
        one_plus: "gin" weighs the token itself with 1 + epsilon, as its paper does, and not with epsilon.
        weighted_edges: whether "gin", "gcn" and "pna" weigh edges; an edge counts 1 otherwise.
        normalises_degree: "gcn" divides by the sum of the row's weights.
        aggregators: of "pna", among "mean", "min", "max", "std".
        scalers: of "pna", each a factor for all aggregators: "identity"; "amplification", log(degree + 1) / delta;
            "attenuation", its inverse.
        log_degree: delta, the mean of log(degree + 1) in the training data; the default stands for 11 edges.
        towers: slices of the nodes that "pna" treats by themselves and then mixes.
        activation: in the MLP of "gin" and behind each graph layer. "prelu" has a trainable slope.
        dropout: behind each graph layer.
        residual: whether each graph layer adds its input.
        normalises: RMS norm of the update before it is scaled.
        matches_scale: give each token's update the root mean square of what the network read.
        reads: the network's input: the "residual" behind attention, or the "normed_input" of attention.
        storage: "dense" keeps a weight for each pair of tokens, "sparse" the edges of each row alone, of which there
            are so few that none is lost; "auto" chooses by length.
        scale_first, scale_last: where the trainable scale of the update begins, in the first and last decoder layer,
            and linearly in between. With both 0 the model begins as its base.
    """

    layer: Literal["gin", "gcn", "pna", "recombination"] = "gin"
    rank: int = 128
    num_layers: int = 1
    per_head: bool = False
    mixes_heads: bool = False
    mlp: bool = True
    mlp_norm: Literal["layer", "none"] = "layer"
    mlp_ratio: float | int = 1.0
    one_plus: bool = False
    weighted_edges: bool = True
    normalises_degree: bool = False
    aggregators: list[Literal["mean", "min", "max", "std"]] = field(
        default_factory=lambda: ["mean", "min", "max", "std"]
    )
    scalers: list[Literal["identity", "amplification", "attenuation"]] = field(
        default_factory=lambda: ["identity", "amplification", "attenuation"]
    )
    log_degree: float | int = 2.5
    towers: int = 1
    activation: Literal["relu", "gelu", "silu", "tanh", "prelu"] = "relu"
    dropout: float | int = 0.1
    residual: bool = True
    normalises: bool = True
    matches_scale: bool = False
    reads: Literal["residual", "normed_input"] = "residual"
    storage: Literal["auto", "dense", "sparse"] = "auto"
    scale_first: float | int = 0.0
    scale_last: float | int = 0.5

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        check_count(self, "rank", "num_layers", "towers")
        check_positive(self, "mlp_ratio", "log_degree")
        check_share("dropout", self.dropout)
        for name in ("scale_first", "scale_last"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}.")
        for name in ("aggregators", "scalers"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"`{name}` must name at least one, and each once, got {chosen}.")

    def validate_combination(self) -> None:
        """Refuse options that would not act together."""
        if self.mixes_heads and not self.per_head:
            raise ValueError("`mixes_heads` joins the networks of `per_head=True`, got `per_head=False`.")
        if self.layer == "pna" and self.rank % self.towers:
            raise ValueError(f"`rank` must be a multiple of `towers`, got {self.rank} and {self.towers}.")
