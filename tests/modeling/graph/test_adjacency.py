"""The graph that attention makes equals a loop over pairs, never looks ahead, and has no more edges than it may."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.configuration.graph_edges_config import AdjacencyConfig
from graft.modeling.graph.adjacency import AttentionAdjacency, bound_on_edges
from graft.modeling.graph.attention_edges import attend_with_edges, attention_edges
from graft.modeling.graph.attention_rows import ScoredPairs


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def learned_scores(learned, a):
    inner = [
        max(0.0, float(learned.up.bias[w]) + sum(float(learned.up.weight[w, h]) * a[h] for h in range(len(a))))
        for w in range(len(learned.up.bias))
    ]
    return [
        float(learned.down.bias[g]) + sum(float(learned.down.weight[g, w]) * inner[w] for w in range(len(inner)))
        for g in range(len(learned.down.bias))
    ]


def combined_row(adjacency, weights, seen):
    """{j: [a combined weight for each graph]} of one row; `weights` {j: [a weight for each head]}."""
    config, per_head = adjacency.options, adjacency.per_head
    if config.combine == "learned":
        scores = {j: learned_scores(adjacency.learned, weights[j]) for j in seen}
        if config.learned_activation == "sigmoid":
            return {j: [sigmoid(s) for s in scores[j]] for j in seen}
        totals = [sum(math.exp(scores[j][g]) for j in seen) for g in range(len(next(iter(scores.values()))))]
        return {j: [math.exp(s) / total for s, total in zip(scores[j], totals, strict=True)] for j in seen}
    if config.combine == "any":
        near = {j: [sigmoid((a - config.threshold) / config.temperature) for a in weights[j]] for j in seen}
        return near if per_head else {j: [max(near[j])] for j in seen}
    if per_head:
        return {j: weights[j] for j in seen}
    if config.combine == "mean":
        return {j: [sum(weights[j]) / len(weights[j])] for j in seen}
    return {j: [min(1.0, sum(weights[j]))] for j in seen}


def final(value, i, j, count, config):
    if config.distance == "near":
        value *= (1 + i - j) ** -config.distance_strength
    elif config.distance == "far":
        value *= ((1 + i - j) / count) ** config.distance_strength
    if config.sharpness is not None:
        value = sigmoid(config.sharpness * (value - config.threshold))
    if config.cutoff is not None and value <= config.cutoff:
        return 0.0
    return 0.0 if i == j and not config.self_loops else value


def by_loops(query, key, scaling, real, adjacency):
    """(batch, graphs, source, source) from (batch, heads, source, head_dim); `real` (batch, source) hides padding."""
    config, (batch, heads, source, _) = adjacency.options, query.shape
    graph = torch.zeros(batch, heads if adjacency.per_head else 1, source, source, dtype=torch.float64)
    for b in range(batch):
        for i in range(source):
            seen = [j for j in range(i + 1) if real[b, j]]
            weights = {j: [] for j in seen}
            for h in range(heads):
                exps = {j: math.exp(scaling * float(query[b, h, i] @ key[b, h, j])) for j in seen}
                for j in seen:
                    weights[j].append(exps[j] / sum(exps.values()))
            for j, values in combined_row(adjacency, weights, seen).items() if seen else []:
                for g, value in enumerate(values):
                    graph[b, g, i, j] = final(value, i, j, len(seen), config)
            if config.normalises_rows and seen:
                square = (graph[b, :, i] ** 2).sum(-1, keepdim=True) / len(seen)
                graph[b, :, i] *= adjacency.row_gain.item() / torch.sqrt(square + 1e-6)
    return graph if adjacency.per_head else graph[:, 0]


CONFIGS = {
    "shipped": {},
    "mean": {"combine": "mean", "sharpness": None, "cutoff": None},
    "mean, cut": {"combine": "mean", "sharpness": None, "cutoff": 0.2},
    "any": {"combine": "any", "sharpness": None, "cutoff": 0.5, "threshold": 0.3},
    "any, sharp": {"combine": "any", "cutoff": 0.7, "threshold": 0.3},
    "sum, no loops": {"cutoff": None, "self_loops": False},
    "far": {"distance": "far", "distance_strength": 0.7},
    "near": {"distance": "near", "cutoff": None, "sharpness": None},
    "rows": {"normalises_rows": True},
    "learned": {"combine": "learned", "learned_width": 3, "cutoff": None, "sharpness": None},
    "learned, sigmoid": {
        "combine": "learned",
        "learned_width": 3,
        "learned_activation": "sigmoid",
        "distance": "near",
    },
}
BOUNDED = [name for name, options in CONFIGS.items() if AdjacencyConfig(**options).least_weight() > 0]


def make(name, heads, per_head=False):
    torch.manual_seed(0)
    adjacency = AttentionAdjacency(AdjacencyConfig(**CONFIGS[name]), heads, per_head).double()
    for parameter in adjacency.parameters():
        torch.nn.init.normal_(parameter, mean=0.7)
    return adjacency


def random_states(seed, batch, heads, source):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, source, 5, generator=rng, dtype=torch.float64)


def dense(query, key, mask, adjacency, block_bytes=2**20):
    return attention_edges(ScoredPairs(query, key, 0.7, mask), adjacency, "dense", block_bytes).whole().weight


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@given(st.integers(0, 1000), st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3))
def test_the_graph_equals_a_loop_over_pairs(name, per_head, seed, batch, heads, source, padding):
    query, key = random_states(seed, batch, heads, source)
    real = torch.ones(batch, source, dtype=torch.bool)
    real[0, : min(padding, source - 1)] = False
    mask = torch.ones(source, source, dtype=torch.bool).tril() & real[:, None, None, :]
    adjacency = make(name, heads, per_head)
    expected = by_loops(query, key, 0.7, real, adjacency)
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(dense(query, key, mask, adjacency), expected, **close)
    if not padding:
        torch.testing.assert_close(dense(query, key, None, adjacency), expected, **close)


def as_dense(edges):
    return torch.zeros(*edges.weight.shape[:-1], edges.source, dtype=edges.weight.dtype).scatter_add(
        -1, edges.index, edges.weight
    )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_storages_blocks_and_one_pass_with_attention_give_the_same_graph_and_gradient(name, per_head):
    """Also the last rows alone, as in a generation with a cache."""
    query, key = random_states(3, 2, 3, 9)
    value = random_states(4, 2, 3, 9)[0]
    adjacency = make(name, 3, per_head)
    ways = [("dense", 2**20, False), ("dense", 1, False), ("dense", 600, True)]
    if name in BOUNDED:
        ways += [("sparse", 2**20, False), ("sparse", 600, False), ("sparse", 2**20, True), ("sparse", 600, True)]
    found = []
    for storage, block_bytes, shared in ways:
        given_query = query.clone().requires_grad_()
        pairs = ScoredPairs(given_query, key, 0.7, None)
        if shared:
            output, edges = attend_with_edges(pairs, value, 0.0, adjacency, storage, block_bytes)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.7)
            torch.testing.assert_close(output, expected)
        else:
            edges = attention_edges(pairs, adjacency, storage, block_bytes)
        graph = edges.whole().weight if storage == "dense" else as_dense(edges)
        wanted = [given_query, *adjacency.parameters()]
        found.append([graph, *torch.autograd.grad((graph**2).sum(), wanted)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-10, rtol=1e-8)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None, 6:]
    last = dense(query[:, :, 6:], key, mask, adjacency)
    torch.testing.assert_close(last, found[0][0][..., 6:, :], atol=1e-10, rtol=1e-8)


def test_values_meet_the_weights_that_dropout_leaves_and_the_graph_is_made_of_all():
    query, key = random_states(3, 1, 2, 9)
    value, adjacency = random_states(4, 1, 2, 9)[0], make("shipped", 2)
    pairs = ScoredPairs(query, key, 0.7, None)
    plain, edges = attend_with_edges(pairs, value, 0.0, adjacency, "dense", 2**20)
    dropped, same = attend_with_edges(pairs, value, 0.5, adjacency, "dense", 2**20)
    assert torch.equal(edges.whole().weight, same.whole().weight)
    assert not torch.allclose(plain, dropped)


def test_many_rows_without_a_mask_give_the_graph_of_a_mask():
    query, key = random_states(6, 1, 2, 150)
    mask = torch.ones(150, 150, dtype=torch.bool).tril()[None, None]
    one, two = (dense(query, key, each, make("shipped", 2), 2**24) for each in (None, mask))
    assert (one > 0).any()
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_no_earlier_row_and_future_edges_are_zero(name):
    query, key = random_states(4, 1, 2, 8)
    adjacency = make(name, 2)
    before = dense(query, key, None, adjacency)
    key[:, :, 5:] += 3
    query[:, :, 5:] -= 1
    after = dense(query, key, None, adjacency)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (after.triu(1) == 0).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", BOUNDED)
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.02, 3.0))
def test_no_row_has_more_edges_than_the_bound(name, per_head, seed, heads, spread):
    query, key = random_states(seed, 1, heads, 40)
    adjacency = make(name, heads, per_head)
    graph = dense(spread * query, key, None, adjacency)
    assert int((graph > 0).sum(-1).max()) <= adjacency.bound


@pytest.mark.parametrize(
    ("options", "heads", "per_head", "expected"),
    [
        ({}, 8, False, 56),  # a* = 0.1 + ln 1.5 / 10 = 0.1405
        ({}, 24, False, 170),
        ({}, 8, True, 7),
        ({"combine": "mean"}, 8, False, 7),
        ({"sharpness": None, "cutoff": 0.25}, 3, False, 12),
        ({"combine": "any", "sharpness": None, "cutoff": 0.5, "threshold": 0.3}, 3, False, 9),
        ({"combine": "any", "sharpness": None, "cutoff": 0.5, "threshold": 0.3}, 3, True, 3),
        ({"sharpness": 1.0}, 8, False, 15),
        ({"sharpness": 0.1}, 8, False, 0),  # a* above 1
        ({"cutoff": None}, 8, False, None),
        ({"cutoff": 0.1, "threshold": 0.2}, 8, False, None),  # a* below 0
        ({"combine": "learned"}, 8, False, None),
    ],
)
def test_the_bound_follows_from_the_cut(options, heads, per_head, expected):
    assert bound_on_edges(AdjacencyConfig(**options), heads, per_head) == expected


def test_the_bound_is_reached():
    """Equal weights just above the cut make as many edges as the bound allows."""
    options = AdjacencyConfig(combine="sum", sharpness=None, cutoff=0.2499)
    weights = torch.full((1, 2, 1, 8), 1 / 8, dtype=torch.float64)
    adjacency = AttentionAdjacency(options, 2)
    graph = adjacency(weights, torch.ones(1, 1, 1, 8, dtype=torch.bool), range(7, 8))
    assert (graph > 0).sum() == adjacency.bound == 8


def test_weights_given_by_hand_are_combined_before_they_are_cut():
    weights = torch.tensor([0.1, 0.07, 0.0], dtype=torch.float64).expand(1, 2, 1, 3)
    visible = torch.tensor([True, True, False])[None, None, None]
    adjacency = AttentionAdjacency(AdjacencyConfig(combine="sum", sharpness=None, cutoff=0.15), 2)
    assert adjacency(weights, visible, range(1, 2)).tolist() == [[[0.2, 0.0, 0.0]]]


def test_a_far_token_weighs_more_or_less_as_the_option_says():
    weights = torch.full((1, 1, 1, 4), 0.25, dtype=torch.float64)
    visible = torch.tensor([False, True, True, True])[None, None, None]
    for distance, expected in (("far", [0, 3 / 3, 2 / 3, 1 / 3]), ("near", [0, 1 / 3, 1 / 2, 1])):
        options = AdjacencyConfig(sharpness=None, cutoff=None, distance=distance)
        graph = AttentionAdjacency(options, 1)(weights, visible, range(3, 4))
        assert graph[0, 0].tolist() == pytest.approx([0.25 * value for value in expected])
