"""Largest values of ranges, and variances, equal loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.modeling.graph.aggregation import range_maximum, row_maximum, running_maximum, variance, visible_maximum


@given(st.integers(0, 1000), st.integers(1, 19), st.integers(1, 6), st.data())
def test_the_largest_of_each_range_equals_a_loop(seed, source, rows, data):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 2, source, 3, generator=rng, dtype=torch.float64)
    first = torch.tensor([[data.draw(st.integers(0, source - 1)) for _ in range(rows)] for _ in range(2)])
    last = torch.tensor([[data.draw(st.integers(int(f), source - 1)) for f in of_row] for of_row in first])
    found = range_maximum(values, first, last)
    for b in range(2):
        for i in range(rows):
            expected = values[b, :, first[b, i] : last[b, i] + 1].amax(1)
            assert torch.equal(found[b, :, i], expected)


@given(st.integers(1, 12))
def test_the_running_maximum_is_the_range_from_key_zero(source):
    values = torch.randn(1, 2, source, 3, dtype=torch.float64, requires_grad=True)
    last = torch.arange(source)[None]
    found = running_maximum(values), range_maximum(values, torch.zeros_like(last), last)
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(each.square().sum(), values)[0] for each in found]
    torch.testing.assert_close(*gradients)


def test_the_gradient_of_a_range_goes_to_its_largest_value_once():
    values = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0], dtype=torch.float64)[None, None, :, None].requires_grad_()
    range_maximum(values, torch.tensor([[0, 2]]), torch.tensor([[4, 4]])).sum().backward()
    assert values.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]


@given(st.integers(1, 9), st.data())
def test_one_row_reads_the_range_between_its_first_and_last_key(source, data):
    values = torch.randn(2, 2, source, 3, dtype=torch.float64)
    ends = [sorted(data.draw(st.integers(0, source - 1)) for _ in range(2)) for _ in range(2)]
    mask = torch.zeros(2, 1, 1, source, dtype=torch.bool)
    for row, (first, last) in enumerate(ends):
        mask[row, ..., first : last + 1] = True
    first, last = (torch.tensor(each)[:, None] for each in zip(*ends, strict=True))
    assert torch.equal(visible_maximum(values, mask, 1), range_maximum(values, first, last))
    assert torch.equal(visible_maximum(values, None, 1), values.amax(2, keepdim=True))
    assert torch.equal(row_maximum(values, torch.zeros_like(mask)), values.amax(2, keepdim=True))


def test_the_variance_is_never_negative_and_keeps_the_dtype():
    mean = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    found = variance(torch.tensor([0.5, 4.5], dtype=torch.bfloat16), mean)
    assert found.tolist() == [0.0, 0.5]
    assert found.dtype == torch.bfloat16
