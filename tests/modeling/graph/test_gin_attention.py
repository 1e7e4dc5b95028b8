"""GIN attention equals a loop over batch, heads and rows, in any blocks; the fused form is its special case."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.configuration.graph_edges_config import EdgeTransformConfig
from graft.modeling.graph.edge_transforms import edge_weights
from graft.modeling.graph.gin_attention import gin_class, sum_over_edges
from graft.modeling.graph.pair_scores import dot_scores
from graft.modeling.graph.per_head_mlp import PerHeadMLP
from graft.modeling.graph.visible_rows import visible_softmax


def build(heads=4, groups=2, head_dim=6, width=8, implementation="sdpa", **options):
    torch.manual_seed(0)
    config = LlamaGNNConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        num_hidden_layers=1,
        gnn_config=options,
    )
    config._attn_implementation = implementation
    module = gin_class(config.gnn_config)(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.4)
    return module


def states_and_table(module, batch, source, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, source, module.config.hidden_size, generator=rng, dtype=torch.float64)
    angles = torch.arange(source)[:, None] * torch.tensor([1.0, 0.3, 0.1][: module.head_dim // 2]).repeat(2)
    return states, (angles.cos()[None].double(), angles.sin()[None].double())


def rotate(vector, cos, sin):
    half = len(vector) // 2
    return vector * cos + torch.cat([-vector[half:], vector[:half]]) * sin


def mlp_by_hand(mlp, head, x):
    inner = x @ mlp.up_weight[head] + mlp.up_bias[head, 0]
    normed = inner / torch.sqrt((inner * inner).mean() + mlp.eps) * mlp.gain[head, 0]
    return (normed / (1 + torch.exp(-normed))) @ mlp.down_weight[head] + mlp.down_bias[head, 0]


def silu(x):
    return x / (1 + torch.exp(-x))


def scores_by_hand(module, projections, states, table, head, i, seen):
    d, group = module.head_dim, head // module.repeats
    q, k = (states @ projection.weight.T for projection in projections)
    query = rotate(q[i, head * d : (head + 1) * d], table[0][0, i], table[1][0, i])
    keys = [rotate(k[j, group * d : (group + 1) * d], table[0][0, j], table[1][0, j]) for j in seen]
    return torch.stack([query @ key for key in keys]) / math.sqrt(d)


def weights_by_hand(module, states, table, head, i, seen):
    """Before the edge transform; states (source, hidden)."""
    options = module.options
    alpha = (1.0 if module.sharpening is None else module.sharpening[0]) / options.temperature
    normalise = (lambda s: torch.softmax(s, 0)) if options.normalisation == "softmax" else (lambda s: s * (s > 0))
    if options.scores == "mlp":
        u = module.score_target.weight @ states[i] + module.score_target.bias
        hidden = [silu(u + module.score_source.weight @ states[j]) for j in seen]
        return normalise(alpha * torch.stack([h @ module.score_heads.weight[head] for h in hidden]))
    pair = (module.q_proj, module.k_proj)
    weights = normalise(alpha * scores_by_hand(module, pair, states, table, head, i, seen))
    if options.differential:
        pair = (module.second_q_proj, module.second_k_proj)
        second = normalise(alpha * scores_by_hand(module, pair, states, table, head, i, seen))
        weights = weights - module.differential_lambda[0] * second
    return weights


def by_loops(module, states, table, real):
    """y_h = MLP_h(eps_h x + T(A) x), written row by row."""
    batch, source, _ = states.shape
    heads, dx, options = module.config.num_attention_heads, module.node_width, module.options
    output = torch.zeros_like(states)
    for b in range(batch):
        for h in range(heads):
            x = states[b, :, h * dx : (h + 1) * dx]
            for i in range(source):
                if not real[b, i]:
                    continue
                seen = [j for j in range(i + 1) if real[b, j]]
                weights = weights_by_hand(module, states[b], table, h, i, seen)
                threshold = module.edges.threshold
                edges = edge_weights(weights, torch.ones_like(weights, dtype=torch.bool), options.edges, threshold)
                sent = sum(edges[place] * x[j] for place, j in enumerate(seen))
                if options.differential_norm:
                    norm = module.differential_norm
                    sent = sent / torch.sqrt((sent * sent).mean() + norm.eps) * norm.weight
                    sent = sent * (1 - 0.2)  # lambda of layer 0 begins at 0.8 - 0.6
                summed = module.epsilon[h, 0, 0] * x[i] + sent
                output[b, i, h * dx : (h + 1) * dx] = mlp_by_hand(module.update, h, summed)
    return output if module.o_proj is None else output @ module.o_proj.weight.T


VARIANTS = {
    "plain": {},
    "sharpened, cooled, projected": {"sharpening": 1.4, "temperature": 0.6, "output_projection": True},
    "unsharpened": {"sharpening": None, "mlp_ratio": 2},
    "relu": {"edges": {"transform": "relu", "threshold": 0.1}},
    "softplus": {"edges": {"transform": "softplus"}},
    "trained threshold": {"edges": {"transform": "silu", "trains_threshold": True}},
    "top_k": {"edges": {"transform": "top_k", "fraction": 0.5}},
    "scaled_topk": {"edges": {"transform": "scaled_topk", "fraction": 0.5}},
    "differential": {"differential": True},
    "differential, normed": {"differential": True, "differential_norm": True},
    "differential, silu": {"differential": True, "edges": {"transform": "silu"}},
    "scored": {"scores": "mlp", "scoring_width": 8, "temperature": 0.7},
    "scored, relu": {"scores": "mlp", "scoring_width": 8, "normalisation": "relu", "edges": {"transform": "silu"}},
    "no softmax": {"normalisation": "relu"},
}
SHAPES = {"GQA": {}, "MHA": {"groups": 4}, "one group": {"groups": 1}, "narrow heads": {"head_dim": 4}}


CASES = [(shape, name) for shape in SHAPES for name in VARIANTS if shape == "GQA" or name in ("plain", "differential")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("shape", "variant"), CASES)
def test_the_module_equals_a_loop_over_batch_heads_and_rows(shape, variant, implementation):
    module = build(implementation=implementation, **SHAPES[shape], **VARIANTS[variant])
    states, table = states_and_table(module, 2, 6)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = visible | torch.eye(6, dtype=torch.bool)
    if implementation == "eager":
        mask = torch.where(mask, 0.0, -1e30).double()
        mask[mask < 0] = torch.finfo(torch.float32).min  # the stock eager softmax runs in float32
    tolerance = 1e-10 if implementation == "sdpa" or not module.is_fused else 1e-5
    if not module.is_fused and implementation == "eager":
        mask = mask.masked_fill(mask < 0, torch.finfo(torch.float64).min)
    with torch.no_grad():
        found, _ = module(states, table, mask)
        expected = by_loops(module, states, table, real)
    torch.testing.assert_close(found[real], expected[real], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_the_loop(variant):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(module, 1, 5)
    parameters = [parameter for parameter in module.parameters()]
    fast = torch.autograd.grad(module(states, table)[0].square().sum(), parameters)
    slow = by_loops(module, states, table, torch.ones(1, 5, dtype=torch.bool)).square().sum()
    slow = torch.autograd.grad(slow, parameters, allow_unused=True)
    for one, other in zip(fast, slow, strict=True):
        assert one is not None
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-8, rtol=1e-8)


def softmax_edges(query, key, scaling, options):
    """What `sum_over_edges` takes, for dot products."""

    def weights(rows, visible):
        scores = dot_scores(query[:, :, rows.start : rows.stop], key[:, :, : visible.shape[-1]], scaling)
        return edge_weights(visible_softmax(scores, visible), visible, options)

    return weights


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 9), st.integers(0, 3))
def test_without_a_transform_the_sum_is_attention(seed, heads, source, past):
    rng = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, heads, past + source, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    rows = states[0][:, :, past:]
    visible = torch.ones(1, 1, past + source, past + source, dtype=torch.bool).tril()[:, :, past:]
    edges = softmax_edges(rows, states[1], 0.6, EdgeTransformConfig())
    found = sum_over_edges(edges, states[2], visible, source, (64, 2**20))
    expected = torch.nn.functional.scaled_dot_product_attention(rows, *states[1:], visible, scale=0.6)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("variant", ["relu", "top_k", "differential, silu", "scored", "no softmax"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_give_the_same_output_and_gradients(variant, masked):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(module, 2, 9)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if masked else None
    parameters, found = list(module.parameters()), []
    for block_bytes in (1, 3000, 2**20):
        module.options.block_bytes = block_bytes
        output, _ = module(states, table, mask)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


SMOOTH = ["plain", "softplus", "trained threshold", "differential, normed", "differential, silu", "scored"]


@pytest.mark.parametrize("variant", SMOOTH)
def test_smooth_variants_pass_gradcheck(variant):
    module = build(heads=2, groups=1, head_dim=2, width=2, **VARIANTS[variant])
    states, table = states_and_table(module, 1, 4)
    assert torch.autograd.gradcheck(lambda s: module(s, table)[0], (states.requires_grad_(),))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_one_by_one_give_what_all_at_once_gave(variant, kind):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(module, 2, 7)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(module.config, max_cache_len=9)
    with torch.no_grad():
        whole, _ = module(states, table)
        for i in range(7):
            length = i + 1 if kind == "dynamic" else 9
            mask = (torch.arange(length) <= i)[None, None, None].expand(2, 1, 1, -1)
            row = (table[0][:, i : i + 1], table[1][:, i : i + 1])
            one, _ = module(states[:, i : i + 1], row, mask, past_key_values=cache)
            torch.testing.assert_close(one[:, 0], whole[:, i], atol=1e-12, rtol=1e-10)


def test_dropout_of_edges_acts_in_training_only():
    module = build(edges={"transform": "relu"}, mlp_dropout=0)
    module.attention_dropout = 0.5
    states, table = states_and_table(module, 1, 8)
    calm = module(states, table)[0]
    assert torch.equal(calm, module(states, table)[0])
    module.train()
    assert not torch.equal(calm, module(states, table)[0])


def test_each_head_has_its_own_mlp():
    mlp = PerHeadMLP(heads=3, width=4, inner=5, dropout=0.0, eps=1e-6).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    found = mlp(states)
    for head in range(3):
        for i in range(6):
            torch.testing.assert_close(found[1, head, i], mlp_by_hand(mlp, head, states[1, head, i]))


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.sampled_from([*VARIANTS]))
def test_any_sizes_equal_the_loop(seed, groups, repeats, source, variant):
    options = {**VARIANTS[variant], "scoring_width": 2 * groups}
    module = build(heads=groups * repeats, groups=groups, head_dim=2, width=3, **options)
    states, table = states_and_table(module, 1, source, seed)
    with torch.no_grad():
        expected = by_loops(module, states, table, torch.ones(1, source, dtype=torch.bool))
        torch.testing.assert_close(module(states, table)[0], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", ["plain", "differential", "relu"])
def test_shared_keys_are_keys_that_were_repeated(variant):
    few, many = build(groups=2, **VARIANTS[variant]), build(groups=4, **VARIANTS[variant])
    state = few.state_dict()
    for name in [name for name in state if "k_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(state)
    states, table = states_and_table(few, 2, 7)
    torch.testing.assert_close(few(states, table)[0], many(states, table)[0], atol=1e-12, rtol=1e-10)
