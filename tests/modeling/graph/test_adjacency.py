"""The graph that attention makes equals a loop over pairs, never looks ahead, and does not depend on blocks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.configuration.configuration_gnn import AdjacencyConfig
from graft.modeling.graph.adjacency import adjacency_of, attention_adjacency


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_loops(query, key, scaling, real, config):
    """The adjacency of (batch, heads, source, head_dim) queries and keys; `real` (batch, source) hides padding."""
    batch, heads, source, _ = query.shape
    graph = torch.zeros(batch, source, source, dtype=torch.float64)
    for b in range(batch):
        for i in range(source):
            seen = [j for j in range(i + 1) if real[b, j]]
            weights = []
            for h in range(heads):
                exps = {j: math.exp(scaling * float(query[b, h, i] @ key[b, h, j])) for j in seen}
                weights.append({j: value / sum(exps.values()) for j, value in exps.items()})
            for j in seen:
                a = [of_head[j] for of_head in weights]
                if config.combine == "mean":
                    value = sum(a) / heads
                elif config.combine == "sum":
                    value = min(1.0, sum(a))
                else:
                    value = max(sigmoid((x - config.threshold) / config.temperature) for x in a)
                if config.sharpness is not None:
                    value = sigmoid(config.sharpness * (value - config.threshold))
                if config.cutoff is not None and value <= config.cutoff:
                    value = 0.0
                graph[b, i, j] = 0.0 if i == j and not config.self_loops else value
    return graph


CONFIGS = {
    "shipped": {},
    "mean": {"combine": "mean", "sharpness": None, "cutoff": None},
    "mean, cut": {"combine": "mean", "sharpness": None, "cutoff": 0.2},
    "any": {"combine": "any", "sharpness": None, "cutoff": 0.5, "threshold": 0.3},
    "sum, no loops": {"cutoff": None, "self_loops": False},
}


def random_states(seed, batch, heads, source):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, source, 5, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
@given(st.integers(0, 1000), st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(0, 3))
def test_the_graph_equals_a_loop_over_pairs(name, seed, batch, heads, source, padding):
    query, key = random_states(seed, batch, heads, source)
    real = torch.ones(batch, source, dtype=torch.bool)
    real[0, : min(padding, source - 1)] = False
    mask = torch.ones(source, source, dtype=torch.bool).tril() & real[:, None, None, :]
    config = AdjacencyConfig(**CONFIGS[name])
    expected = by_loops(query, key, 0.7, real, config)
    torch.testing.assert_close(attention_adjacency(query, key, 0.7, mask, config, 2**20), expected)
    if not padding:
        torch.testing.assert_close(attention_adjacency(query, key, 0.7, None, config, 2**20), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_in_blocks_and_last_rows_alone_give_the_same_graph_and_gradient(name):
    query, key = random_states(3, 2, 3, 9)
    config = AdjacencyConfig(**CONFIGS[name])
    gradients = []
    for block_bytes in (1, 2**20):
        given_query = query.clone().requires_grad_()
        graph = attention_adjacency(given_query, key, 0.7, None, config, block_bytes)
        graph.square().sum().backward()
        gradients.append(given_query.grad)
    torch.testing.assert_close(*gradients)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None, 6:]
    last = attention_adjacency(query[:, :, 6:], key, 0.7, mask, config, 2**20)
    torch.testing.assert_close(last, graph[:, 6:].detach())


def test_many_rows_without_a_mask_give_the_graph_of_a_mask():
    query, key = random_states(6, 1, 2, 150)
    mask = torch.ones(150, 150, dtype=torch.bool).tril()[None, None]
    one, two = (attention_adjacency(query, key, 0.7, each, AdjacencyConfig(), 2**24) for each in (None, mask))
    assert (one > 0).any()
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_no_earlier_row_and_future_edges_are_zero(name):
    query, key = random_states(4, 1, 2, 8)
    config = AdjacencyConfig(**CONFIGS[name])
    before = attention_adjacency(query, key, 0.7, None, config, 2**20)
    key[:, :, 5:] += 3
    query[:, :, 5:] -= 1
    after = attention_adjacency(query, key, 0.7, None, config, 2**20)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (after.triu(1) == 0).all()


def test_a_row_of_the_sum_has_no_more_edges_than_heads_allow():
    """Weights of all heads in a row sum to the number of heads, and an edge needs 0.1405 with the default options."""
    query, key = random_states(5, 1, 3, 60)
    graph = attention_adjacency(0.1 * query, key, 0.7, None, AdjacencyConfig(), 2**20)
    assert int((graph > 0).sum(-1).max()) <= int(3 / (0.1 + math.log(1.5) / 10))


def test_weights_given_by_hand_are_combined_before_they_are_cut():
    weights = torch.tensor([0.1, 0.9], dtype=torch.float64).expand(1, 2, 1, 2)
    visible = torch.tensor([True, False])[None, None, None]
    config = AdjacencyConfig(combine="sum", sharpness=None, cutoff=0.15)
    assert adjacency_of(weights, visible, range(1, 2), config).tolist() == [[[0.2, 0.0]]]
