"""PNA attention on transformed edges equals loops, whichever way its extremes are found."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from graft.modeling.graph.edge_transforms import edge_weights
from graft.modeling.graph.pna_edges import (
    LlamaAttentionPNAVector,
    extremes_of_all,
    extremes_of_few,
    most_edges,
    pna_class,
)


def build(heads=4, groups=2, head_dim=6, attention="pna", **options):
    torch.manual_seed(0)
    config = LlamaGNNConfig(
        hidden_size=heads * 6,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_hidden_layers=1,
        gnn_config={"attention": attention, "mlp_ratio": 2, **options},
    )
    config._attn_implementation = "sdpa"
    module = pna_class(config.gnn_config)(config, 0).double().eval()
    for name, parameter in module.named_parameters():
        if "threshold" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return module


def states_and_table(module, batch, source, seed=1):
    width, d = module.config.hidden_size, module.head_dim
    states = torch.randn(batch, source, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return states, (torch.ones(1, source, d).double(), torch.zeros(1, source, d).double())  # no rotation


def aggregates_by_hand(module, weights, values, own, whole_vectors):
    """s, m, max, min, var of one row and head."""
    total = sum(w * v for w, v in zip(weights, values, strict=True))
    degree = weights.sum() if weights.sum() != 0 else 1.0
    mean = total / degree
    second = sum(w * v**2 for w, v in zip(weights, values, strict=True)) / degree
    variance = (second - mean**2) * (second > mean**2)
    if whole_vectors:
        t = module.options.edges.threshold
        chosen = sorted((v for w, v in zip(weights, values, strict=True) if w > t), key=lambda v: v.norm().item())
        return total, mean, chosen[-1] if chosen else own, chosen[0] if chosen else own, variance
    chosen = [v for w, v in zip(weights, values, strict=True) if w > 0]
    if not chosen:
        return total, mean, 0 * own, 0 * own, variance
    return total, mean, torch.stack(chosen).amax(0), torch.stack(chosen).amin(0), variance


def by_loops(module, states, visible):
    """Row by row; `visible` (batch, source, source)."""
    batch, source, _ = states.shape
    d, output, options = module.head_dim, [], module.options
    whole = isinstance(module, LlamaAttentionPNAVector)
    for b in range(batch):
        q, k, v = (states[b] @ each.weight.T for each in (module.q_proj, module.k_proj, module.v_proj))
        for i in range(source):
            heads, seen = [], visible[b, i].nonzero().flatten()
            for h in range(module.config.num_attention_heads):
                group = h // module.num_key_value_groups
                part = slice(group * d, (group + 1) * d)
                scores = k[seen, part] @ q[i, h * d : (h + 1) * d] / math.sqrt(d)
                weights = scores.softmax(0) if options.normalisation == "softmax" else scores * (scores > 0)
                all_seen = torch.ones_like(weights, dtype=torch.bool)
                weights = edge_weights(weights, all_seen, options.edges, module.edges.threshold)
                s, m, high, low, var = aggregates_by_hand(module, weights, v[seen, part], v[i, part], whole)
                read = [m, high, var, low] if whole or options.aggregates == "smallest" else [s, m, high, var]
                inner = module.aggregate_up(torch.cat(read))
                update = module.aggregate_down(inner / (1 + torch.exp(-inner)))
                heads.append(m + update if module.residual_mean else update)
            output.append(module.o_proj(torch.cat(heads)))
    return torch.stack(output).unflatten(0, (batch, source))


def causal(source):
    return torch.ones(source, source, dtype=torch.bool).tril()


VARIANTS = {
    "relu": {"edges": {"transform": "relu", "threshold": 0.1}},
    "binary": {"edges": {"transform": "binary"}},
    "silu, smallest": {"edges": {"transform": "silu"}, "aggregates": "smallest"},
    "silu, trained": {"edges": {"transform": "silu", "trains_threshold": True}},
    "softplus": {"edges": {"transform": "softplus"}},
    "sigmoid": {"edges": {"transform": "sigmoid", "trains_threshold": True}},
    "top_k": {"edges": {"transform": "top_k", "fraction": 0.4, "straight_through": True}},
    "no softmax": {"normalisation": "relu"},
    "no softmax, relu": {"normalisation": "relu", "edges": {"transform": "relu", "threshold": 0.3}},
    "vector": {"attention": "pna_vector"},
    "vector, silu": {"attention": "pna_vector", "edges": {"transform": "silu", "threshold": 0.05}},
    "vector, no softmax": {"attention": "pna_vector", "normalisation": "relu", "residual_mean": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["causal", "left padding", "packed documents"])
def test_the_module_equals_a_loop_over_batch_heads_and_rows(variant, kind):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(module, 2, 8)
    visible = causal(8).expand(2, -1, -1).clone()
    if kind == "left padding":
        visible[0, :, :3] = False
        visible |= torch.eye(8, dtype=torch.bool)
    if kind == "packed documents":
        visible[:, 4:, :4] = False
    with torch.no_grad():
        expected = by_loops(module, states, visible)
        for mask in [visible[:, None]] + [None] * (kind == "causal"):
            torch.testing.assert_close(module(states, table, mask)[0], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_loop_for_blocks_of_any_size(variant):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(module, 1, 7)
    parameters = list(module.parameters())
    slow = by_loops(module, states, causal(7)[None]).square().sum()
    slow = torch.autograd.grad(slow, parameters, allow_unused=True)
    for block_bytes in (1, 2000, 2**20):
        module.options.block_bytes = block_bytes
        fast = torch.autograd.grad(module(states, table)[0].square().sum(), parameters)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-8, rtol=1e-8)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.sampled_from([*VARIANTS]))
def test_any_sizes_equal_the_loop(seed, groups, repeats, source, variant):
    module = build(groups * repeats, groups, 4, **VARIANTS[variant])
    states, table = states_and_table(module, 1, source, seed)
    with torch.no_grad():
        expected = by_loops(module, states, causal(source)[None])
        torch.testing.assert_close(module(states, table)[0], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", ["softplus", "sigmoid", "silu, trained"])
def test_smooth_variants_pass_gradcheck(variant):
    module = build(2, 1, 2, **VARIANTS[variant])
    states, table = states_and_table(module, 1, 4)
    assert torch.autograd.gradcheck(lambda s: module(s, table)[0], (states.requires_grad_(),))


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0.05, 0.9))
def test_the_few_edges_above_a_threshold_have_the_extremes_of_all(seed, source, threshold):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 2, 5, source, generator=rng, dtype=torch.float64).softmax(-1)
    weights = (weights - threshold).relu()
    values = torch.randn(2, 2, source, 3, generator=rng, dtype=torch.float64)
    most = most_edges(GNNConfig(attention="pna", edges={"transform": "relu", "threshold": threshold}), 0.0)
    assert ((weights > 0).sum(-1) <= most).all()
    for one, other in zip(extremes_of_few(weights, values, most), extremes_of_all(weights, values), strict=True):
        assert torch.equal(one, other)


def test_there_is_no_bound_on_edges_where_weights_need_not_sum_to_one_or_the_threshold_moves():
    for options in (
        {"edges": {"transform": "top_k"}},
        {"edges": {"transform": "relu", "threshold": 0}},
        {"edges": {"transform": "silu", "trains_threshold": True}},
        {"edges": {"transform": "relu"}, "normalisation": "relu"},
    ):
        assert most_edges(GNNConfig(attention="pna", **options), 0.0) is None
    options = GNNConfig(attention="pna", edges={"transform": "relu", "threshold": 0.25})
    assert (most_edges(options, 0.0), most_edges(options, 0.5)) == (4, 8)
