"""A graph layer that reads several aggregators of its neighbours' messages (PNA), on dense or sparse edges."""

import torch
from torch import Tensor, nn

from ...configuration.sparse_graph_config import SparseGraphConfig
from .edge_storage import Edges, WholeEdges
from .grouped_maps import GroupedLinear, make_linear
from .visible_rows import in_row_blocks


class CausalPNALayer(nn.Module):
    """W_o [post(z_i, scalers x aggregators of m_ij)] with m_ij = U z_i + V z_j + w_ij e + b over edges j -> i.

    Principal neighbourhood aggregation (Corso et al. 2020, arXiv 2004.05718): mean, min, max and standard deviation of
    the messages, each times 1, log(degree + 1) / delta and its inverse. Only max and min look at pairs one by one, in
    blocks of rows. A token without edges reads 0. Towers are slices of the nodes, each with maps of its own.

    Args:
        options: rank, aggregators, scalers, log_degree, towers.
        groups: () for one network, (heads,) for one of each head.
        block_bytes: largest block of messages held at a time.
    """

    def __init__(self, options: SparseGraphConfig, groups: tuple[int, ...], block_bytes: int) -> None:
        super().__init__()
        self.options, self.block_bytes = options, block_bytes
        width, each = options.rank // options.towers, (*groups, options.towers)
        self.width = width
        self.target_map = GroupedLinear(each, width, width)
        self.source_map = GroupedLinear(each, width, width, bias=False)
        self.edge_map = GroupedLinear(each, 1, width, bias=False)
        read = len(options.aggregators) * len(options.scalers)
        self.post_map = GroupedLinear(each, (1 + read) * width, width)
        self.map_out = make_linear(groups, options.rank, options.rank)

    def forward(self, nodes: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        """One message step; arguments as in CausalGINLayer."""
        nodes, sources = self._towers(nodes), self._towers(sources)
        every = edges.whole().spread()
        degree = (every.weight != 0).sum(-1, keepdim=True)
        found = self._aggregators(self.source_map(sources), every, degree)
        own = self.target_map(nodes)
        has_edges = degree > 0
        shifted = {name: part if name == "std" else (part + own) * has_edges for name, part in found.items()}
        read = torch.cat([shifted[name] for name in self.options.aggregators], dim=-1)
        scaled = [read * scale for scale in self._scales(degree, read.dtype)]
        update = self.post_map(torch.cat([nodes, *scaled], dim=-1))
        mixed: Tensor = self.map_out(update.transpose(-2, -3).flatten(-2))
        return mixed

    def _towers(self, states: Tensor) -> Tensor:
        """(batch, *heads, source, rank) to (batch, *heads, towers, source, rank / towers)."""
        return states.unflatten(-1, (self.options.towers, self.width)).transpose(-2, -3)

    def _aggregators(self, messages: Tensor, edges: WholeEdges, degree: Tensor) -> dict[str, Tensor]:
        """Mean, min, max of V z_j + w_ij e over the edges of each row, and the standard deviation."""
        kinds = self.options.aggregators
        found: dict[str, Tensor] = {}
        wide = messages.to(torch.promote_types(messages.dtype, torch.float32))
        of_edge = self.edge_map.weight.to(wide.dtype)
        count = degree.clamp(min=1)
        if "mean" in kinds or "std" in kinds:
            exists = edges.with_weight((edges.weight != 0).to(wide.dtype))
            weights = edges.weight.to(wide.dtype)
            mean = (exists.sum(wide) + weights.sum(-1, keepdim=True) * of_edge) / count
            found["mean"] = mean
        if "std" in kinds:
            square = exists.sum(wide.square()) + 2 * of_edge * edges.sum(wide)
            square = (square + weights.square().sum(-1, keepdim=True) * of_edge.square()) / count
            found["std"] = torch.sqrt((square - mean.square()).relu() + 1e-5) * (degree > 0)
        found |= {name: self._extreme(wide, of_edge, edges, name) for name in kinds if name in ("min", "max")}
        return {name: part.to(messages.dtype) for name, part in found.items()}

    def _extreme(self, messages: Tensor, of_edge: Tensor, edges: WholeEdges, name: str) -> Tensor:
        """The largest or smallest message of each row and coordinate, 0 where there is no edge."""
        sign = -1.0 if name == "min" else 1.0

        def compute(rows: range) -> Tensor:
            part = edges.block(rows)
            weight = part.weight.to(messages.dtype).unsqueeze(-1)
            pairs = sign * (part.gather(messages) + weight * of_edge.unsqueeze(-2))
            largest = pairs.masked_fill(weight == 0, torch.finfo(pairs.dtype).min).amax(-2)
            return sign * largest * (weight != 0).any(-2)

        target, width = edges.weight.shape[-2:]
        row_bytes = messages.element_size() * width * messages[..., 0, :].numel()
        return in_row_blocks(compute, target, row_bytes, self.block_bytes)

    def _scales(self, degree: Tensor, dtype: torch.dtype) -> list[Tensor]:
        amplified = (degree.clamp(min=1) + 1).to(dtype).log() / self.options.log_degree
        factors = {"identity": torch.ones_like(amplified), "amplification": amplified, "attenuation": 1 / amplified}
        return [factors[name] for name in self.options.scalers]
