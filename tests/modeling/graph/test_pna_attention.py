"""PNA attention equals a loop over what each token reads: documents, padding, windows, cached or not."""

import math

import pytest
import torch
from transformers import DynamicCache, StaticCache

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.pna_attention import LlamaAttentionPNA


def build(groups=2, mlp_bias=False, **options):
    torch.manual_seed(0)
    config = LlamaGNNConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=6,
        num_hidden_layers=1,
        mlp_bias=mlp_bias,
        gnn_config={"attention": "pna", **options},
    )
    config._attn_implementation = "sdpa"
    module = LlamaAttentionPNA(config, 0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def states_and_table(batch, source):
    states = torch.randn(batch, source, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return states, (torch.ones(1, source, 6).double(), torch.zeros(1, source, 6).double())  # no rotation


def by_loops(module, states, visible):
    """Row by row; `visible` (batch, source, source)."""
    batch, source, _ = states.shape
    d, output = module.head_dim, []
    for b in range(batch):
        q, k, v = (states[b] @ each.weight.T for each in (module.q_proj, module.k_proj, module.v_proj))
        for i in range(source):
            heads = []
            seen = visible[b, i].nonzero().flatten()
            for h in range(4):
                group = h // module.num_key_value_groups
                part = slice(group * d, (group + 1) * d)
                weights = torch.softmax(k[seen, part] @ q[i, h * d : (h + 1) * d] / math.sqrt(d), 0)
                values = v[seen, part]
                mean = sum(w * value for w, value in zip(weights, values, strict=True))
                spread = sum(w * (value - mean) ** 2 for w, value in zip(weights, values, strict=True))
                read = [mean, values.max(0).values, spread, values.min(0).values]
                if module.config.gnn_config.aggregates == "sum":  # which is the mean: weights sum to 1
                    read = [mean, mean, read[1], spread]
                read = torch.cat(read)
                inner = module.aggregate_up(read)
                update = module.aggregate_down(inner / (1 + torch.exp(-inner)))
                heads.append(mean + update if module.residual_mean else update)
            output.append(module.o_proj(torch.cat(heads)))
    return torch.stack(output).unflatten(0, (batch, source))


def causal(source):
    return torch.ones(source, source, dtype=torch.bool).tril()


def kinds_of_visibility(source=9):
    padded = torch.ones(2, source, dtype=torch.bool)
    padded[0, :3] = False
    left = causal(source) & padded[:, None, :]
    document = torch.tensor([0] * 4 + [1] * (source - 4))
    window = causal(source) & (torch.arange(source)[:, None] - torch.arange(source) < 4)
    return {
        "causal": causal(source).expand(2, -1, -1),
        "left padding": left | torch.eye(source, dtype=torch.bool),
        "right padding": (causal(source) & padded.flip(1)[:, None, :]) | torch.eye(source, dtype=torch.bool),
        "packed documents": (causal(source) & (document[:, None] == document)).expand(2, -1, -1),
        "window": window.expand(2, -1, -1),
    }


VARIANTS = {
    "GQA": {},
    "MHA": {"groups": 4, "mlp_ratio": 2.0},
    "residual mean": {"residual_mean": True},
    "biases": {"mlp_bias": True},
    "with the sum": {"aggregates": "sum"},
}


@pytest.mark.parametrize("kind", kinds_of_visibility())
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_module_equals_a_loop_over_what_each_token_reads(variant, kind):
    module = build(**VARIANTS[variant])
    states, table = states_and_table(2, 9)
    visible = kinds_of_visibility()[kind]
    masks = [visible[:, None]] + ([None] if kind == "causal" else [])
    for mask in masks:
        with torch.no_grad():
            found, _ = module(states, table, mask)
            expected = by_loops(module, states, visible)
        real = torch.ones(2, 9, dtype=torch.bool)
        if kind == "right padding":  # such rows read themselves besides the tokens, which leaves a gap
            real[0, 6:] = False
        torch.testing.assert_close(found[real], expected[real], atol=1e-10, rtol=1e-9)


def test_gradients_equal_those_of_the_loop():
    module = build(residual_mean=True)
    states, table = states_and_table(1, 6)
    parameters = list(module.parameters())
    slow = by_loops(module, states, causal(6)[None]).square().sum()
    slow = torch.autograd.grad(slow, parameters)
    for mask in (None, causal(6)[None, None]):
        fast = torch.autograd.grad(module(states, table, mask)[0].square().sum(), parameters)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_one_by_one_give_what_all_at_once_gave(kind):
    module = build()
    states, table = states_and_table(2, 7)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(module.config, max_cache_len=9)
    with torch.no_grad():
        whole, _ = module(states, table)
        for i in range(7):
            mask = (torch.arange(i + 1 if kind == "dynamic" else 9) <= i)[None, None, None].expand(2, 1, 1, -1)
            row = (table[0][:, :1], table[1][:, :1])
            one, _ = module(states[:, i : i + 1], row, mask, past_key_values=cache)
            torch.testing.assert_close(one[:, 0], whole[:, i], atol=1e-12, rtol=1e-10)
