"""A graph network on the sparse causal graph that a layer's attention makes, and its update of the residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from ...configuration.configuration_gnn import GNNConfig
from ...configuration.sparse_graph_config import SparseGraphConfig
from .adjacency import AttentionAdjacency
from .attention_edges import attend_with_edges, attention_edges
from .attention_rows import ScoredPairs
from .edge_storage import Edges
from .grouped_maps import make_activation, make_layer_norm, make_linear
from .lean_gradients import LeanRMSNorm
from .llama_heads import join_heads, split_heads
from .node_cache import NodeCacheLayer
from .sparse_pna_layer import CausalPNALayer

_LEAK = 0.2  # slope of the scores below 0, as in GAT


class CausalGINLayer(nn.Module):
    """W2 act(norm(W1 u)) + u with u_i = eps z_i + sum_j w_ij z_j (Xu et al. 2019, arXiv 1810.00826); or W u.

    eps begins at 0; with `one_plus` it stands for the paper's 1 + eps.

    Args:
        options: what the network is.
        groups: () for one network, (heads,) for one of each head.
    """

    def __init__(self, options: SparseGraphConfig, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        width = options.rank
        self.own_weight = 1.0 if options.one_plus else 0.0
        self.epsilon = nn.Parameter(torch.zeros((*groups, 1, 1) if groups else (1,)))
        self.update = _GINMLP(options, groups) if options.mlp else make_linear(groups, width, width)

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        init.zeros_(self.epsilon)

    def forward(self, nodes: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        """One message step.

        Args:
            nodes: (batch, target, width), the tokens to update; with groups, an axis of heads behind `batch`.
            sources: (batch, source, width), all tokens so far.
            edges: of each row i, j -> i.
        """
        summed = (self.own_weight + self.epsilon) * nodes + edges.sum(sources)
        updated: Tensor = self.update(summed)
        return updated


class _GINMLP(nn.Module):
    """W2 act(norm(W1 u)) + u."""

    def __init__(self, options: SparseGraphConfig, groups: tuple[int, ...]) -> None:
        super().__init__()
        width, inner = options.rank, max(1, int(options.mlp_ratio * options.rank))
        self.up = make_linear(groups, width, inner)
        self.inner_norm = make_layer_norm(groups, inner) if options.mlp_norm == "layer" else nn.Identity()
        self.activation = make_activation(options.activation, groups)
        self.down = make_linear(groups, inner, width)

    def forward(self, summed: Tensor) -> Tensor:
        return self.down(self.activation(self.inner_norm(self.up(summed)))) + summed


class CausalGCNLayer(nn.Module):
    """sum_j w_ij (W z_j + b), after Kipf and Welling 2017 (arXiv 1609.02907).

    With `normalises_degree`, divided by sum_j w_ij: row by row, where the paper's symmetric form would look ahead.
    Arguments and shapes of `forward` as in CausalGINLayer.
    """

    def __init__(self, options: SparseGraphConfig, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.map = make_linear(groups, options.rank, options.rank)
        self.weigh = _over_degree if options.normalises_degree else _as_it_is

    def forward(self, nodes: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        """One message step."""
        return self.weigh(edges).sum(self.map(sources))


def _over_degree(edges: Edges) -> Edges:
    whole = edges.whole()
    degree = whole.weight.sum(-1, keepdim=True)
    return whole.with_weight(whole.weight / torch.where(degree == 0, 1.0, degree))


def _as_it_is(edges: Edges) -> Edges:
    return edges


class CausalGNNRecombinationLayer(nn.Module):
    """sum_j softmax_j(e_ij) z_j with e_ij = leaky(a1 z_i + a2 z_j) w_ij over edges from strictly earlier tokens.

    This is a GAT layer (Velickovic et al. 2018, arXiv 1710.10903) with weighted edges; its score takes two numbers per
    node and no tensor of pairs of nodes. A token without such edges gets 0. `forward` as in CausalGINLayer.
    """

    def __init__(self, options: SparseGraphConfig, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.target_score = make_linear(groups, options.rank, 1, bias=False)
        self.source_score = make_linear(groups, options.rank, 1, bias=False)

    def forward(self, nodes: Tensor, sources: Tensor, edges: Edges) -> Tensor:
        """One message step."""
        own = torch.arange(sources.shape[-2] - nodes.shape[-2], sources.shape[-2], device=nodes.device)[:, None]
        whole = edges.whole()
        exists = (whole.weight != 0) & (whole.places() != own)
        scores = self.target_score(nodes) + whole.take(self.source_score(sources).squeeze(-1))
        scores = functional.leaky_relu(scores.to(whole.weight.dtype), _LEAK) * whole.weight
        shares = scores.masked_fill(~exists, torch.finfo(scores.dtype).min).softmax(-1)
        return whole.with_weight(shares * exists.any(-1, keepdim=True)).sum(sources)


def make_graph_layer(options: SparseGraphConfig, groups: tuple[int, ...], block_bytes: int) -> nn.Module:
    """The graph layer that `options.layer` names, for nodes of width `options.rank`."""
    if options.layer == "pna":
        return CausalPNALayer(options, groups, block_bytes)
    plain = {"gin": CausalGINLayer, "gcn": CausalGCNLayer, "recombination": CausalGNNRecombinationLayer}
    return plain[options.layer](options, groups)


class CausalGraphNeuralNetwork(nn.Module):
    """Linear map into nodes of width `rank`, message steps, linear map out. The cache holds earlier tokens' nodes.

    Args:
        width: of the states.
        options: what the network is; nodes as wide as the states need no map in.
        groups: () for one network, (heads,) for one of each head.
        block_bytes: largest block of messages that a layer holds at a time.
    """

    def __init__(
        self, width: int, options: SparseGraphConfig, groups: tuple[int, ...] = (), block_bytes: int = 64 * 2**20
    ) -> None:
        super().__init__()
        rank = options.rank
        self.map_in = nn.Identity() if rank == width else make_linear(groups, width, rank)
        self.layers = nn.ModuleList(make_graph_layer(options, groups, block_bytes) for _ in range(options.num_layers))
        self.activations = nn.ModuleList(make_activation(options.activation, groups) for _ in self.layers)
        self.map_out = make_linear(groups, rank, width)
        self.dropout, self.residual, self.weighted = options.dropout, options.residual, options.weighted_edges

    def forward(self, states: Tensor, edges: Edges, cache_layer: NodeCacheLayer | None = None) -> Tensor:
        """(batch, target, width) to the same, with heads behind `batch` if there are; edges to all tokens so far."""
        if not self.weighted:
            whole = edges.whole()
            edges = whole.with_weight((whole.weight != 0).to(whole.weight.dtype))
        nodes = self.map_in(states)
        for depth, (layer, activate) in enumerate(zip(self.layers, self.activations, strict=True)):
            sources = nodes if cache_layer is None else cache_layer.append_nodes(depth, nodes)
            update = functional.dropout(activate(layer(nodes, sources, edges)), self.dropout, self.training)
            nodes = nodes + update if self.residual else update
        return self.map_out(nodes)


def at_scale_of(update: Tensor, states: Tensor, eps: float) -> Tensor:
    """The update with the root mean square that `states` has, token by token; both (batch, target, width)."""
    wide = torch.promote_types(update.dtype, torch.float32)
    have, want = (part.to(wide).square().mean(-1, keepdim=True) + eps for part in (update, states))
    return update * (want * have.reciprocal()).sqrt().to(update.dtype)


class SparseGraphUpdate(nn.Module):
    """lambda norm(GNN(t, A)), to be added to the residual; lambda is one trainable number.

    Args:
        options: `sparse`, `adjacency` and `block_bytes` are read.
        width: of the residual.
        heads: of the attention.
        way: from 0 in the first to 1 in the last decoder layer; lambda begins so far from `scale_first` to
            `scale_last`.
        eps: of the norm.
    """

    def __init__(self, options: GNNConfig, width: int, heads: int, way: float, eps: float) -> None:
        super().__init__()
        sparse = options.sparse
        groups = (heads,) if sparse.per_head else ()
        self.options, self.eps, self.block_bytes = sparse, eps, options.block_bytes
        self.slice_width = width // heads
        self.first_scale = float(sparse.scale_first + (sparse.scale_last - sparse.scale_first) * way)
        self.adjacency = AttentionAdjacency(options.adjacency, heads, sparse.per_head)
        own_width = self.slice_width if sparse.per_head else width
        self.network = CausalGraphNeuralNetwork(own_width, sparse, groups, options.block_bytes)
        self.mix = nn.Linear(width, width) if sparse.mixes_heads else nn.Identity()
        self.norm = LeanRMSNorm(width, eps) if sparse.normalises else nn.Identity()
        self.scale = nn.Parameter(torch.full((1,), self.first_scale))

    def initialise(self, std: float) -> None:
        """Set what is no part of a stock module."""
        init.constant_(self.scale, self.first_scale)

    def edges(self, pairs: ScoredPairs) -> Edges:
        """The graph of a layer's attention."""
        return attention_edges(pairs, self.adjacency, self.options.storage, self.block_bytes)

    def attend_with_edges(
        self, pairs: ScoredPairs, value: Tensor, dropout: float, trains_adjacency: bool = True
    ) -> tuple[Tensor, Edges]:
        """What attention reads of `value`, and the graph, from weights that are made once; see `attend_with_edges`."""
        how = self.adjacency, self.options.storage, self.block_bytes, trains_adjacency
        return attend_with_edges(pairs, value, dropout, *how)

    def forward(self, states: Tensor, edges: Edges, cache_layer: NodeCacheLayer | None = None) -> Tensor:
        """The update of (batch, target, width) states."""
        if self.options.per_head:
            update = join_heads(self.network(split_heads(states, self.slice_width), edges, cache_layer))
        else:
            update = self.network(states, edges, cache_layer)
        update = self.norm(self.mix(update))
        if self.options.matches_scale:
            update = at_scale_of(update, states, self.eps)
        scaled: Tensor = self.scale * update
        return scaled
