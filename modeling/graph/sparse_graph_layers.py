"""A graph network on the sparse causal graph that a layer's attention makes, and its update of the residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ...configuration.configuration_gnn import LlamaGNNConfig, SparseGraphConfig
from .aggregation import gin_aggregate
from .node_cache import NodeCacheLayer

_LEAK = 0.2  # slope of the scores below 0, as in GAT


class CausalGINLayer(nn.Module):
    """W2 act(norm(W1 u)) + u with u_i = eps z_i + sum_j A_ij z_j (Xu et al. 2019, arXiv 1810.00826); eps begins at 0.

    Args:
        width: of the nodes.
        inner: width of the MLP.
        activation: its name in transformers.
    """

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.epsilon = nn.Parameter(torch.zeros(1))
        self.up = nn.Linear(width, inner)
        self.inner_norm = nn.LayerNorm(inner)
        self.down = nn.Linear(inner, width)
        self.activation = ACT2FN[activation]

    def forward(self, nodes: Tensor, sources: Tensor, adjacency: Tensor) -> Tensor:
        """One message step.

        Args:
            nodes: (batch, target, width), the tokens to update.
            sources: (batch, source, width), all tokens so far.
            adjacency: (batch, target, source); row i weighs the edges j -> i.
        """
        summed = gin_aggregate(nodes, sources, adjacency, self.epsilon)
        return self.down(self.activation(self.inner_norm(self.up(summed)))) + summed


class CausalGCNLayer(nn.Module):
    """sum_j A_ij W z_j, after Kipf and Welling 2017 (arXiv 1609.02907) without the normalisation by degrees.

    Arguments and shapes of `forward` as in CausalGINLayer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, nodes: Tensor, sources: Tensor, adjacency: Tensor) -> Tensor:
        """One message step."""
        return adjacency.to(sources.dtype) @ self.map(sources)


class CausalGNNRecombinationLayer(nn.Module):
    """sum_j softmax_j(e_ij) z_j with e_ij = leaky(a1 z_i + a2 z_j) A_ij over edges from strictly earlier tokens.

    This is a GAT layer (Velickovic et al. 2018, arXiv 1710.10903) with weighted edges; its score takes two numbers per
    node and no tensor of pairs of nodes. A token without such edges gets 0. `forward` as in CausalGINLayer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.target_score = nn.Linear(width, 1, bias=False)
        self.source_score = nn.Linear(width, 1, bias=False)

    def forward(self, nodes: Tensor, sources: Tensor, adjacency: Tensor) -> Tensor:
        """One message step."""
        target, source = adjacency.shape[-2:]
        own = torch.arange(source - target, source, device=adjacency.device)[:, None]
        edges = (adjacency > 0) & (torch.arange(source, device=adjacency.device) != own)
        scores = self.target_score(nodes) + self.source_score(sources).transpose(-1, -2)
        scores = functional.leaky_relu(scores.to(adjacency.dtype), _LEAK) * adjacency
        weights = scores.masked_fill(~edges, torch.finfo(scores.dtype).min).softmax(-1)
        return (weights * edges.any(-1, keepdim=True)).to(sources.dtype) @ sources


def make_graph_layer(options: SparseGraphConfig) -> nn.Module:
    """The graph layer that `options.layer` names, for nodes of width `options.rank`."""
    if options.layer == "gcn":
        return CausalGCNLayer(options.rank)
    if options.layer == "recombination":
        return CausalGNNRecombinationLayer(options.rank)
    return CausalGINLayer(options.rank, max(1, int(options.mlp_ratio * options.rank)), options.activation)


class CausalGraphNeuralNetwork(nn.Module):
    """Linear map into nodes of width `rank`, message steps, linear map out. The cache holds earlier tokens' nodes."""

    def __init__(self, width: int, options: SparseGraphConfig) -> None:
        super().__init__()
        rank = options.rank
        self.map_in = nn.Linear(width, rank)
        self.layers = nn.ModuleList(make_graph_layer(options) for _ in range(options.num_layers))
        self.map_out = nn.Linear(rank, width)
        self.activation = ACT2FN[options.activation]
        self.dropout, self.residual = options.dropout, options.residual

    def forward(self, states: Tensor, adjacency: Tensor, cache_layer: NodeCacheLayer | None = None) -> Tensor:
        """(batch, target, width) to the same; `adjacency` (batch, target, source) reaches over all tokens so far."""
        nodes = self.map_in(states)
        for depth, layer in enumerate(self.layers):
            sources = nodes if cache_layer is None else cache_layer.append_nodes(depth, nodes)
            update = self.activation(layer(nodes, sources, adjacency))
            update = functional.dropout(update, self.dropout, self.training)
            nodes = nodes + update if self.residual else update
        return self.map_out(nodes)


class SparseGraphUpdate(nn.Module):
    """lambda norm(GNN(t, A)), to be added to the residual; lambda is one trainable number.

    Args:
        config: of the model.
        layer_idx: decoder layer; lambda begins on the line from `scale_first` to `scale_last` over all layers.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__()
        options = config.gnn_config.sparse
        way = layer_idx / max(1, config.num_hidden_layers - 1)
        self.first_scale = float(options.scale_first + (options.scale_last - options.scale_first) * way)
        self.network = CausalGraphNeuralNetwork(config.hidden_size, options)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if options.normalises else nn.Identity()
        self.scale = nn.Parameter(torch.full((1,), self.first_scale))

    def forward(self, states: Tensor, adjacency: Tensor, cache_layer: NodeCacheLayer | None = None) -> Tensor:
        """The update of (batch, target, hidden_size) states."""
        return self.scale * self.norm(self.network(states, adjacency, cache_layer))
