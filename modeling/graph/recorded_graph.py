"""What is kept of one layer's graphs while they are recorded: sums for its statistics, and the chosen rows, sparse."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class GraphSums:
    """Sums over rows of real tokens, from which means are taken at the end; one call's, or several added up."""

    rows: int = 0
    edges: float = 0.0
    most_edges: int = 0
    visible: float = 0.0
    own_weight: float = 0.0
    weight: float = 0.0
    mass: float = 0.0

    def add(self, weights: Tensor, graph: Tensor, visible: Tensor, places: Tensor, real: Tensor) -> None:
        """Take in a block of rows.

        Args:
            weights: attention (batch, heads, rows, source).
            graph: (batch, heads or 1, rows, source).
            visible: (batch or 1, 1, rows, source).
            places: (rows,) of each row's own key.
            real: (batch, rows), false for padding.
        """
        is_edge = graph != 0
        count = is_edge.sum(-1).float()  # (batch, graphs, rows)
        size = graph.abs()
        own = size.gather(-1, places.view(1, 1, -1, 1).expand(*size.shape[:2], -1, 1))[..., 0]
        kept = (is_edge * weights).sum(-1) / weights.sum(-1).clamp(min=torch.finfo(weights.dtype).tiny)
        self.rows += int(real.sum())
        self.edges += float((count.mean(1) * real).sum())
        self.most_edges = max(self.most_edges, int((count.amax(1) * real).max()))
        self.visible += float((visible.sum(-1)[:, 0] * real).sum())
        self.own_weight += float((own.sum(1) * real).sum())
        self.weight += float((size.sum(-1).sum(1) * real).sum())
        self.mass += float((kept.mean(1) * real).sum())

    def plus(self, other: "GraphSums") -> "GraphSums":
        """Both together."""
        sums = {name: value + getattr(other, name) for name, value in self.__dict__.items() if name != "most_edges"}
        return GraphSums(**sums, most_edges=max(self.most_edges, other.most_edges))

    def means(self) -> dict[str, float]:
        """The statistics: see `GraphRecorder.statistics`."""
        rows = max(self.rows, 1)
        return {
            "rows": self.rows,
            "edges_per_row": self.edges / rows,
            "most_edges": self.most_edges,
            "density": self.edges / max(self.visible, 1.0),
            "self_loop_share": self.own_weight / self.weight if self.weight else 0.0,
            "mass_kept": self.mass / rows,
        }


@dataclass
class CallGraph:
    """One call of one layer: its sums, and the rows that were chosen, each (batch, graphs, rows, source), sparse."""

    sums: GraphSums = field(default_factory=GraphSums)
    places: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)

    def keep(self, places: Tensor, rows: Tensor) -> None:
        """Keep rows (batch, graphs, rows, source) that belong to the tokens at `places`."""
        self.places.append(places.cpu())
        self.blocks.append(rows.to_sparse().cpu())


def join_rows(calls: list[CallGraph], item: int, graph: int) -> Tensor:
    """The kept rows of several calls as one sparse (tokens, tokens) matrix; of a row kept twice, the later counts."""
    index, values, tokens = torch.empty(2, 0, dtype=torch.long), torch.empty(0), 0
    for call in calls:
        for places, block in zip(call.places, call.blocks, strict=True):
            part = block[item][graph].coalesce()
            found = torch.stack([places[part.indices()[0]], part.indices()[1]])
            earlier = ~torch.isin(index[0], places)
            index = torch.cat([index[:, earlier], found], dim=1)
            values = torch.cat([values[earlier].to(part.dtype), part.values()])
            tokens = max(tokens, block.shape[-1], int(places.max()) + 1)
    return torch.sparse_coo_tensor(index, values, (tokens, tokens), check_invariants=True).coalesce()
