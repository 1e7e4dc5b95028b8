"""Messages up the plans of a batch, level by level."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...configuration.configuration_query_graph import EDGE_SLOTS, QueryGraphConfig


def two_layers(inputs: int, config: QueryGraphConfig) -> nn.Sequential:
    """A network of two layers, GELU between them."""
    width = config.hidden_size
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, width))


def sum_by_slot(messages: Tensor, slots: Tensor, targets: Tensor, count: int) -> Tensor:
    """Sum what each node reads, the slots apart: s_v = [sum over edges u -> v of slot k of h_u]_k.

    Args:
        messages: (edges, width).
        slots, targets: (edges,) of each edge; targets in [0, count).

    Returns:
        (count, slots * width).
    """
    width, kinds = messages.shape[1], len(EDGE_SLOTS)
    sums = messages.new_zeros(count * kinds, width).index_add(0, targets * kinds + slots, messages)
    return sums.view(count, kinds * width)


def by_level(levels: Tensor, edges: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The nodes of each level and the edges that end in it, from the leaves up.

    Args:
        levels: (nodes,) above the levels of what each node reads.
        edges: (2, edges).
    """
    count = int(levels.max()) + 1
    ends = levels[edges[1]]
    nodes_of = levels.argsort(stable=True).split(torch.bincount(levels, minlength=count).tolist())
    edges_of = ends.argsort(stable=True).split(torch.bincount(ends, minlength=count).tolist())
    return zip(nodes_of, edges_of, strict=True)


class PlanMessages(nn.Module):
    """Nodes that know all below them: h_v = e(x_v) + U([e(x_v), s_v]).

    e is a network of two layers for each kind of node, U one for all, s_v is `sum_by_slot` of the nodes that v reads.
    """

    def __init__(self, config: QueryGraphConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(two_layers(size, config) for size in config.feature_sizes or ())
        self.update = two_layers((1 + len(EDGE_SLOTS)) * config.hidden_size, config)
        self.sizes = list(config.feature_sizes or ())

    def encode(self, node_types: Tensor, features: Tensor) -> Tensor:
        """e(x_v), (nodes, width)."""
        nodes = [(node_types == kind).nonzero().squeeze(1) for kind in range(len(self.sizes))]
        of_kind = [
            encoder(features[some, :size])
            for encoder, some, size in zip(self.encoders, nodes, self.sizes, strict=True)
        ]
        return torch.cat(of_kind)[torch.cat(nodes).argsort()]

    def forward(self, node_types: Tensor, features: Tensor, edges: Tensor, slots: Tensor, levels: Tensor) -> Tensor:
        """Hidden states of all nodes, (nodes, width); arguments as in QueryPlanGraph."""
        encoded = self.encode(node_types, features)
        hidden = torch.zeros_like(encoded)
        place = torch.empty_like(levels)  # of a node among those of its level
        for nodes, ending in by_level(levels, edges):
            place[nodes] = torch.arange(len(nodes), device=levels.device)
            sources, targets = edges[:, ending]
            sums = sum_by_slot(hidden[sources], slots[ending], place[targets], len(nodes))
            below = encoded[nodes]
            # In place: no later step needs the old values for its gradient, and a copy per level costs nodes x depth.
            hidden.index_copy_(0, nodes, below + self.update(torch.cat([below, sums], dim=1)))
        return hidden
