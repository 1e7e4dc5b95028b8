"""Slices whose gradients are added in one place are slices like any other."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from graft.modeling.graph.pair_scores import dot_scores, grouped_scores
from graft.modeling.graph.summed_slices import SummedSlices


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=5), st.booleans(), st.booleans())
def test_values_and_gradients_are_those_of_plain_slices(places, again, uses_whole):
    """Also where a slice is computed again in the backward pass, and in a second backward pass."""
    given_states = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    states = given_states * 2
    slices = SummedSlices(states)

    def found(start: int, stop: int) -> torch.Tensor:
        return slices.take(start, stop).exp().sum()

    places = [(start, max(start, stop)) for start, stop in places]
    total = states.square().sum() if uses_whole else states.sum()
    one, two = total, total
    for start, stop in places:
        one = one + (checkpoint(found, start, stop, use_reentrant=False) if again else found(start, stop))
        two = two + states[:, start:stop].exp().sum()
    assert torch.equal(one, two)
    wanted = torch.autograd.grad(two, given_states, retain_graph=True)[0]
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(one, given_states, retain_graph=True)[0], wanted)


def test_what_needs_no_gradient_is_sliced_and_no_more():
    states = torch.randn(2, 6, 3)
    assert SummedSlices(states).take(1, 4).data_ptr() == states[:, 1:].data_ptr()
    with torch.no_grad():
        assert SummedSlices(states.requires_grad_()).take(0, 2).grad_fn is None


def test_keys_that_serve_several_heads_score_as_if_repeated():
    query, key = torch.randn(2, 6, 4, 5, dtype=torch.float64), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = dot_scores(query, key.repeat_interleave(2, dim=1), 0.3)
    torch.testing.assert_close(grouped_scores(query, key, 0.3), expected)
