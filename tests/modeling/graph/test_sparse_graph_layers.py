"""The graph network passes messages along edges j -> i and nowhere else, also from nodes that a cache holds."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from graft.configuration.configuration_gnn import LlamaGNNConfig, SparseGraphConfig
from graft.modeling.graph.node_cache import NodeCacheLayer
from graft.modeling.graph.sparse_graph_layers import CausalGINLayer, CausalGraphNeuralNetwork, SparseGraphUpdate


def build(**options):
    torch.manual_seed(0)
    network = CausalGraphNeuralNetwork(6, SparseGraphConfig(**{"rank": 5, "num_layers": 2, **options})).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=0.2, std=0.5)
    return network


def random_graph(batch=2, source=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, source, 6, generator=rng, dtype=torch.float64)
    graph = torch.rand(batch, source, source, generator=rng, dtype=torch.float64)
    return states, (graph * (graph > 0.4)).tril()


ACTIVATIONS = {
    "relu": lambda x: x * (x > 0),  # at 0, where nodes without edges stand, the gradient is 0
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
}


def gin_by_hand(layer, nodes, weights, i, activation):
    u = layer.epsilon * nodes[i]
    for j in range(len(nodes)):
        u = u + weights[i, j] * nodes[j]
    inner = layer.up(u)
    centred = inner - inner.mean()
    inner = centred / torch.sqrt((centred**2).mean() + layer.inner_norm.eps)
    return layer.down(activation(inner * layer.inner_norm.weight + layer.inner_norm.bias)) + u


def gcn_by_hand(layer, nodes, weights, i, activation):
    return sum(weights[i, j] * (layer.map.weight @ nodes[j] + layer.map.bias) for j in range(len(nodes)))


def recombination_by_hand(layer, nodes, weights, i, activation):
    earlier = [j for j in range(i) if weights[i, j] > 0]
    if not earlier:
        return 0 * nodes[i]
    scores = []
    for j in earlier:
        raw = layer.target_score.weight[0] @ nodes[i] + layer.source_score.weight[0] @ nodes[j]
        scores.append((raw if raw > 0 else 0.2 * raw) * weights[i, j])
    shares = torch.softmax(torch.stack(scores), 0)
    return sum(share * nodes[j] for share, j in zip(shares, earlier, strict=True))


LAYERS = {"gin": gin_by_hand, "gcn": gcn_by_hand, "recombination": recombination_by_hand}


def by_loops(network, states, graph, kind, activation):
    output = []
    for b in range(len(states)):
        nodes = [network.map_in(state) for state in states[b]]
        for layer in network.layers:
            updates = [activation(LAYERS[kind](layer, nodes, graph[b], i, activation)) for i in range(len(nodes))]
            nodes = [
                node + update if network.residual else update for node, update in zip(nodes, updates, strict=True)
            ]
        output.append(torch.stack([network.map_out(node) for node in nodes]))
    return torch.stack(output)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_network_and_its_gradients_equal_a_loop_over_nodes_and_edges(kind, activation, residual):
    network = build(layer=kind, activation=activation, residual=residual, mlp_ratio=1.5)
    states, graph = random_graph()
    graph.requires_grad_()
    found, expected = network(states, graph), by_loops(network, states, graph, kind, ACTIVATIONS[activation])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    wanted = [graph, *network.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_a_token_moves_exactly_those_that_edges_lead_to():
    layer = CausalGINLayer(6, 8, "silu").double()
    states = torch.randn(1, 4, 6, dtype=torch.float64)
    graph = torch.zeros(1, 4, 4, dtype=torch.float64)
    graph[0, 2, 1] = 0.5  # token 2 reads token 1
    before = layer(states, states, graph)
    states[0, 1] += 1
    moved = (layer(states, states, graph) - before).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False, False, True, False]  # epsilon begins at 0: token 1 itself stays where it was


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [[1] * 7, [3, 4], [2, 1, 4]])
def test_in_pieces_with_a_cache_the_network_gives_what_it_gave_at_once(steps, kind):
    network = build(num_layers=3, layer=kind)
    states, graph = random_graph()
    layer, at, found = NodeCacheLayer(DynamicLayer()), 0, []
    for step in steps:
        found.append(network(states[:, at : at + step], graph[:, at : at + step, : at + step], layer))
        at += step
    torch.testing.assert_close(torch.cat(found, 1), network(states, graph), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("layers", "expected"), [(1, [0.1]), (3, [0.1, 0.3, 0.5])])
def test_the_scale_begins_on_the_line_from_first_to_last_layer(layers, expected):
    options = {"attention": "llama", "sparse": {"rank": 4, "scale_first": 0.1, "scale_last": 0.5}}
    config = LlamaGNNConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=layers, intermediate_size=8, gnn_config=options
    )
    found = [SparseGraphUpdate(config, index).scale.item() for index in range(layers)]
    assert found == pytest.approx(expected)


def test_the_update_is_normed_and_scaled():
    options = {"attention": "llama", "sparse": {"rank": 4, "scale_first": 0.3}}
    config = LlamaGNNConfig(
        hidden_size=6, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, gnn_config=options
    )
    update = SparseGraphUpdate(config, 0).double().eval()
    states, graph = random_graph()
    raw = update.network(states, graph)
    expected = 0.3 * raw / torch.sqrt(raw.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    torch.testing.assert_close(update(states, graph), expected, atol=1e-6, rtol=1e-6)  # Llama's norm is in float32


def test_dropout_acts_in_training_only():
    network = build(dropout=0.5)
    states, graph = random_graph()
    assert torch.equal(network(states, graph), network(states, graph))
    network.train()
    assert not torch.equal(network(states, graph), network(states, graph))
