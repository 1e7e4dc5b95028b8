"""Attention to the best keys, its union with ordinary attention, and both against naive loops in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, none, one_of

from graft.modeling.unlimiformer import knn_attention as knn_module
from graft.modeling.unlimiformer.knn_attention import (
    KeyChoice,
    best_keys,
    knn_attention,
    local_attention,
    merge_attention,
    normalise,
)

SEEDS = integers(0, 2**32 - 1)


def naive_kept_keys(scores, visible, keys_per_query, sinks):
    """Ids of the kept keys of one query: the visible sinks, then the best of the other visible keys."""
    ids = [j for j in range(len(scores)) if visible[j]]
    ranked = sorted(ids, key=lambda j: (j >= sinks, -float(scores[j])))
    return ranked[: len(scores) if keys_per_query is None else keys_per_query]


def naive_knn_attention(query, keys, values, choice, visible):
    output = torch.zeros(*query.shape[:3], values.shape[-1], dtype=torch.float64)
    total = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for d, h, i in itertools.product(*map(range, query.shape[:3])):
        scores = keys[d, h] @ query[d, h, i]
        kept = naive_kept_keys(scores, visible[d, h, i], choice.keys_per_query, choice.sinks)
        if kept:
            output[d, h, i] = scores[kept].softmax(0) @ values[d, h, kept]
            total[d, h, i] = scores[kept].exp().sum().log()
    return output, total


def random_case(seed, count=3, source=7, documents=2, heads=2, dim=4):
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(documents, heads, count, dim, dtype=torch.float64, generator=rng)
    keys, values = torch.randn(2, documents, heads, source, dim, dtype=torch.float64, generator=rng)
    lengths = torch.randint(1, source + 1, (documents,), generator=rng)
    return query, keys, values, lengths, rng


@given(
    seed=SEEDS,
    count=integers(1, 4),
    source=integers(1, 9),
    keys_per_query=one_of(none(), integers(1, 12)),
    sinks=integers(0, 3),
)
def test_knn_attention_equals_naive_loops(seed, count, source, keys_per_query, sinks):
    query, keys, values, lengths, _ = random_case(seed, count, source)
    choice = KeyChoice(keys_per_query, min(sinks, keys_per_query or sinks))
    by_length = torch.arange(source) < lengths[:, None]
    visible = by_length[:, None, None].expand(2, 2, count, source)
    expected = naive_knn_attention(query, keys, values, choice, visible)
    found = knn_attention(query, keys, values, choice, by_length[:, None, None])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@given(seed=SEEDS, count=integers(1, 4), source=integers(1, 9), keys_per_query=one_of(none(), integers(1, 12)))
def test_keys_hidden_from_single_queries_are_never_read(seed, count, source, keys_per_query):
    query, keys, values, _, rng = random_case(seed, count, source)
    visible = torch.rand(2, 2, count, source, generator=rng) < 0.6
    expected = naive_knn_attention(query, keys, values, KeyChoice(keys_per_query), visible)
    found = knn_attention(query, keys, values, KeyChoice(keys_per_query), visible)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@given(seed=SEEDS, excluded=integers(1, 5), sinks=integers(1, 4), keys_per_query=integers(4, 6))
def test_hidden_sinks_take_no_place_from_visible_keys(seed, excluded, sinks, keys_per_query):
    query, keys, values, _, _ = random_case(seed, 2, 9)
    visible = torch.arange(9) >= excluded
    choice = KeyChoice(keys_per_query, sinks)
    expected = naive_knn_attention(query, keys, values, choice, visible.expand(2, 2, 2, 9))
    found = knn_attention(query, keys, values, choice, visible.expand(2, 1, 1, 9))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@given(seed=SEEDS, source=integers(2, 9), keys_per_query=integers(1, 8), sinks=integers(0, 2))
def test_exactly_so_many_keys_are_kept_also_where_all_scores_tie(seed, source, keys_per_query, sinks):
    keys_per_query = min(keys_per_query, source - 1)
    sinks = min(sinks, keys_per_query)
    scores = torch.full((2, 3, source), float(seed % 7))
    best, ids = best_keys(scores, KeyChoice(keys_per_query, sinks))
    assert best.shape == ids.shape == (2, 3, keys_per_query)
    for row in ids.flatten(0, 1).tolist():
        assert len(set(row)) == keys_per_query
        assert set(range(sinks)) <= set(row)


@given(seed=SEEDS, keys_per_query=integers(1, 6))
def test_ties_leave_the_output_a_mean_of_exactly_so_many_values(seed, keys_per_query):
    _, _, values, _, rng = random_case(seed, source=7, documents=1, heads=1)
    values = torch.zeros_like(values).scatter_(-1, torch.zeros(1, 1, 7, 1, dtype=torch.long), 1.0)
    query, keys = torch.randn(1, 1, 2, 4, dtype=torch.float64, generator=rng), torch.ones(1, 1, 7, 4).double()
    _, total = knn_attention(query, keys, values, KeyChoice(keys_per_query))
    expected = query.sum(-1) + torch.tensor(float(keys_per_query), dtype=torch.float64).log()
    torch.testing.assert_close(total, expected)


@given(seed=SEEDS, count=integers(1, 9), keys_per_query=one_of(none(), integers(1, 8)), masked=booleans())
def test_blocks_of_queries_change_nothing(seed, count, keys_per_query, masked):
    query, keys, values, _, rng = random_case(seed, count, 8)
    visible = torch.rand(2, 2, count, 8, generator=rng) < 0.7 if masked else None
    whole = knn_attention(query, keys, values, KeyChoice(keys_per_query), visible)
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 2 * 2 * 8 * 8 * 2):  # one query, then two queries at a time
            patch.setattr(knn_module, "SCORES_BYTES", size)
            blocked = knn_attention(query, keys, values, KeyChoice(keys_per_query), visible)
            torch.testing.assert_close(blocked[0], whole[0])
            torch.testing.assert_close(blocked[1], whole[1])


@pytest.mark.parametrize("keys_per_query", [None, 2, 5])
def test_observers_see_every_query_once_with_weights_that_make_the_output(monkeypatch, keys_per_query):
    query, keys, values, _, _ = random_case(3, 5, 8)
    monkeypatch.setattr(knn_module, "SCORES_BYTES", 2 * 2 * 8 * 8 * 2)
    seen = []
    output, _ = knn_attention(
        query, keys, values, KeyChoice(keys_per_query), observe=lambda *block: seen.append(block)
    )
    assert [start for start, *_ in seen] == [0, 2, 4]
    for start, weights, ids, mass in seen:
        ids = torch.arange(8).expand_as(weights) if ids is None else ids
        for d, h, i in itertools.product(*map(range, weights.shape[:3])):
            scores = keys[d, h] @ query[d, h, start + i]
            made = weights[d, h, i] @ values[d, h, ids[d, h, i]]
            torch.testing.assert_close(made, output[d, h, start + i])
            share = scores.softmax(0)[ids[d, h, i]].sum()
            torch.testing.assert_close(mass[d, h, i], share)


@pytest.mark.parametrize("keys_per_query", [None, 3, 7])
def test_a_query_that_sees_no_key_gets_zeros_and_minus_infinity(keys_per_query):
    query, keys, values, _, _ = random_case(0)
    output, total = knn_attention(query, keys, values, KeyChoice(keys_per_query), torch.zeros(2, 1, 1, 7).bool())
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(total, torch.full_like(total, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys_per_query", [None, 1, 3])
def test_half_precision_memories_are_scored_exactly_and_summed_within_their_rounding(dtype, keys_per_query):
    query, keys, values, _, _ = random_case(5)
    query, keys, values = query.float(), keys.to(dtype), values.to(dtype)
    everything = torch.ones(2, 2, 3, 7, dtype=torch.bool)
    choice = KeyChoice(keys_per_query)
    expected = naive_knn_attention(query.double(), keys.double(), values.double(), choice, everything)
    output, total = knn_attention(query, keys, values, choice)
    assert output.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected[1], rtol=1e-6, atol=1e-6)
    bound = 4 * torch.finfo(dtype).eps * float(values.abs().max())
    assert (output.double() - expected[0]).abs().max() <= bound


@pytest.mark.parametrize("choice", [KeyChoice(), KeyChoice(2), KeyChoice(5, 2)])
@pytest.mark.parametrize("count", [1, 6])  # few queries gather their values, many multiply all of them
def test_gradients_of_knn_attention_are_those_of_its_value(choice, count):
    query, keys, values, lengths, _ = random_case(2, count=count)
    visible = (torch.arange(7) < lengths.clamp(min=5)[:, None])[:, None, None]
    inputs = [tensor.requires_grad_(True) for tensor in (query, keys, values)]
    assert torch.autograd.gradcheck(lambda q, k, v: knn_attention(q, k, v, choice, visible), inputs)


def test_dropout_zeroes_weights_and_scales_the_others_but_leaves_the_total():
    query, keys, _, _, _ = random_case(1, count=40, source=50)
    torch.manual_seed(0)
    ones = torch.ones(2, 2, 50, 4, dtype=torch.float64)
    dropped, total = knn_attention(query, keys, ones, KeyChoice(), dropout=0.5)
    assert torch.equal(total, knn_attention(query, keys, ones, KeyChoice())[1])
    assert dropped.std() > 0.01
    assert abs(float(dropped.mean()) - 1) < 0.1


def naive_local_attention(query, key, value, seen, bias=None):
    batch, heads, target, head_dim = query.shape
    output, total = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, t in itertools.product(range(batch), range(heads), range(target)):
        group = h * key.shape[1] // heads
        ids = [j for j in range(key.shape[2]) if seen[b][t][j]]
        if ids:
            scores = key[b, group, ids] @ query[b, h, t] + (0 if bias is None else bias[b, t, ids])
            output[b, h, t] = scores.softmax(0) @ value[b, group, ids]
            total[b, h, t] = scores.exp().sum().log()
    return output, total


def local_case(seed, target=3, past=2, heads=4, groups=2):
    rng = torch.Generator().manual_seed(seed)
    source = target + past
    query = torch.randn(2, heads, target, 4, dtype=torch.float64, generator=rng)
    key, value = torch.randn(2, 2, groups, source, 4, dtype=torch.float64, generator=rng)
    causal = [[[j <= past + t for j in range(source)] for t in range(target)] for _ in range(2)]
    return query, key, value, torch.tensor(causal), rng


@given(seed=SEEDS, target=integers(1, 4), past=integers(0, 4), groups=integers(1, 2))
def test_local_attention_without_mask_is_causal_up_to_the_last_tokens(seed, target, past, groups):
    query, key, value, causal, _ = local_case(seed, target, past, groups=groups)
    expected = naive_local_attention(query, key, value, causal)
    torch.testing.assert_close(local_attention(query, key, value, None), expected)


@given(seed=SEEDS, target=integers(1, 4), past=integers(0, 4), padding=integers(0, 4))
def test_local_attention_takes_a_boolean_an_additive_or_a_padding_mask(seed, target, past, padding):
    query, key, value, causal, rng = local_case(seed, target, past)
    real = torch.ones(2, target + past, dtype=torch.bool)
    real[1, :padding] = False
    seen = causal & real[:, None]
    expected = naive_local_attention(query, key, value, seen)
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
    longer = torch.cat([torch.ones(2, 3, dtype=torch.long), real.long()], dim=1)  # covers a memory's positions too
    for mask in (seen[:, None], additive, longer, real.long()):
        torch.testing.assert_close(local_attention(query, key, value, mask), expected)


@given(seed=SEEDS)
def test_local_attention_adds_a_finite_bias_to_the_scores(seed):
    query, key, value, causal, rng = local_case(seed)
    bias = torch.randn(2, 3, 5, dtype=torch.float64, generator=rng)
    expected = naive_local_attention(query, key, value, causal, bias)
    mask = bias.masked_fill(~causal, -torch.inf)[:, None]
    torch.testing.assert_close(local_attention(query, key, value, mask), expected)


def test_gradients_of_local_and_merged_attention_are_those_of_their_values():
    query, key, value, _, _ = local_case(4)
    keys, values = torch.randn(2, 2, 4, 5, 4, dtype=torch.float64)
    inputs = [tensor.requires_grad_(True) for tensor in (query, key, value, keys, values)]

    def merged(query, key, value, keys, values):
        memory = knn_attention(query, keys, values, KeyChoice(2))
        return merge_attention(memory, local_attention(query, key, value, None))

    assert torch.autograd.gradcheck(merged, inputs)


@given(seed=SEEDS, count=integers(1, 4), first=integers(1, 5), second=integers(1, 5), scale=integers(1, 60))
def test_merged_attention_is_one_softmax_over_the_union(seed, count, first, second, scale):
    query, keys, values, _, _ = random_case(seed, count, first + second)
    query = query * scale  # large scores overflow a softmax that is not shifted
    expected = knn_attention(query, keys, values, KeyChoice())[0]
    parts = [
        knn_attention(query, keys[:, :, part], values[:, :, part], KeyChoice())
        for part in (slice(0, first), slice(first, None))
    ]
    torch.testing.assert_close(merge_attention(*parts), expected)


def test_merged_attention_ignores_an_empty_part_and_is_zero_where_both_are_empty():
    output, total = torch.randn(3, 4), torch.tensor([1.0, -500.0, -torch.inf])
    nothing = torch.zeros(3, 4), torch.full((3,), -torch.inf)
    output[2] = 0
    torch.testing.assert_close(merge_attention((output, total), nothing), output)
    torch.testing.assert_close(merge_attention(nothing, (output, total)), output)


@given(seed=SEEDS)
def test_normalise_gives_weights_that_sum_to_one_or_zeros(seed):
    scores = 90 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    scores[1] = -torch.inf
    weights, total = normalise(scores)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0, 1, 1]))
    torch.testing.assert_close(total, scores.double().exp().sum(-1).log().float())  # float64 holds e^700
