"""The graph network passes messages along edges j -> i and nowhere else, also from nodes that a cache holds."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from graft.configuration.configuration_gnn import GNNConfig
from graft.configuration.sparse_graph_config import SparseGraphConfig
from graft.modeling.graph.edge_storage import DenseEdges, SparseEdges, largest_edges
from graft.modeling.graph.node_cache import NodeCacheLayer
from graft.modeling.graph.sparse_graph_layers import (
    CausalGINLayer,
    CausalGraphNeuralNetwork,
    SparseGraphUpdate,
    at_scale_of,
)

HEADS = 2


def build(width=6, per_head=False, block_bytes=2**20, **options):
    torch.manual_seed(0)
    config = SparseGraphConfig(**{"rank": 4, "num_layers": 2, "per_head": per_head, **options})
    network = CausalGraphNeuralNetwork(width, config, (HEADS,) if per_head else (), block_bytes).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=0.2, std=0.5)
    return network


def random_graph(batch=2, source=7, seed=0, per_head=False):
    rng = torch.Generator().manual_seed(seed)
    leading = (batch, HEADS) if per_head else (batch,)
    states = torch.randn(*leading, source, 6, generator=rng, dtype=torch.float64)
    graph = torch.rand(*leading, source, source, generator=rng, dtype=torch.float64)
    graph = (graph * (graph > 0.4)).tril()
    graph[..., 3, :] = 0  # a token without edges
    return states, graph


def both_forms(graph):
    return DenseEdges(graph), SparseEdges(*largest_edges(graph, graph.shape[-1] - 1), graph.shape[-1])


def head_of(module, head):
    """A plain function that does what a module does for one head."""
    if head is None or not list(module.parameters(recurse=False)):
        return module
    of_head = {name: parameter[head] for name, parameter in module.named_parameters(recurse=False)}
    kind = type(module).__name__
    if kind == "GroupedLinear":
        return lambda x: x @ of_head["weight"] + (of_head["bias"][0] if "bias" in of_head else 0)
    if kind == "GroupedPReLU":
        return lambda x: torch.where(x > 0, x, of_head["slope"][0, 0] * x)
    assert kind == "GroupedLayerNorm"
    return lambda x: normed(x) * of_head["gain"][0] + of_head["shift"][0]


def normed(x):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5)


PLAIN = {
    "relu": lambda x: x * (x > 0),  # at 0, where nodes without edges stand, the gradient is 0
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
}


def act(options, module, head):
    if options.activation != "prelu":
        return PLAIN[options.activation]
    slope = module.slope[0] if head is None else module.slope[head, 0, 0]
    return lambda x: torch.where(x > 0, x, slope * x)


def gin_by_hand(layer, nodes, weights, i, options, head):
    epsilon = layer.epsilon if head is None else layer.epsilon[head, 0]
    u = ((1 if options.one_plus else 0) + epsilon) * nodes[i]
    for j in range(len(nodes)):
        u = u + weights[i, j] * nodes[j]
    if not options.mlp:
        return head_of(layer.update, head)(u)
    mlp = layer.update
    inner = head_of(mlp.up, head)(u)
    if options.mlp_norm == "layer":
        if head is None:
            inner = normed(inner) * mlp.inner_norm.weight + mlp.inner_norm.bias
        else:
            inner = head_of(mlp.inner_norm, head)(inner)
    return head_of(mlp.down, head)(act(options, mlp.activation, head)(inner)) + u


def gcn_by_hand(layer, nodes, weights, i, options, head):
    mapped = head_of(layer.map, head)
    summed = sum(weights[i, j] * mapped(nodes[j]) for j in range(len(nodes)))
    degree = weights[i].sum()
    return summed / degree if options.normalises_degree and degree != 0 else summed


def recombination_by_hand(layer, nodes, weights, i, options, head):
    earlier = [j for j in range(i) if weights[i, j] > 0]
    if not earlier:
        return 0 * nodes[i]
    scores = []
    for j in earlier:
        raw = head_of(layer.target_score, head)(nodes[i])[0] + head_of(layer.source_score, head)(nodes[j])[0]
        scores.append((raw if raw > 0 else 0.2 * raw) * weights[i, j])
    shares = torch.softmax(torch.stack(scores), 0)
    return sum(share * nodes[j] for share, j in zip(shares, earlier, strict=True))


def pna_by_hand(layer, nodes, weights, i, options, head):
    """Messages as maps of the whole [z_i; z_j; w_ij], pair by pair."""
    neighbours = [j for j in range(len(nodes)) if weights[i, j] != 0]
    width, output = options.rank // options.towers, []
    for tower in range(options.towers):
        part = slice(tower * width, (tower + 1) * width)
        at = (tower,) if head is None else (head, tower)
        own, source, edge = layer.target_map.weight[at], layer.source_map.weight[at], layer.edge_map.weight[at]
        together, bias = torch.cat([own, source, edge]), layer.target_map.bias[at][0]
        messages = [
            torch.cat([nodes[i][part], nodes[j][part], weights[i, j].reshape(1)]) @ together + bias for j in neighbours
        ]
        read = [nodes[i][part]]
        degree = max(1, len(neighbours))
        amplified = math.log(degree + 1) / options.log_degree
        factors = {"identity": 1.0, "amplification": amplified, "attenuation": 1 / amplified}
        for scaler in options.scalers:
            for kind in options.aggregators:
                value = torch.zeros(width, dtype=torch.float64)
                if messages:
                    stack = torch.stack(messages)
                    centred = stack - stack.mean(0)
                    value = {
                        "mean": stack.mean(0),
                        "max": stack.max(0).values,
                        "min": stack.min(0).values,
                        "std": torch.sqrt((centred**2).mean(0) + 1e-5),
                    }[kind]
                read.append(value * factors[scaler])
        output.append(torch.cat(read) @ layer.post_map.weight[at] + layer.post_map.bias[at][0])
    return head_of(layer.map_out, head)(torch.cat(output))


LAYERS = {
    "gin": gin_by_hand,
    "gcn": gcn_by_hand,
    "recombination": recombination_by_hand,
    "pna": pna_by_hand,
}


def run_by_hand(network, states, graph, options, head=None):
    """One network on (source, width) states."""
    weights = graph if options.weighted_edges else (graph != 0).double()
    nodes = [head_of(network.map_in, head)(state) for state in states]
    for layer, activation in zip(network.layers, network.activations, strict=True):
        activate, step = act(options, activation, head), LAYERS[options.layer]
        updates = [activate(step(layer, nodes, weights, i, options, head)) for i in range(len(nodes))]
        nodes = [n + u for n, u in zip(nodes, updates, strict=True)] if network.residual else updates
    return torch.stack([head_of(network.map_out, head)(node) for node in nodes])


def by_loops(network, states, graph, options):
    if not options.per_head:
        return torch.stack([run_by_hand(network, *of_row, options) for of_row in zip(states, graph, strict=True)])
    rows = [
        torch.stack([run_by_hand(network, states[b, h], graph[b, h], options, h) for h in range(HEADS)])
        for b in range(len(states))
    ]
    return torch.stack(rows)


CASES = {
    "gin": {},
    "gin, wide": {"mlp_ratio": 1.5, "activation": "silu", "residual": False},
    "gin, gelu": {"activation": "gelu"},
    "gin, tanh": {"activation": "tanh", "one_plus": True},
    "gin, prelu": {"activation": "prelu"},
    "gin, no norm": {"mlp_norm": "none"},
    "gin, no mlp": {"mlp": False},
    "gin, unweighted": {"weighted_edges": False},
    "gin, as wide as the states": {"rank": 6},
    "gcn": {"layer": "gcn"},
    "gcn, degree": {"layer": "gcn", "normalises_degree": True, "activation": "silu"},
    "recombination": {"layer": "recombination"},
    "recombination, unweighted": {"layer": "recombination", "weighted_edges": False, "residual": False},
    "pna": {"layer": "pna", "num_layers": 1},
    "pna, towers": {"layer": "pna", "towers": 2, "activation": "tanh", "num_layers": 1},
    "pna, some": {"layer": "pna", "aggregators": ["max", "std"], "scalers": ["attenuation"], "log_degree": 1.5},
    "pna, unweighted": {"layer": "pna", "aggregators": ["min", "mean"], "weighted_edges": False},
}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_network_and_its_gradients_equal_a_loop_over_nodes_and_edges(name, per_head):
    network = build(per_head=per_head, **CASES[name])
    options = SparseGraphConfig(**{"rank": 4, "per_head": per_head, **CASES[name]})
    states, graph = random_graph(per_head=per_head, batch=1 if "pna" in name else 2)
    graph.requires_grad_()
    exists = graph != 0
    expected = by_loops(network, states, graph, options)
    wanted = [graph, *network.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), wanted, allow_unused=True)
    for edges in both_forms(graph):
        found = network(states, edges)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), wanted, allow_unused=True), gradients, strict=True
        ):
            assert (one is None) == (other is None)
            if one is not None:  # pairs that are no edges have no gradient that means anything
                mask = exists if one.shape == graph.shape else 1
                torch.testing.assert_close(one * mask, other * mask, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["gin, tanh", "gcn, degree", "pna, towers", "recombination"])
def test_gradients_of_smooth_networks_are_those_of_finite_differences(name):
    network = build(**{"num_layers": 1, **CASES[name], "activation": "tanh", "aggregators": ["mean", "std"]})
    states, graph = random_graph(batch=1, source=4)
    graph = graph[:, :3, :3].contiguous().requires_grad_()
    states = states[:, :3].contiguous().requires_grad_()
    exists = (graph != 0).double()
    assert torch.autograd.gradcheck(lambda s, g: network(s, DenseEdges(g * exists)), (states, graph), atol=1e-6)


def test_messages_in_blocks_of_rows_are_the_same():
    states, graph = random_graph(source=150)
    found = [build(layer="pna", block_bytes=size)(states, DenseEdges(graph)) for size in (1, 2**26)]
    torch.testing.assert_close(*found)


def test_a_token_moves_exactly_those_that_edges_lead_to():
    layer = CausalGINLayer(SparseGraphConfig(rank=6, activation="silu")).double()
    states = torch.randn(1, 4, 6, dtype=torch.float64)
    graph = torch.zeros(1, 4, 4, dtype=torch.float64)
    graph[0, 2, 1] = 0.5  # token 2 reads token 1
    before = layer(states, states, DenseEdges(graph))
    states[0, 1] += 1
    moved = (layer(states, states, DenseEdges(graph)) - before).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False, False, True, False]  # epsilon begins at 0: token 1 itself stays where it was


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [[1] * 7, [2, 1, 4]])
def test_in_pieces_with_a_cache_the_network_gives_what_it_gave_at_once(steps, kind, per_head):
    network = build(num_layers=3, layer=kind, per_head=per_head)
    states, graph = random_graph(per_head=per_head)
    layer, at, found = NodeCacheLayer(DynamicLayer()), 0, []
    for step in steps:
        rows = slice(at, at + step)
        found.append(network(states[..., rows, :], DenseEdges(graph[..., rows, : at + step]), layer))
        at += step
    torch.testing.assert_close(torch.cat(found, -2), network(states, DenseEdges(graph)), atol=1e-12, rtol=1e-10)


def update_of(way=0.0, eps=1e-6, **options):
    config = GNNConfig(attention="llama", sparse={"rank": 4, **options})
    torch.manual_seed(1)
    return SparseGraphUpdate(config, 6, HEADS, way, eps).double().eval()


@pytest.mark.parametrize(("way", "expected"), [(0.0, 0.1), (0.5, 0.3), (1.0, 0.5)])
def test_the_scale_begins_on_the_line_from_first_to_last_layer(way, expected):
    assert update_of(way, scale_first=0.1, scale_last=0.5).scale.item() == pytest.approx(expected)


def test_the_update_is_normed_and_scaled():
    update = update_of(scale_first=0.3)
    states, graph = random_graph()
    raw = update.network(states, DenseEdges(graph))
    expected = 0.3 * raw / torch.sqrt(raw.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(update(states, DenseEdges(graph)), expected, atol=1e-6, rtol=1e-6)  # float32 norm


def test_networks_of_heads_read_their_slices_and_may_be_mixed():
    states, _ = random_graph()
    graph = random_graph(per_head=True)[1]
    update = update_of(scale_first=1.0, per_head=True, mixes_heads=True, normalises=False)
    parts = [update.network(torch.stack(states.split(3, -1), 1), DenseEdges(graph))[:, h] for h in range(HEADS)]
    expected = torch.cat(parts, -1) @ update.mix.weight.T + update.mix.bias
    torch.testing.assert_close(update(states, DenseEdges(graph)), expected)


def test_an_update_that_matches_scale_has_that_of_each_token():
    states, graph = random_graph()
    update = update_of(scale_first=0.5, matches_scale=True)(states, DenseEdges(graph))
    rms = [part.square().mean(-1).sqrt() for part in (update, states)]
    torch.testing.assert_close(rms[0], 0.5 * rms[1], atol=1e-4, rtol=1e-4)
    assert at_scale_of(torch.zeros(2, 3), torch.ones(2, 3), 1e-6).eq(0).all()


def test_dropout_acts_in_training_only():
    network = build(dropout=0.5)
    states, graph = random_graph()
    edges = DenseEdges(graph)
    assert torch.equal(network(states, edges), network(states, edges))
    network.train()
    assert not torch.equal(network(states, edges), network(states, edges))
