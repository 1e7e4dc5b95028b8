"""Weights between chunks: the equation against a loop, and that nothing later, nor the own chunk, moves a row."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.graphs.knowledge_graph.chunk_weights import (
    chunk_weights,
    entities_of_chunks,
    graph_report,
    text_chunk_weights,
)
from graft.graphs.knowledge_graph.entity_extractors import CapitalisedExtractor

SENTENCE = st.lists(st.integers(0, 6), min_size=1, max_size=3)
CHUNKS = st.lists(st.lists(SENTENCE, max_size=3), max_size=7)


def naive(chunks, neighbours, own, causal, related):
    """The module's equation, counted anew for every row."""
    count = len(chunks)
    result = np.zeros((count, count))
    for row in range(count):
        result[row, row] = own
        if row == 0:
            continue
        known = chunks[:row] if causal else chunks
        asked = {e for sentence in chunks[row - 1 if causal else row] for e in sentence}
        sentences = [set(sentence) for chunk in known for sentence in chunk]
        scores = {}
        for b in range(row):
            scores[b] = 0.0
            for f in {f for sentence in chunks[b] for f in sentence}:
                for e in asked:
                    of_chunks = sum(any(e in sentence for sentence in chunk) for chunk in known)
                    idf = math.log((1 + len(known)) / (1 + of_chunks)) + 1
                    if e == f:
                        scores[b] += idf
                        continue
                    both = sum({e, f} <= s for s in sentences)
                    if related and both:
                        x, y, n = sum(e in s for s in sentences), sum(f in s for s in sentences), len(sentences)
                        share = 1.0 if both == n else math.log(both * n / (x * y)) / -math.log(both / n)
                        scores[b] += idf * max(share, 0.0)
        kept = sorted(scores, key=lambda b: (-round(scores[b], 9), -b))[:neighbours]
        total = sum(scores[b] for b in kept)
        for b in kept:
            result[row, b] = scores[b] / total if total else 0.0
    return result


@given(CHUNKS, st.integers(1, 4), st.booleans(), st.booleans())
def test_weights_equal_a_loop(chunks, neighbours, causal, related):
    found = chunk_weights(chunks, neighbours, 0.5, causal, related)
    np.testing.assert_allclose(found, naive(chunks, neighbours, 0.5, causal, related), atol=1e-6)


@given(CHUNKS.filter(bool), st.data())
def test_a_causal_row_knows_nothing_of_its_own_chunk_or_later_ones(chunks, data):
    row = data.draw(st.integers(0, len(chunks) - 1))
    other = data.draw(st.lists(st.lists(SENTENCE, max_size=3), min_size=len(chunks) - row, max_size=len(chunks) - row))
    before, after = chunk_weights(chunks), chunk_weights([*chunks[:row], *other])
    np.testing.assert_array_equal(before[: row + 1], after[: row + 1])


@given(CHUNKS, st.integers(0, 8), st.integers(1, 4), st.booleans())
def test_chunks_out_of_sight_are_known_and_not_read(chunks, first, neighbours, causal):
    every = chunk_weights(chunks, len(chunks) + 1, 0.5, causal)  # before the cut to `neighbours`, up to a row's factor
    found = chunk_weights(chunks, neighbours, 0.5, causal, first=first)
    assert not found[:first].any()
    assert not found[:, :first].any()
    for row in range(first, len(chunks)):
        scores = every[row, first:row].astype(float)
        kept = sorted(range(len(scores)), key=lambda b: (-round(scores[b], 6), -b))[:neighbours]
        total = scores[kept].sum()
        expected = np.zeros_like(scores)
        expected[kept] = scores[kept] / total if total else 0.0
        assert found[row, row] == 0.5
        if len({round(score, 5) for score in scores}) == len(scores):  # of equal ones, rounding would choose
            np.testing.assert_allclose(found[row, first:row], expected, atol=1e-5)


@given(CHUNKS, st.integers(1, 3), st.booleans())
def test_rows_are_what_a_chunk_graph_takes(chunks, neighbours, causal):
    weights = chunk_weights(chunks, neighbours, causal=causal)
    assert weights.dtype == np.float32
    assert weights.shape == (len(chunks), len(chunks))
    assert (weights >= 0).all()
    assert not np.triu(weights, 1).any()
    below = np.tril(weights, -1)
    assert ((below > 0).sum(1) <= neighbours).all()
    assert all(total == 0 or total == pytest.approx(1, abs=1e-6) for total in below.sum(1))


TEXTS = [
    "They met Ada Lovelace in London. She wrote to Charles Babbage.",
    "Nothing happened then, and it rained.",
    "A letter of Lovelace came.",
    "People spoke of it for long.",
]


def test_a_chunk_reads_what_names_the_same():
    weights = text_chunk_weights(TEXTS, CapitalisedExtractor(), own=0.0)
    assert weights[3, 0] > 0  # chunk 2 named Lovelace last
    assert weights[3, 1] == 0
    assert text_chunk_weights(TEXTS, CapitalisedExtractor(), own=0.0, causal=False)[2].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("changed", range(4))
def test_from_text_too_a_changed_chunk_leaves_earlier_rows_and_its_own_alone(changed):
    texts = list(TEXTS)
    texts[changed] = "In Paris one met Ada Lovelace, Charles Babbage and George Boole."
    before, after = (text_chunk_weights(each, CapitalisedExtractor()) for each in (TEXTS, texts))
    np.testing.assert_array_equal(before[: changed + 1], after[: changed + 1])
    if changed == 1:
        assert not np.array_equal(before, after)


def test_entities_stand_by_sentence():
    found = entities_of_chunks(TEXTS, CapitalisedExtractor())
    assert [len(chunk) for chunk in found] == [2, 0, 1, 0]
    assert found[2][0][0] in found[0][0]


def test_the_report_counts_what_acts():
    weights = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=np.float32)
    assert graph_report(weights) == {"chunks": 3.0, "coverage": 0.5, "density": pytest.approx(1 / 3)}


@pytest.mark.parametrize(("name", "value"), [("neighbours", 0), ("own", -1.0), ("own", float("nan")), ("first", -1)])
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        chunk_weights([[[0]]], **{name: value})
