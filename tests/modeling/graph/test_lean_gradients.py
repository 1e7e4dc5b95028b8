"""The norm and the rotation of Llama: the stock numbers forward, the stock gradients backward, in fewer steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from graft.modeling.graph.lean_gradients import LeanRMSNorm, normed_by, rms_normed, rotated


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def naive_norm(states, gain, eps):
    rows = []
    for row in states.flatten(0, -2):
        rows.append(gain * row / (sum(x * x for x in row) / len(row) + eps) ** 0.5)
    return torch.stack(rows).view_as(states)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_the_norm_and_its_gradients_equal_the_loop(batch, source, width, transposed):
    states, gain = draw(batch, source, width), draw(width, seed=1)
    given_states = states.transpose(0, 1) if transposed else states
    weights = draw(*given_states.shape, seed=2).detach()
    one, other = rms_normed(given_states, gain, 1e-3), naive_norm(given_states, gain, 1e-3)
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    found, expected = (torch.autograd.grad((each * weights).sum(), [states, gain]) for each in (one, other))
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


def test_each_group_has_a_gain_of_its_own():
    states, gain = draw(2, 3, 4, 5), draw(3, 1, 5, seed=1)
    made = rms_normed(states, gain, 1e-3)
    for group in range(3):
        expected = naive_norm(states[:, group], gain[group, 0], 1e-3)
        torch.testing.assert_close(made[:, group], expected, atol=1e-10, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda *each: rms_normed(*each, 1e-3), (states, gain))
    assert torch.autograd.gradcheck(lambda each: rms_normed(each, gain.detach(), 1e-3), (states,))
    assert torch.autograd.gradcheck(lambda each: rms_normed(states.detach(), each, 1e-3), (gain,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_and_rotation_are_the_stock_ones_bit_for_bit(dtype):
    states = draw(2, 9, 24, dtype=dtype)
    lean, stock = LeanRMSNorm(24, 1e-5).to(dtype), LlamaRMSNorm(24, 1e-5).to(dtype)
    with torch.no_grad():
        lean.weight.copy_(stock.weight.copy_(draw(24, seed=1)))
    assert torch.equal(lean(states), stock(states))
    query, key = draw(2, 4, 9, 6, dtype=dtype), draw(2, 2, 9, 6, seed=1, dtype=dtype)
    table = [draw(1, 9, 6, seed=seed, dtype=dtype).detach() for seed in (2, 3)]
    for one, other in zip(rotated(query, key, *table), apply_rotary_pos_emb(query, key, *table), strict=True):
        assert torch.equal(one, other)


def test_the_rotation_has_the_stock_gradients():
    """Also where cosine and sine of the two halves differ, which those of Llama do not."""
    query, key = draw(2, 9, 4, 6).transpose(1, 2), draw(2, 2, 9, 6, seed=1)
    table = [draw(1, 9, 6, seed=seed).detach() for seed in (2, 3)]
    weights = [draw(*each.shape, seed=4).detach() for each in (query, key)]
    found = []
    for rotate in (rotated, apply_rotary_pos_emb):
        made = rotate(query, key, *table)
        total = sum((each * weight).sum() for each, weight in zip(made, weights, strict=True))
        found.append(torch.autograd.grad(total, [query, key]))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-12)


def test_norms_of_narrow_states_run_in_float32():
    states, gain = 100 * draw(1, 2, 3, 40, dtype=torch.float16), draw(2, 1, 40, seed=1, dtype=torch.float16)
    found = normed_by(states, gain, 1e-6)
    assert found.dtype == torch.float16
    wide = rms_normed(states.float(), gain.float(), 1e-6)
    torch.testing.assert_close(found.float(), wide, atol=1e-2, rtol=1e-2)
