"""Whatever form a mask has, the same pairs are visible; blocks of rows change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from graft.modeling.graph.visible_rows import (
    in_row_blocks,
    read_range,
    triangle_softmax,
    visible_block,
    visible_rows,
    visible_softmax,
)


def masks(attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """The mask that transformers makes for "sdpa" and for "eager"."""
    made = []
    for name in ("sdpa", "eager"):
        config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        config._attn_implementation = name
        states = torch.zeros(*attention_mask.shape, 8)
        made.append(create_causal_mask(config, states, attention_mask, None))
    return made


@given(st.integers(1, 6), st.integers(0, 5), st.data())
def test_masks_of_all_forms_show_the_same_pairs_to_real_tokens(length, padding, data):
    real = torch.ones(2, length + padding, dtype=torch.long)
    real[0, :padding] = 0
    real[1, length:] = 0
    start = data.draw(st.integers(0, length + padding - 1))
    rows = range(start, data.draw(st.integers(start + 1, length + padding)))
    sizes = (length + padding, length + padding)
    for mask in masks(real):
        visible = visible_rows(mask, rows, sizes, real.device)
        if mask is None:
            assert padding == 0
            visible = visible.expand(2, -1, -1, -1)
        for row in range(2):
            for i in rows:
                if real[row, i]:
                    expected = [bool(real[row, j]) and j <= i for j in range(sizes[1])]
                    assert visible[row, 0, i - start].tolist() == expected


@given(st.integers(2, 5), st.integers(0, 4))
def test_without_a_mask_row_i_reads_keys_up_to_i_and_a_single_row_reads_all(target, room):
    """As fused attention does; keys behind are room in a static cache."""
    for rows in (target, 1):
        sizes = (rows, target + room)
        states = [torch.randn(1, 1, size, 4) for size in (rows, sizes[1], sizes[1])]
        visible = visible_rows(None, range(rows), sizes, torch.device("cpu"))
        one = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=rows > 1)
        two = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=visible)
        torch.testing.assert_close(one, two)
        first, last = read_range(None, sizes, torch.device("cpu"))
        assert first.tolist() == [[0] * rows]
        assert last.tolist() == [list(range(target)) if rows > 1 else [sizes[1] - 1]]


def test_the_range_of_a_row_runs_from_its_first_to_its_last_visible_key():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)[None, None]
    first, last = read_range(mask, (4, 4), mask.device)
    assert first.tolist() == [[1, 2, 0, 0]]
    assert last.tolist() == [[2, 2, 3, 3]]


def test_a_mask_of_another_form_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"must have 4 dimensions, got \(2, 7\).*sdpa.*eager"):
        visible_rows(torch.ones(2, 7), range(7), (7, 7), torch.device("cpu"))


@pytest.mark.parametrize("block_bytes", [1, 24, 1000])
def test_blocks_give_the_same_rows_and_gradients_and_small_ones_are_taken_one_by_one(block_bytes):
    states = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    sizes = []

    def compute(rows: range) -> torch.Tensor:
        sizes.append(len(rows))
        return states[:, rows.start : rows.stop].square()

    output = in_row_blocks(compute, 7, 8, block_bytes)
    assert torch.equal(output, states.square())
    assert max(sizes) == {1: 1, 24: 3, 1000: 7}[block_bytes]
    output.sum().backward()
    assert torch.equal(states.grad, 2 * states)


@pytest.mark.parametrize(("block_bytes", "calls"), [(150 * 8, 3), (150 * 8 - 1, 6)])
def test_many_rows_are_cut_and_computed_again_only_if_they_do_not_fit(block_bytes, calls):
    states = torch.randn(150, 3, dtype=torch.float64, requires_grad=True)
    seen = []

    def compute(rows: range) -> torch.Tensor:
        seen.append(rows)
        return states[rows.start : rows.stop].square()

    output = in_row_blocks(compute, 150, 8, block_bytes)
    output.sum().backward()
    assert torch.equal(output, states.square())
    assert torch.equal(states.grad, 2 * states)
    assert len(seen) == calls
    assert {rows.start for rows in seen} == {0, 64, 128}


def test_attention_of_a_row_that_sees_nothing_is_zero_and_others_sum_to_one():
    scores = torch.randn(1, 2, 3, 3)
    visible = torch.tensor([[True, False, False], [False] * 3, [True] * 3])[None, None]
    weights = visible_softmax(scores.clone(), visible)
    torch.testing.assert_close(weights.sum(-1)[0, 0], torch.tensor([1.0, 0.0, 1.0]))
    assert (weights[~visible.expand_as(weights)] == 0).all()
    assert visible_softmax(scores.bfloat16(), visible).dtype == torch.float32


@given(st.integers(1, 7), st.integers(0, 3), st.data())
def test_without_a_mask_the_softmax_hides_the_triangle_at_the_end_of_a_block(target, room, data):
    """Room behind the keys is that of a static cache; a single row reads all there are."""
    start = data.draw(st.integers(0, target - 1))
    rows = range(start, data.draw(st.integers(start + 1, target)))
    visible = visible_block(None, rows, (target, target + room), torch.device("cpu"))
    scores = torch.randn(2, 3, len(rows), visible.shape[-1], dtype=torch.float64, requires_grad=True)
    found = triangle_softmax(scores * 1), visible_softmax(scores * 1, visible)
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(each.square().sum(), scores)[0] for each in found]
    assert torch.equal(*gradients)
    assert triangle_softmax(scores.detach().bfloat16()).dtype == torch.float32
