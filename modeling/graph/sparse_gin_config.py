"""A graph network beside the attention of a decoder people already have: the options, as a method of PEFT."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from peft import PeftConfig

from ...configuration.configuration_gnn import GNNConfig
from ...configuration.graph_edges_config import AdjacencyConfig
from ...configuration.sparse_graph_config import SparseGraphConfig

PEFT_TYPE = "SPARSE_GIN"


@strict
@dataclass
class SparseGINConfig(PeftConfig):
    """lambda norm(GIN(t, A)) added to the residual t behind attention, A made of attention itself (arXiv 2501.02393).

    Args:
        rank: width of the nodes.
        mlp_ratio: width inside the MLP of a graph layer over `rank`.
        num_layers: graph layers in each decoder layer.
        activation, dropout: of the graph layers, as in SparseGraphConfig.
        scale_first, scale_last: where lambda begins in the first and last decoder layer, and linearly in between.
        adjacency: an AdjacencyConfig or a dict of its fields. None is the defaults.
        edge_mode: "causal", a token reads earlier tokens and itself; "self_only", itself alone, as the paper's code;
            "external_only", what the graph given with the input says, and no attention is scored again. With the
            other two such a graph is added.
        trains_adjacency: whether the loss reaches queries and keys through the edges. The base is frozen, but earlier
            adapters are not: without it their gradients leave the way through later attention maps out.
        shares_scores: make attention's own answer of the weights that the graph is made from, in one pass, where the
            base runs with "sdpa" and nothing else answers for its attention; equal to the base's up to rounding.
        storage: of edges: "auto", "dense" or "sparse", as in SparseGraphConfig.
        layers_to_transform: decoder layers that have a network, from 0; None is all.
        block_bytes: largest block of attention weights held at a time.
    """

    rank: int = 155
    mlp_ratio: float | int = 1.0
    num_layers: int = 1
    activation: Literal["relu", "gelu", "silu", "tanh", "prelu"] = "prelu"
    dropout: float | int = 0.1
    scale_first: float | int = 0.0
    scale_last: float | int = 0.5
    adjacency: Any = None
    edge_mode: Literal["causal", "self_only", "external_only"] = "causal"
    trains_adjacency: bool = False
    shares_scores: bool = False
    storage: Literal["auto", "dense", "sparse"] = "auto"
    layers_to_transform: list[int] | None = None
    block_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        options = self.graph_options()  # refuses what does not fit together
        self.adjacency = options.adjacency
        if self.edge_mode == "self_only" and not self.adjacency.self_loops:
            raise ValueError("`edge_mode='self_only'` keeps self-loops alone, and `adjacency.self_loops` is False.")
        if self.shares_scores and self.edge_mode == "external_only":
            raise ValueError("`shares_scores` shares attention's scores, and `edge_mode='external_only'` reads none.")
        layers = self.layers_to_transform
        if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError(f"`layers_to_transform` must name different layers from 0 on, got {layers}.")

    def graph_options(self) -> GNNConfig:
        """The same as options of a graph layer of a Llama."""
        sparse = SparseGraphConfig(
            rank=self.rank,
            mlp_ratio=self.mlp_ratio,
            num_layers=self.num_layers,
            activation=self.activation,
            dropout=self.dropout,
            scale_first=self.scale_first,
            scale_last=self.scale_last,
            storage=self.storage,
        )
        adjacency = AdjacencyConfig() if self.adjacency is None else self.adjacency
        return GNNConfig(
            attention="llama",
            sparse=sparse,
            adjacency=adjacency,
            shares_scores=self.shares_scores,
            block_bytes=self.block_bytes,
        )

    def layers(self, count: int) -> list[int]:
        """The decoder layers that have a network, in a base of `count` layers.

        Raises:
            ValueError: a layer that the base does not have.
        """
        layers = list(range(count)) if self.layers_to_transform is None else sorted(self.layers_to_transform)
        if layers[-1] >= count:
            raise ValueError(
                f"`layers_to_transform` must lie in [0, {count}) for this model, got {self.layers_to_transform}."
            )
        return layers
