import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import booleans, integers

from graft.retrieval.corpus import neighbour_search
from graft.retrieval.corpus.neighbour_search import exact_neighbours
from graft.retrieval.corpus.sharded_rows import ShardedRows


def sharded(vectors, rng):
    cuts = np.sort(rng.integers(0, len(vectors) + 1, 2))
    return ShardedRows([part for part in np.split(vectors, cuts) if len(part)])


@given(
    seed=integers(0, 2**31),
    source=integers(1, 90),
    dim=integers(1, 12),
    k=integers(1, 12),
    many_ties=booleans(),
)
def test_neighbours_equal_brute_force_including_ties(naive_neighbours, seed, source, dim, k, many_ties):
    rng = np.random.default_rng(seed)
    draw = rng.integers(-1, 2, (source, dim)) if many_ties else rng.standard_normal((source, dim))
    vectors = draw.astype(np.float16)
    queries = vectors[rng.integers(0, source, 7)]
    ranges = np.sort(rng.integers(0, source + 1, (7, 2)), axis=1)
    ids, distances = exact_neighbours(queries, sharded(vectors, rng), k, ranges)
    expected_ids, expected = naive_neighbours(queries, vectors, k, ranges)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(distances, expected, rtol=1e-12)


@pytest.mark.parametrize("distinct", [1, 3, 4000])
def test_neighbours_among_thousands_and_their_copies_equal_brute_force(monkeypatch, distinct):
    monkeypatch.setattr(neighbour_search, "VECTOR_ROWS", 1500)  # several blocks, the last a short one
    monkeypatch.setattr(neighbour_search, "PAIRS", 700)
    rng = np.random.default_rng(distinct)
    texts = rng.standard_normal((distinct, 16)).astype(np.float16)
    vectors = texts[rng.integers(0, distinct, 4000)]
    queries = vectors[:50]
    ranges = np.stack([np.arange(50) // 10 * 10, np.arange(50) // 10 * 10 + 10], 1)
    ids, distances = exact_neighbours(queries, ShardedRows([vectors[:2500], vectors[2500:]]), 9, ranges)
    gaps = ((queries.astype(float)[:, None] - vectors.astype(float)) ** 2).sum(-1)
    for row, (start, end) in enumerate(ranges):
        gaps[row, start:end] = np.inf
    expected = np.lexsort((np.broadcast_to(np.arange(4000), gaps.shape), gaps))[:, :9]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(gaps, expected, 1), rtol=1e-12)


def test_the_number_of_workers_changes_no_bit(monkeypatch):
    monkeypatch.setattr(neighbour_search, "QUERY_ROWS", 64)
    vectors = np.random.default_rng(0).standard_normal((1000, 24)).astype(np.float16)
    one, *others = (exact_neighbours(vectors, ShardedRows([vectors]), 5, workers=n) for n in (1, 2, 3))
    for other in others:
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()


def test_what_is_not_allowed_is_found_by_nobody():
    vectors = np.arange(1, 7, dtype=np.float16)[:, None]
    allowed = np.array([True, False, True, True, False, False])
    ids, _ = exact_neighbours(vectors[1:2], ShardedRows([vectors]), 5, allowed=allowed)
    assert ids.tolist() == [[0, 2, 3, -1, -1]]


def test_rows_of_zeros_are_neither_found_nor_find():
    vectors = np.array([[1], [0], [2]], dtype=np.float16)
    ids, distances = exact_neighbours(vectors, ShardedRows([vectors]), 2)
    assert ids.tolist() == [[0, 2], [-1, -1], [2, 0]]
    assert distances.tolist() == [[0, 1], [np.inf, np.inf], [0, 1]]


def test_wrong_shapes_are_refused_by_name():
    rows = ShardedRows([np.ones((4, 3), dtype=np.float16)])
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        exact_neighbours(np.ones((1, 3)), rows, 0)
    with pytest.raises(ValueError, match=r"`queries` must be \(count, 3\) as the vectors are, got \(1, 2\)"):
        exact_neighbours(np.ones((1, 2)), rows, 1)
    with pytest.raises(ValueError, match=r"`exclude` must be \(1, 2\), .* got \(2, 2\)"):
        exact_neighbours(np.ones((1, 3)), rows, 1, np.zeros((2, 2), dtype=int))
    with pytest.raises(ValueError, match=r"`allowed` must be \(4,\), .* got \(3,\)"):
        exact_neighbours(np.ones((1, 3)), rows, 1, allowed=np.ones(3, dtype=bool))


@given(seed=integers(0, 2**31), shards=integers(1, 5))
def test_rows_in_shards_are_read_as_if_they_were_one_array(seed, shards):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 99, (rng.integers(1, 6), 3)) for _ in range(shards)]
    whole, rows = np.concatenate(parts), ShardedRows(parts)
    asked = rng.integers(0, len(whole), rng.integers(0, 9))
    assert (rows.take(asked) == whole[asked]).all()
    start, end = np.sort(rng.integers(0, len(whole) + 1, 2))
    if start < len(whole):
        assert (rows.between(start, end) == whole[start:end]).all()
    pieces = list(rows.blocks(2))
    assert (np.concatenate([block for _, block in pieces]) == whole).all()
    assert [at for at, _ in pieces] == np.cumsum([0, *(len(block) for _, block in pieces)])[:-1].tolist()
