"""Attention with dropout whose weights are made twice and stored never, against loops in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.attention_weights import make_attention
from graft.modeling.retro.dropped_attention import dropped_attention

MODULE = nn.Identity()


def weights_by_loops(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None, causal: bool) -> Tensor:
    """Softmax weights (batch, heads, target, source), number by number and differentiable."""
    batch, heads, target, _ = query.shape
    shared, source = key.shape[1:3]
    rows = []
    for b, h, t in itertools.product(range(batch), range(heads), range(target)):
        scores = torch.stack([scaling * query[b, h, t] @ key[b, h // (heads // shared), s] for s in range(source)])
        if causal:
            scores = scores + torch.tensor([-math.inf if s > t + source - target else 0.0 for s in range(source)])
        if visible is not None:
            mask = visible[b % visible.shape[0], 0, t % visible.shape[2]]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        rows.append(scores.softmax(0))
    return torch.stack(rows).view(batch, heads, target, source)


def revealed(query: Tensor, key: Tensor, mask: Tensor | None, seed: int, **options: object) -> Tensor:
    """The weights after dropout: what reads values that are the rows of an identity."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    torch.manual_seed(seed)
    return dropped_attention(MODULE, query, key, identity, mask, **options)[0].transpose(1, 2)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    torch.manual_seed(draw(st.integers(0, 999)))
    batch, shared, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    target, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    source = target + draw(st.integers(0, 3))
    masks = {
        "none": None,
        "shared": torch.rand(1, 1, target, source) < 0.7,
        "padding": torch.rand(batch, 1, 1, source) < 0.7,
        "added": torch.randn(batch, 1, target, source).double(),
    }
    mask = masks[draw(st.sampled_from(sorted(masks)))]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    return {
        "query": torch.randn(batch, shared * repeats, target, width).double().requires_grad_(),
        "key": torch.randn(batch, shared, source, width).double().requires_grad_(),
        "value": torch.randn(batch, shared, source, width).double().requires_grad_(),
        "mask": mask,
        "options": {
            "scaling": 0.7,
            "dropout": draw(st.sampled_from([0.1, 0.25, 0.8])),
            "is_causal": draw(st.booleans()),
            "block_scores": draw(st.sampled_from([1, 7, 24, 1 << 18])),
        },
        "seed": draw(st.integers(0, 99)),
    }


@given(cases())
def test_output_and_gradients_are_those_of_the_loops(case: dict) -> None:
    query, key, value, mask, options = (case[name] for name in ("query", "key", "value", "mask", "options"))
    causal = options["is_causal"] and mask is None and query.shape[2] > 1
    weights = weights_by_loops(query, key, 0.7, mask, causal)
    dropped = revealed(query, key, mask, case["seed"], **options).detach()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (weights / (1 - options["dropout"]))[kept], rtol=1e-4, atol=1e-9)

    factor = 65536 / (65536 - round(options["dropout"] * 65536))
    repeats = query.shape[1] // key.shape[1]
    expected = (weights * kept * factor) @ value.repeat_interleave(repeats, 1)
    torch.manual_seed(case["seed"])
    output = dropped_attention(MODULE, query, key, value, mask, **options)[0].transpose(1, 2)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    ours = torch.autograd.grad(output, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_weights_fall_at_the_rate_and_without_a_pattern(rate: float) -> None:
    query, key = torch.zeros(2, 3, 64, 4), torch.zeros(2, 3, 64, 4)
    fallen = (revealed(query, key, None, 0, scaling=1.0, dropout=rate, block_scores=4096) == 0).double()
    count = fallen.numel()
    assert abs(fallen.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / count)
    centred = (fallen - fallen.mean()).flatten()
    for shift in (1, 2, 3, 4, 64, 4096, 8192):  # within a draw of 64 bits, a row, a head, a block
        together = (centred[shift:] * centred[:-shift]).mean() / centred.var()
        assert abs(together) < 5 / math.sqrt(count)


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4).double() for _ in range(3))
    full = weights_by_loops(query, key, 0.5, None, True) @ value
    draws = [
        dropped_attention(MODULE, query, key, value, None, scaling=0.5, dropout=0.3, is_causal=True)[0].transpose(1, 2)
        for _ in range(3000)
    ]
    stacked = torch.stack(draws)
    error = stacked.std(0) / math.sqrt(len(draws))
    assert ((stacked.mean(0) - full).abs() <= 5 * error + 1e-9).all()


def test_hidden_rows_and_half_precision_stay_finite() -> None:
    visible = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    states = [torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    output = dropped_attention(MODULE, *states, visible, scaling=0.3, dropout=0.2)[0]
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(state.grad is not None and state.grad.isfinite().all() for state in states)


def test_a_training_layer_takes_it_and_an_evaluated_one_does_not() -> None:
    config = RetroConfig(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa")
    attention = make_attention(config, 0.5, is_causal=False)
    heads, shared, width = config.head_sizes
    query, key = torch.randn(1, heads, 3, width), torch.randn(1, shared, 5, width)
    value = torch.eye(5)[None, None].expand(1, shared, 5, 5)
    attention.train()
    trained = attention(query, key, value, None)[0]
    assert (trained == 0).any(), "no weight was dropped"
    attention.eval()
    assert (attention(query, key, value, None)[0] > 0).all()
