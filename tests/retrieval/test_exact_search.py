"""Exact search equals loops over vectors, also where vectors are stored in half precision or in many blocks."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers

from graft.retrieval import exact_search
from graft.retrieval.exact_search import gathered_sums, inner_products, largest, weighted_sums

SEEDS = integers(0, 2**32 - 1)
HALVES = [torch.float16, torch.bfloat16]


def naive_inner_products(queries, vectors):
    output = torch.zeros(*queries.shape[:-1], vectors.shape[-2], dtype=torch.float64)
    for place in itertools.product(*map(range, queries.shape[:-1])):
        for j in range(vectors.shape[-2]):
            output[(*place, j)] = sum(
                float(q) * float(v) for q, v in zip(queries[place], vectors[(*place[:-1], j)], strict=True)
            )
    return output


def naive_weighted_sums(weights, vectors):
    output = torch.zeros(*weights.shape[:-1], vectors.shape[-1], dtype=torch.float64)
    for place in itertools.product(*map(range, weights.shape)):
        output[place[:-1]] += float(weights[place]) * vectors[(*place[:-2], place[-1])].double()
    return output


def naive_gathered_sums(weights, ids, vectors):
    output = torch.zeros(*weights.shape[:-1], vectors.shape[-1], dtype=torch.float64)
    for b, h, i, k in itertools.product(*map(range, weights.shape)):
        output[b, h, i] += float(weights[b, h, i, k]) * vectors[b, h, ids[b, h, i, k]].double()
    return output


def random_case(seed, count=3, source=7, dim=4, kept=2):
    rng = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 3, count, dim, dtype=torch.float64, generator=rng)
    vectors = torch.randn(2, 3, source, dim, dtype=torch.float64, generator=rng)
    weights = torch.rand(2, 3, count, source, dtype=torch.float64, generator=rng)
    ids = torch.randint(0, source, (2, 3, count, kept), generator=rng)
    return queries, vectors, weights, ids


@given(seed=SEEDS, count=integers(1, 4), source=integers(1, 9), dim=integers(1, 5))
def test_inner_products_equal_naive_loops(seed, count, source, dim):
    queries, vectors, _, _ = random_case(seed, count, source, dim)
    torch.testing.assert_close(inner_products(queries, vectors), naive_inner_products(queries, vectors))


@given(seed=SEEDS, count=integers(1, 4), source=integers(1, 9), dim=integers(1, 5))
def test_weighted_sums_equal_naive_loops(seed, count, source, dim):
    _, vectors, weights, _ = random_case(seed, count, source, dim)
    torch.testing.assert_close(weighted_sums(weights, vectors), naive_weighted_sums(weights, vectors))


@given(seed=SEEDS, count=integers(1, 4), source=integers(1, 9), kept=integers(1, 5))
def test_gathered_sums_equal_naive_loops_also_where_an_id_repeats(seed, count, source, kept):
    _, vectors, weights, ids = random_case(seed, count, source, kept=kept)
    weights = weights.new_ones(ids.shape) * torch.arange(1, kept + 1)
    torch.testing.assert_close(gathered_sums(weights, ids, vectors), naive_gathered_sums(weights, ids, vectors))


@pytest.mark.parametrize("dtype", HALVES)
@given(seed=SEEDS, source=integers(1, 9))
def test_vectors_in_half_precision_are_scored_and_summed_in_the_precision_of_the_queries(dtype, seed, source):
    queries, vectors, weights, _ = random_case(seed, source=source)
    stored = vectors.to(dtype)
    scores, sums = inner_products(queries.float(), stored), weighted_sums(weights.float(), stored)
    assert scores.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(scores.double(), naive_inner_products(queries.float(), stored), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.double(), naive_weighted_sums(weights.float(), stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@given(seed=SEEDS, kept=integers(1, 9))
def test_gathered_sums_of_half_precision_vectors_err_by_their_rounding_only(dtype, seed, kept):
    _, vectors, _, ids = random_case(seed, source=9, kept=kept)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    stored = vectors.to(dtype)
    sums = gathered_sums(weights, ids, stored)
    assert sums.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps * float(stored.abs().max())
    assert (sums.double() - naive_gathered_sums(weights, ids, stored)).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("source", [3, 4, 5, 11])
def test_the_size_of_blocks_changes_nothing(monkeypatch, dtype, source):
    queries, vectors, weights, _ = random_case(0, source=source)
    stored = vectors.to(dtype)
    whole = inner_products(queries, stored), weighted_sums(weights, stored)
    monkeypatch.setattr(exact_search, "BLOCK_ROWS", 4)
    torch.testing.assert_close(inner_products(queries, stored), whole[0])
    torch.testing.assert_close(weighted_sums(weights, stored), whole[1])


@pytest.mark.parametrize("right_is_faster", [True, False])
@given(seed=SEEDS, count=integers(1, 6), source=integers(1, 9))
def test_the_order_of_the_product_changes_nothing(right_is_faster, seed, count, source):
    queries, vectors, _, _ = random_case(seed, count, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_search, "LONG", 5)
        patch.setattr(exact_search, "RIGHT_IS_FASTER", right_is_faster)
        torch.testing.assert_close(inner_products(queries, vectors), naive_inner_products(queries, vectors))


def naive_largest(scores, kept):
    """Sorted values of the `kept` largest of each row; NaN counts as the largest."""
    rows = scores.reshape(-1, scores.shape[-1]).tolist()
    ranked = [sorted(row, key=lambda score: math.inf if math.isnan(score) else score) for row in rows]
    return torch.tensor([row[len(row) - kept :] for row in ranked], dtype=scores.dtype).view(*scores.shape[:-1], kept)


SELECTIONS = {
    "numpy": {"FEW_THREADS": 64, "SELECTED_AT_ONCE": 64},
    "torch": {"FEW_THREADS": 0},
    "groups of torch": {"FEW_THREADS": 0, "MANY": 0, "GROUP": 3},
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@given(seed=SEEDS, source=integers(1, 40), kept=integers(1, 40), levels=integers(1, 30))
def test_the_largest_are_those_of_a_full_sort_also_on_ties(dtype, selection, seed, source, kept, levels):
    rng = torch.Generator().manual_seed(seed)
    kept = min(kept, source)
    scores = torch.randint(0, levels, (2, 3, source), generator=rng).to(dtype)  # few levels: many ties
    scores[scores == 0] = -torch.inf
    scores[0] += torch.rand(3, source, generator=rng).to(dtype)  # rows with and without ties in one call
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SELECTIONS[selection].items():
            patch.setattr(exact_search, name, value)
        best, ids = largest(scores, kept)
    assert best.dtype == dtype
    assert best.shape == ids.shape == (2, 3, kept)
    assert torch.equal(best, scores.gather(-1, ids))
    assert torch.equal(best.sort().values, naive_largest(scores, kept).sort().values)
    assert all(len(set(row)) == kept for row in ids.flatten(0, -2).tolist())


@given(seed=SEEDS, source=integers(8, 70), share=floats(0.0, 1.0), levels=integers(1, 30))
def test_the_largest_lie_in_the_groups_with_the_largest(seed, source, share, levels):
    rng = torch.Generator().manual_seed(seed)
    kept = max(1, int(share * (source // exact_search.GROUP)))
    scores = torch.randint(0, levels, (2, source), generator=rng).double() + torch.rand(2, 1, generator=rng)
    best, ids = exact_search._largest_of_groups(scores, kept)
    assert torch.equal(best, scores.gather(-1, ids))
    assert torch.equal(best.sort().values, naive_largest(scores, kept))
    assert all(len(set(row)) == kept for row in ids.tolist())


def test_long_rows_are_selected_from_by_groups(monkeypatch):
    monkeypatch.setattr(exact_search, "FEW_THREADS", 0)
    topk, sizes = exact_search._topk, []

    def noting(scores, kept):
        sizes.append(scores.shape[-1])
        return topk(scores, kept)

    monkeypatch.setattr(exact_search, "_topk", noting)
    largest(torch.rand(32771), 1024)
    largest(torch.rand(32767), 2)
    largest(torch.rand(32771), 1025)
    assert sizes == [4096, 8 * 1024 + 3, 32767, 32771]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_score_that_is_no_number_is_kept_so_that_it_shows(selection, monkeypatch):
    for name, value in SELECTIONS[selection].items():
        monkeypatch.setattr(exact_search, name, value)
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    scores = torch.cat([scores, -torch.rand(2, 30)], dim=-1)
    best, ids = largest(scores, 2)
    assert best.isnan().tolist() == [[True, False], [False, False]]
    assert [sorted(row) for row in ids.tolist()] == [[1, 2], [0, 1]]


def test_gradients_reach_the_largest_scores_only():
    scores = torch.tensor([0.0, 3.0, 2.0, 1.0], requires_grad=True)
    largest(scores, 2)[0].sum().backward()
    assert scores.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_gradients_reach_queries_weights_and_vectors():
    queries, vectors, weights, ids = random_case(1)
    few = torch.rand(ids.shape, dtype=torch.float64)
    for tensor in (queries, vectors, weights, few):
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(inner_products, (queries, vectors))
    assert torch.autograd.gradcheck(weighted_sums, (weights, vectors))
    assert torch.autograd.gradcheck(lambda w, v: gathered_sums(w, ids, v), (few, vectors))
