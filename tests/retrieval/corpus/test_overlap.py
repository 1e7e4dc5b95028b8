import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from graft.retrieval.corpus.neighbours import find_neighbours
from graft.retrieval.corpus.overlap import (
    longest_shared_run,
    loss_by_overlap,
    shared_ngrams,
    without_near_duplicates,
)


def naive_share(chunk, passage, n):
    grams = [tuple(passage[i : i + n]) for i in range(len(passage) - n + 1)]
    grams = [gram for gram in grams if 0 not in gram]
    known = {tuple(chunk[i : i + n]) for i in range(len(chunk) - n + 1)}
    return sum(gram in known for gram in grams) / len(grams) if grams else 0


def naive_run(chunk, passage):
    best = 0
    for i in range(len(chunk)):
        for j in range(len(passage)):
            length = 0
            while i + length < len(chunk) and j + length < len(passage):
                if chunk[i + length] != passage[j + length] or passage[j + length] == 0:
                    break
                length += 1
            best = max(best, length)
    return best


@given(seed=integers(0, 2**31), chunk_length=integers(1, 12), passage_length=integers(1, 16), n=integers(1, 4))
def test_overlaps_equal_naive_loops(seed, chunk_length, passage_length, n):
    rng = np.random.default_rng(seed)
    chunks, passages = rng.integers(0, 4, (5, chunk_length)), rng.integers(0, 4, (5, passage_length))
    pairs = list(zip(chunks.tolist(), passages.tolist(), strict=True))
    assert shared_ngrams(chunks, passages, 0, n).tolist() == pytest.approx([naive_share(*pair, n) for pair in pairs])
    assert longest_shared_run(chunks, passages, 0).tolist() == [naive_run(*pair) for pair in pairs]


def test_loss_is_reported_for_chunks_up_to_each_overlap():
    losses, overlaps = np.array([4.0, 2.0, 1.0]), np.array([0.1, 0.4, 0.9])
    rows = [(row.overlap, row.mean_loss, row.num_chunks) for row in loss_by_overlap(losses, overlaps, (0.0, 0.5, 1.0))]
    assert rows == [(0.0, None, 0), (0.5, 3.0, 2), (1.0, pytest.approx(7 / 3), 3)]
    with pytest.raises(ValueError, match="`losses` and `overlaps` must have one shape"):
        loss_by_overlap(losses, overlaps[:2])


def test_near_duplicates_are_taken_out_and_the_others_move_up():
    ids, distances = np.array([[5, 7, 9]]), np.array([[0.1, 0.2, 0.3]])
    kept, gaps = without_near_duplicates(ids, distances, np.array([[0.9, 0.1, 0.5]]), 0.5)
    assert kept.tolist() == [[7, 9, -1]]
    assert gaps.tolist() == [[0.2, 0.3, np.inf]]


def test_a_copied_document_is_no_neighbour_when_near_duplicates_are_left_out(tmp_path, build):
    texts = [" ".join(f"w{(n * 31 + d * d) % 200}" for d in range(37)) for n in range(6)]
    corpus = build(tmp_path, [*texts, texts[0]], until="embed", chunk_size=12)
    first, copy = corpus.document_range(0), corpus.document_range(6)
    found = find_neighbours(tmp_path, 2, workers=1)
    assert found.neighbours.between(*first)[:, 0].tolist() == list(range(*copy))
    with pytest.raises(ValueError, match=r"`max_overlap` must lie in 0 \.\.\. 1, got 2"):
        find_neighbours(tmp_path, 2, max_overlap=2, overwrite=True)
    filtered = find_neighbours(tmp_path, 2, max_overlap=0.5, workers=1, overwrite=True)
    rows = filtered.neighbours.between(*first)
    whole = slice(None) if corpus.last_lengths[0] >= 8 else slice(-1)  # without an 8-gram nothing is a duplicate
    assert not (rows == np.arange(*copy)[:, None])[whole].any()
    assert (rows >= 0).all()
