"""Attention to keys that an index offers: naive loops over the candidates, exact search where all are offered."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers

from graft.modeling.unlimiformer import indexed_attention as indexed_module
from graft.modeling.unlimiformer.indexed_attention import indexed_attention
from graft.modeling.unlimiformer.knn_attention import KeyChoice, knn_attention

SEEDS = integers(0, 2**32 - 1)


def random_case(seed, count=3, source=9, documents=2, heads=2, dim=4):
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(documents, heads, count, dim, dtype=torch.float64, generator=rng)
    keys, values = torch.randn(2, documents, heads, source, dim, dtype=torch.float64, generator=rng)
    return query, keys, values, rng


def random_offers(rng, shape, source, offered):
    """An index that offers other keys to each query, each once, in any order, -1 for some."""
    ids = torch.rand(*shape, source, generator=rng).argsort(-1)[..., :offered]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.2, -1)
    return ids, (lambda queries, count: ids, offered)


def all_offered(source):
    return (lambda queries, count: torch.arange(count).flip(0).expand(*queries.shape[:3], count)), source


def naive_kept(scores, candidates, visible, keys_per_query, sinks):
    """Ids kept of one query: the visible sinks, then the best of what was offered."""
    ids = [j for j in range(len(scores)) if visible[j] and (j in candidates or j < sinks)]
    return sorted(ids, key=lambda j: (j >= sinks, -float(scores[j])))[:keys_per_query]


@given(
    seed=SEEDS,
    count=integers(1, 3),
    source=integers(2, 9),
    offered=integers(1, 9),
    keys_per_query=integers(1, 8),
    sinks=integers(0, 3),
    capped=booleans(),
)
def test_it_equals_naive_loops_over_the_candidates(seed, count, source, offered, keys_per_query, sinks, capped):
    query, keys, values, rng = random_case(seed, count, source)
    offered, keys_per_query = min(offered, source), min(keys_per_query, source)
    choice = KeyChoice(keys_per_query, min(sinks, keys_per_query), 2.0 if capped else None)
    ids, offers = random_offers(rng, (2, 2, count), source, offered)
    visible = torch.rand(2, 1, count, source, generator=rng) < 0.8
    seen = []
    output, total = indexed_attention(
        query, keys, values, choice, offers, visible, observe=lambda *block: seen.append(block)
    )
    [(start, weights, kept_ids, mass, recall)] = seen
    assert start == 0
    for d, h, i in itertools.product(range(2), range(2), range(count)):
        raw = keys[d, h] @ query[d, h, i]
        scores = 2.0 * (raw / 2.0).tanh() if capped else raw
        may = visible[d, 0, i]
        kept = naive_kept(raw, ids[d, h, i].tolist(), may, keys_per_query, choice.sinks)
        exact = naive_kept(raw, range(source), may, keys_per_query, choice.sinks)
        found = len(set(kept) & set(exact)) / len(exact) if exact else 1.0
        assert abs(float(recall[d, h, i]) - found) < 1e-6
        if not kept:
            assert not bool(output[d, h, i].any())
            assert float(total[d, h, i]) == -torch.inf
            continue
        torch.testing.assert_close(output[d, h, i], scores[kept].softmax(0) @ values[d, h, kept])
        torch.testing.assert_close(total[d, h, i], scores[kept].logsumexp(0))
        share = scores[kept].exp().sum() / scores[may].exp().sum()
        torch.testing.assert_close(mass[d, h, i], share)
        assert {j for j, w in zip(kept_ids[d, h, i].tolist(), weights[d, h, i], strict=True) if w > 0} == set(kept)


@given(seed=SEEDS, keys_per_query=integers(1, 9), sinks=integers(0, 2), hides=booleans())
def test_where_all_keys_are_offered_it_is_exact_search(seed, keys_per_query, sinks, hides):
    query, keys, values, rng = random_case(seed)
    choice = KeyChoice(keys_per_query, min(sinks, keys_per_query))
    visible = (torch.rand(2, 1, 1, 9, generator=rng) < 0.7) if hides else None
    expected = knn_attention(query, keys, values, choice, visible)
    found = indexed_attention(query, keys, values, choice, all_offered(9), visible)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sinks", [0, 2])
def test_blocks_of_queries_change_nothing(monkeypatch, sinks):
    query, keys, values, rng = random_case(4, count=7)
    choice, visible = KeyChoice(3, sinks), torch.rand(2, 2, 7, 9, generator=rng) < 0.7
    ids, _ = random_offers(rng, (2, 2, 7), 9, 5)
    asked = []

    def search(queries, count):
        places = [row for row in range(7) if bool((query[0, 0, row] == queries[0, 0]).all(-1).any())]
        asked.append(places)
        return ids[:, :, places]

    whole = indexed_attention(query, keys, values, choice, (search, 5), visible)
    monkeypatch.setattr(indexed_module, "SCORES_BYTES", 2 * 2 * (5 + sinks) * 4 * 8 * 3)
    blocked = indexed_attention(query, keys, values, choice, (search, 5), visible)
    assert asked == [list(range(7)), [0, 1, 2], [3, 4, 5], [6]]
    for ours, theirs in zip(blocked, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_queries_chosen_keys_and_values_have_the_gradients_of_exact_search():
    inputs = random_case(6)[:3]
    both = []
    for attend in (knn_attention, lambda *given: indexed_attention(*given, all_offered(9))):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output, total = attend(*leaves, KeyChoice(3))
        (output.square().sum() + total.sum()).backward()
        both.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_scored_as_in_exact_search(dtype):
    query, keys, values, _ = random_case(8)
    query, keys, values = query.float(), keys.to(dtype), values.to(dtype)
    expected = knn_attention(query, keys, values, KeyChoice(4))
    found = indexed_attention(query, keys, values, KeyChoice(4), all_offered(9))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_keys_that_tie_for_the_last_place_count_as_found():
    query, keys, values, _ = random_case(9)
    keys[..., 5, :] = keys[..., 4, :]
    scores = (query @ keys.transpose(-1, -2)).masked_fill(torch.arange(9) > 5, -100.0)
    seen = []
    for twin in (4, 5):
        visible = torch.tensor([twin == 4, twin == 5])
        order = scores.argsort(-1, descending=True)
        kept = [j for j in range(9) if j not in (4, 5) or bool(visible[j - 4])]
        ids = torch.tensor(kept).expand(2, 2, 3, 8)
        indexed_attention(
            query, keys, values, KeyChoice(1), (lambda q, n, ids=ids: ids, 8), None, 0.0, lambda *b: seen.append(b[4])
        )
        assert order.shape == scores.shape
    assert all(bool((recall == 1).all()) for recall in seen)
