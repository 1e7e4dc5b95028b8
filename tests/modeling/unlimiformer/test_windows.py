"""Windows tile a document, give every kept token its context, and are the ones the paper's code lays."""

import math

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers

from graft.modeling.unlimiformer.windows import Window, plan_windows

WIDTHS = integers(1, 24)
OVERLAPS = floats(0, 1, exclude_max=True)


def leaves_stride(window, overlap):
    return window - 2 * int(window * overlap / 2) >= 1


def plans(window, overlap, causal):
    """The plan of each document up to four windows long."""
    if not leaves_stride(window, overlap):
        return []
    return [(length, plan_windows(length, window, overlap, causal)) for length in range(1, 4 * window + 1)]


@given(window=WIDTHS, overlap=OVERLAPS, causal=booleans())
def test_kept_ranges_tile_the_document_exactly(window, overlap, causal):
    for length, plan in plans(window, overlap, causal):
        kept = [token for part in plan for token in range(part.keep_start, part.keep_end)]
        assert kept == list(range(length))


@given(window=WIDTHS, overlap=OVERLAPS, causal=booleans())
def test_windows_keep_only_what_they_read_and_all_are_full(window, overlap, causal):
    for length, plan in plans(window, overlap, causal):
        for part in plan:
            assert 0 <= part.start <= part.keep_start < part.keep_end <= part.end <= length
            assert part.end - part.start == min(window, length)


@given(window=WIDTHS, overlap=OVERLAPS)
def test_encoder_tokens_see_the_margin_on_both_sides(window, overlap):
    margin = int(window * overlap / 2)
    for length, plan in plans(window, overlap, causal=False):
        for part in plan:
            for token in (part.keep_start, part.keep_end - 1):
                assert token - part.start >= min(margin, token)
                assert part.end - 1 - token >= min(margin, length - 1 - token)


@given(window=WIDTHS, overlap=OVERLAPS)
def test_decoder_tokens_see_two_margins_before_them(window, overlap):
    margin = int(window * overlap / 2)
    for _, plan in plans(window, overlap, causal=True):
        for part in plan:
            assert part.keep_start - part.start >= min(2 * margin, part.keep_start)


@given(window=WIDTHS, overlap=OVERLAPS, causal=booleans())
def test_count_of_windows_follows_the_formula(window, overlap, causal):
    stride = window - 2 * int(window * overlap / 2)
    for length, plan in plans(window, overlap, causal):
        assert len(plan) == (1 if length <= window else 1 + math.ceil((length - window) / stride))


@given(window=WIDTHS, overlap=OVERLAPS, causal=booleans())
def test_plan_equals_the_naive_definition(window, overlap, causal):
    stride, margin = window - 2 * int(window * overlap / 2), int(window * overlap / 2)
    for length, plan in plans(window, overlap, causal):
        naive, done = [], 0
        start = 0
        while start + window < length:  # each keeps all from where the one before stopped
            stop = start + window - (0 if causal else margin)
            naive.append(Window(start, start + window, done, stop))
            done, start = stop, start + stride
        naive.append(Window(max(0, length - window), length, done, length))
        assert plan == naive


@given(window=integers(2, 24), overlap=OVERLAPS, causal=booleans())
def test_kept_ranges_are_those_of_the_specified_table(window, overlap, causal):
    margin = int(window * overlap / 2)
    stride = window - 2 * margin
    for length, plan in plans(window, overlap, causal):
        last = len(plan) - 1
        for j, part in enumerate(plan):
            if last == 0:
                expected = (0, length)
            elif causal:
                expected = (0 if j == 0 else window + (j - 1) * stride, length if j == last else window + j * stride)
            else:
                first_kept = 0 if j == 0 else j * stride + margin
                expected = (first_kept, length if j == last else j * stride + window - margin)
            assert (part.keep_start, part.keep_end) == expected


@pytest.mark.parametrize(("length", "window", "overlap"), [(0, 4, 0.5), (-1, 4, 0.0), (9, 2, 1.0), (9, 4, 1.5)])
def test_empty_documents_and_overlaps_without_stride_are_refused_by_name(length, window, overlap):
    with pytest.raises(ValueError, match=rf"`length`.*`overlap`.*got {length} and {overlap} of window {window}"):
        plan_windows(length, window, overlap, causal=False)
