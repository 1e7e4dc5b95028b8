"""Feed-forward parts that send messages equal loops over heads and rows with the attention map written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.attention_rows import ScoredPairs
from graft.modeling.graph.graph_mlp import make_mlp
from graft.modeling.graph.node_cache import NodeCacheLayer

WIDTH, INNER = 8, 12


def build(kind, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaGNNConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_hidden_layers=1,
        intermediate_size=INNER,
        mlp_bias=True,
        gnn_config={"attention": "llama", "mlp": kind, **options},
    )
    config._attn_implementation = "sdpa"
    mlp = make_mlp(config).double().eval()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mlp


def random_states(seed, batch, heads, source, head_dim=3):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, source, WIDTH, generator=rng, dtype=torch.float64)
    query, key = torch.randn(2, batch, heads, source, head_dim, generator=rng, dtype=torch.float64)
    return states, query, key


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(module, x):
    return module.weight @ x + (0 if module.bias is None else module.bias)


def attention_map(query, key, scaling, seen):
    """(source, source) of one head; `seen` (source, source)."""
    graph = torch.zeros_like(query @ key.T)
    for i in range(len(query)):
        keys = [j for j in range(len(key)) if seen[i, j]]
        if keys:
            graph[i, keys] = torch.softmax(torch.stack([scaling * query[i] @ key[j] for j in keys]), 0)
    return graph


def halfway_by_hand(mlp, x, maps, seen):
    heads, count = len(maps), len(x)
    inner = torch.stack([silu(linear(mlp.gate_proj, t)) * linear(mlp.up_proj, t) for t in x])
    slices = inner.unflatten(-1, (heads, -1))
    updated = []
    for i in range(count):
        parts = []
        for h in range(heads):
            received = sum(maps[h][i, j] * slices[j, h] for j in range(count))
            parts.append((1 + mlp.epsilon[h, 0]) * slices[i, h] + mlp.message_weight[h, 0] * received)
        updated.append(linear(mlp.down_proj, torch.cat(parts)))
    return torch.stack(updated)


def hops_by_hand(mlp, x, maps, seen):
    """With A, A^2, A^3 written out, acting on the wide W_u x."""
    heads, parts = len(maps), []
    slices, width = x.unflatten(-1, (heads, -1)), x.shape[-1] // len(maps)
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        gate = slices[:, h] @ mlp.gate_proj.weight[:, columns].T + mlp.gate_proj.bias
        up = slices[:, h] @ mlp.up_proj.weight[:, columns].T + mlp.up_proj.bias
        power, mixed = torch.eye(len(x), dtype=x.dtype), (1 + mlp.epsilon[h]) * up
        for weight in mlp.hop_weights:
            power = power @ maps[h]
            mixed = mixed + weight[h] * (power @ up)
        parts.append((silu(gate) * mixed) @ mlp.down_proj.weight[columns].T)
    return torch.cat(parts, -1) + mlp.down_proj.bias


def aggregations_by_hand(mlp, x, maps, seen):
    heads, count = len(maps), len(x)
    inner = torch.stack([silu(linear(mlp.gate_proj, t)) * linear(mlp.up_proj, t) for t in x])
    slices, output = inner.unflatten(-1, (heads, -1)), []
    for i in range(count):
        keys, parts = [j for j in range(count) if seen[i, j]], []
        for h in range(heads):
            own = (1 + mlp.epsilon[h, 0]) * slices[i, h]
            received = mlp.message_weight[h, 0] * sum(maps[h][i, j] * slices[j, h] for j in keys)
            largest = torch.stack([slices[j, h] for j in keys]).max(0).values
            query, width = linear(mlp.query_map, slices[i, h]), slices.shape[-1]
            scores = [query @ linear(mlp.key_map, slices[j, h]) / width**0.5 + maps[h][i, j].log() for j in keys]
            shares = torch.softmax(torch.stack(scores), 0)
            selected = sum(share * slices[j, h] for share, j in zip(shares, keys, strict=True))
            read = torch.cat([own, received, largest, selected])
            parts.append(linear(mlp.aggregate_down, silu(linear(mlp.aggregate_up, read))))
        output.append(linear(mlp.down_proj, torch.cat(parts)))
    return torch.stack(output)


SENDING = {
    "halfway_gin": halfway_by_hand,
    "multi_hop": hops_by_hand,
    "multi_aggregation": aggregations_by_hand,
}


def by_hand(kind, mlp, states, query, key, seen):
    rows = []
    for b in range(len(states)):
        maps = [attention_map(query[b, h], key[b, h], 0.6, seen[b]) for h in range(query.shape[1])]
        rows.append(SENDING[kind](mlp, states[b], maps, seen[b]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", SENDING)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(0, 3))
def test_messages_equal_loops_over_heads_and_rows(kind, seed, heads, source, padding):
    mlp, (states, query, key) = build(kind, heads), random_states(seed, 2, heads, source)
    real = torch.ones(2, source, dtype=torch.bool)
    padding = min(padding, source - 1)
    real[0, :padding] = False
    seen = torch.ones(source, source, dtype=torch.bool).tril() & real[:, None, :]
    seen = seen | torch.eye(source, dtype=torch.bool)  # padding reads itself, so that the loop need not skip it
    found = mlp(states, ScoredPairs(query, key, 0.6, seen[:, None]))
    expected = by_hand(kind, mlp, states, query, key, seen)
    torch.testing.assert_close(found[real], expected[real], atol=1e-10, rtol=1e-10)
    if not padding:
        causal = mlp(states, ScoredPairs(query, key, 0.6, None))
        torch.testing.assert_close(causal, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", SENDING)
def test_gradients_equal_those_of_the_loops(kind):
    mlp, states = build(kind), random_states(3, 2, 2, 5)
    given_states = [part.requires_grad_() for part in states]
    seen = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    wanted = [*given_states, *mlp.parameters()]
    one = mlp(states[0], ScoredPairs(*states[1:], 0.6, None))
    other = by_hand(kind, mlp, *states, seen)
    gradients = [torch.autograd.grad(output.square().sum(), wanted) for output in (one, other)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("steps", [[1] * 5, [2, 1, 2]])
@pytest.mark.parametrize("kind", SENDING)
def test_in_pieces_with_a_cache_the_part_gives_what_it_gave_at_once(kind, steps):
    mlp, (states, query, key) = build(kind), random_states(4, 2, 2, 5)
    layer, at, found = NodeCacheLayer(DynamicLayer()), 0, []
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for step in steps:
        rows, end = slice(at, at + step), at + step
        pairs = ScoredPairs(query[:, :, rows], key[:, :, :end], 0.6, causal[:, :, rows, :end])
        found.append(mlp(states[:, rows], pairs, layer))
        at = end
    whole = mlp(states, ScoredPairs(query, key, 0.6, None))
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("halfway_gin", {"inner": 12}),
        ("multi_aggregation", {"inner": 12, "keys": 12}),
        ("multi_hop", {"hop 0": 8, "hop 1": 8, "hop 2": 8}),
    ],
)
def test_the_cache_keeps_as_many_numbers_a_token_as_documented(kind, expected):
    mlp, (states, query, key) = build(kind), random_states(4, 1, 2, 5)
    layer = NodeCacheLayer(DynamicLayer())
    mlp(states, ScoredPairs(query, key, 0.6, None), layer)
    assert {name: nodes.shape[1] * nodes.shape[3] for name, nodes in layer.nodes.items()} == expected


@pytest.mark.parametrize("kind", ["linear", "shallow", "none"])
def test_plain_parts_are_maps_of_each_token(kind):
    mlp, x = build(kind), random_states(5, 1, 2, 3)[0]
    expected = {
        "linear": lambda t: silu(linear(mlp.map, t)),
        "shallow": lambda t: linear(mlp.down_proj, silu(linear(mlp.up_proj, t))),
        "none": lambda t: t,
    }[kind]
    torch.testing.assert_close(mlp(x), torch.stack([expected(t) for t in x[0]])[None])
