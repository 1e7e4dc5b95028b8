"""Encoder-decoders with a memory equal stock full attention where they must, naive loops where they choose keys."""

import copy
import itertools

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import CACHE_ARGUMENT
from graft.modeling.unlimiformer.attach import unlimiform

FAMILIES = ["bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100"]
STORES = ["hidden", "keys_values"]
WINDOW, LENGTH = 16, 45
ALL = {"keys_per_query": None, "window": WINDOW}
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # scores reach 20
# Tiny models like to repeat one token; without repetition an answer is a ranking, which hangs on what was read.
FREE = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1}


def few_keys(store):
    return UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=4)


def naive_states(model, ids, kept):
    """The encoder's output for one document, (1, tokens, hidden): each window alone, its kept part in its place."""
    parts = []
    with torch.no_grad():
        for start, end, first, last in kept:
            states = model.get_encoder()(input_ids=ids[None, start:end]).last_hidden_state[0]
            parts.append(states[first - start : last - start])
    return torch.cat(parts)[None]


def encoded(states, mask=None):
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}


def naive_head(attention, head, query, memory, keys_per_query):
    """One query (head_dim,) of one head over the `keys_per_query` best of the rows of `memory` (tokens, hidden)."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    keys, values = (
        memory @ project.weight[rows].T + project.bias[rows] for project in (attention.k_proj, attention.v_proj)
    )
    scores = keys @ query * attention.head_dim**-0.5
    kept = scores.argsort(descending=True)[:keys_per_query]
    return scores[kept].softmax(0) @ values[kept]


def make_naive(model, states, first_windows, config):
    """Replace every cross-attention of `model` by loops over documents, heads and target tokens.

    Args:
        states: of each document, (tokens, hidden); first_windows: what its first window left, unshortened.
        config: an UnlimiformerConfig whose rule the loops follow.

    The model is in float64, so the loops are.
    """
    layers = model.get_decoder().layers
    first, last = config.first_layer % len(layers), config.last_layer
    last = len(layers) if last is None else last % len(layers)

    def forward_of(index, attention):
        def forward(hidden_states, *args, **kwargs):
            batch, target, width = hidden_states.shape
            query = attention.q_proj(hidden_states).view(batch, target, -1, attention.head_dim)
            output = torch.zeros_like(query)
            for b, t, h in itertools.product(range(batch), range(target), range(query.shape[2])):
                reads = first <= index < last and (config.heads is None or h in config.heads)
                if config.first_step == "window" and t == 0:
                    reads = False
                memory = states[b] if reads else first_windows[b]
                allowed = list(range(len(memory)))
                if reads and config.exclude_window and len(memory) > config.window:
                    allowed = allowed[config.window :]
                count = config.keys_per_query if reads else None
                output[b, t, h] = naive_head(attention, h, query[b, t, h], memory[allowed], count)
            return attention.out_proj(output.view(batch, target, width)), None

        return forward

    for index, layer in enumerate(layers):
        layer.encoder_attn.forward = forward_of(index, layer.encoder_attn)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_memory_is_the_encoders_output_window_by_window(tiny, family):
    model, rows = tiny.model(family), [tiny.ids(n, seed=n) for n in (LENGTH, 9, 30)]
    for overlap in (0.0, 0.25, 0.5):
        with unlimiform(model, UnlimiformerConfig(**ALL, overlap=overlap)) as handle:
            memory = handle.remember(*tiny.pad(rows, "right"))
        for i, row in enumerate(rows):
            expected = naive_states(model, row, tiny.kept(len(row), WINDOW, overlap, causal=False))
            torch.testing.assert_close(memory.hidden[i : i + 1, : len(row)], expected, **CLOSE)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_keys_give_the_logits_and_loss_of_full_attention_over_the_windows(tiny, family, store):
    model, ids = tiny.model(family), tiny.ids(2, LENGTH)
    stock, labels = copy.deepcopy(model), tiny.ids(2, 6, seed=1)
    states = torch.cat([naive_states(stock, row, tiny.kept(LENGTH, WINDOW, 0.5, False)) for row in ids])
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
        output = model(**handle.remember(ids).inputs(), labels=labels)
    with torch.no_grad():
        expected = stock(**encoded(states), labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(output.loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_keys_generate_what_full_attention_over_the_windows_generates(tiny, family, store, beams):
    model, ids = tiny.model(family), tiny.ids(2, LENGTH)
    stock = copy.deepcopy(model)
    states = torch.cat([naive_states(stock, row, tiny.kept(LENGTH, WINDOW, 0.5, False)) for row in ids])
    options = {**FREE, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    with unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
        found = model.generate(**handle.remember(ids).inputs(), **options)
    expected = stock.generate(**encoded(states, torch.ones(2, LENGTH, dtype=torch.long)), **options)
    assert torch.equal(found.sequences, expected.sequences)
    for scores, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, wanted, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_a_document_within_the_window_give_the_stock_logits_bit_for_bit(tiny, family):
    model, ids, labels = tiny.model(family), tiny.ids(2, WINDOW), tiny.ids(2, 6, seed=1)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels)
        with unlimiform(model, UnlimiformerConfig(**ALL, store="keys_values")) as handle:
            found = model(**handle.remember(ids).inputs(), labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("beams", [1, 3])
def test_keys_of_a_document_within_the_window_generate_the_stock_tokens_and_scores(tiny, beams):
    model, ids = tiny.model("bart"), tiny.ids(2, WINDOW)
    options = {**FREE, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(input_ids=ids, **options)
    with unlimiform(model, UnlimiformerConfig(**ALL, store="keys_values")) as handle:
        found = handle.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for scores, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, wanted, **CLOSE)


RULES = {
    "few keys": {"keys_per_query": 3},
    "one key": {"keys_per_query": 1},
    "window keys": {"keys_per_query": WINDOW},
    "two heads": {"keys_per_query": 4, "heads": [0, 3]},
    "upper layers": {"keys_per_query": 4, "first_layer": 1},
    "lower layers": {"keys_per_query": 4, "last_layer": -1},
    "without the window": {"keys_per_query": 4, "exclude_window": True},
    "all without the window": {"keys_per_query": None, "exclude_window": True},
    "window first": {"keys_per_query": 4, "first_step": "window"},
    "much at once": {"keys_per_query": 4, "first_step": "window", "heads": [1], "first_layer": 1, "last_layer": 2},
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rule", RULES)
def test_chosen_keys_give_the_logits_of_naive_loops(tiny, rule, store):
    model = tiny.model("bart", dtype=torch.float64)
    rows, labels = [tiny.ids(LENGTH), tiny.ids(10, seed=1)], tiny.ids(2, 5, seed=2)
    config = UnlimiformerConfig(window=WINDOW, store=store, **RULES[rule])
    states = [naive_states(model, row, tiny.kept(len(row), WINDOW, 0.5, False))[0] for row in rows]
    firsts = [naive_states(model, row, [(0, WINDOW, 0, WINDOW)])[0] for row in rows]
    naive = make_naive(copy.deepcopy(model), states, firsts, config)
    with torch.no_grad():
        with unlimiform(model, config) as handle:
            found = model(**handle.remember(*tiny.pad(rows, "left")).inputs(), labels=labels)
        expected = naive(**encoded(torch.zeros(2, 3, 32).double()), labels=labels, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("store", STORES)
def test_few_keys_give_the_logits_of_naive_loops_in_every_family(tiny, family, store):
    model = tiny.model(family, dtype=torch.float64)
    ids, labels = tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=2)
    config = UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=5)
    states = [naive_states(model, ids[0], tiny.kept(LENGTH, WINDOW, 0.5, False))[0]]
    naive = make_naive(copy.deepcopy(model), states, states, config)
    with torch.no_grad():
        with unlimiform(model, config) as handle:
            found = model(**handle.remember(ids).inputs(), labels=labels)
        expected = naive(**encoded(torch.zeros(1, 3, 32).double()), labels=labels, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)


BATCHED = {
    **RULES,
    "all keys": {"keys_per_query": None},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rule", BATCHED)
def test_a_batch_of_different_lengths_equals_each_document_alone(tiny, rule, store, side):
    model, rows = tiny.model("bart", dtype=torch.float64), [tiny.ids(n, seed=n) for n in (LENGTH, 7, 16, 33)]
    labels = tiny.ids(4, 5, seed=2)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, **BATCHED[rule])) as handle:
        together = model(**handle.remember(*tiny.pad(rows, side)).inputs(), labels=labels).logits
        for i, row in enumerate(rows):
            alone = model(**handle.remember(row[None]).inputs(), labels=labels[i : i + 1]).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_different_lengths_generates_what_each_document_generates_alone(tiny, store, beams):
    model, rows = tiny.model("bart"), [tiny.ids(n, seed=n) for n in (LENGTH, 7, 16, 33)]
    options = {**FREE, "num_beams": beams, "min_new_tokens": 6}
    with unlimiform(model, few_keys(store)) as handle:
        together = handle.generate(*tiny.pad(rows, "right"), **options)
        alone = [handle.generate(row[None], **options) for row in rows]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_moves_nothing(tiny, store, side):
    model, rows, labels = tiny.model("bart"), [tiny.ids(LENGTH), tiny.ids(7)], tiny.ids(2, 5, seed=2)
    found = []
    with (
        torch.no_grad(),
        unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=9)) as handle,
    ):
        for filler in (1, 7, 60):
            memory = handle.remember(*tiny.pad(rows, side, filler))
            found.append(model(**memory.inputs(), labels=labels).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("store", STORES)
def test_cached_steps_give_the_logits_of_teacher_forcing(tiny, family, store):
    model, ids, answer = tiny.model(family), tiny.ids(2, LENGTH), tiny.ids(2, 6, seed=1)
    with (
        torch.no_grad(),
        unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=4)) as handle,
    ):
        memory = handle.remember(ids)
        whole = model(**memory.inputs(), decoder_input_ids=answer).logits
        inputs, steps = memory.inputs(), []
        for part in answer.split([1, 1, 3, 1], dim=1):
            steps.append(model(**inputs, decoder_input_ids=part).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("rule", ["window first", "much at once", "two heads", "upper layers"])
@pytest.mark.parametrize("store", STORES)
def test_cached_steps_equal_teacher_forcing_under_every_rule(tiny, rule, store):
    model, ids, answer = tiny.model("bart"), tiny.ids(2, LENGTH), tiny.ids(2, 6, seed=1)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, **RULES[rule])) as handle:
        memory = handle.remember(ids)
        whole = model(**memory.inputs(), decoder_input_ids=answer).logits
        inputs = memory.inputs()
        steps = [model(**inputs, decoder_input_ids=part).logits for part in answer.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


def test_window_first_lets_the_first_step_alone_see_the_window_alone(tiny):
    model, ids, answer = tiny.model("bart"), tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=1)
    with torch.no_grad():
        stock = model(input_ids=ids[:, :WINDOW], decoder_input_ids=answer).logits
        for store in STORES:
            config = UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=None, first_step="window")
            with unlimiform(model, config) as handle:
                found = model(**handle.remember(ids).inputs(), decoder_input_ids=answer).logits
            torch.testing.assert_close(found[:, 0], stock[:, 0], **CLOSE)
            assert (found[:, 1:] - stock[:, 1:]).abs().max() > 0.1


@pytest.mark.parametrize("store", STORES)
def test_assisted_decoding_generates_the_greedy_tokens(tiny, store):
    """From a prompt that ends in an ordinary token: 5.17 takes a start token that is the end token for the end."""
    model, ids, options = tiny.model("bart"), tiny.ids(1, LENGTH), {"max_new_tokens": 20, "do_sample": False}
    prompt = torch.tensor([[2, 40, 41, 42, 43, 40, 41]])
    with unlimiform(model, few_keys(store)) as handle:
        memory = handle.remember(ids)
        greedy = model.generate(**memory.inputs(prompt), **options)
        assisted = model.generate(**memory.inputs(prompt), **options, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted, greedy)
    assert greedy.shape[1] > prompt.shape[1] + 3


@pytest.mark.parametrize("store", STORES)
def test_a_cropped_cache_goes_on_as_if_the_cut_tokens_had_never_been(tiny, store):
    model, ids, answer = tiny.model("bart"), tiny.ids(2, LENGTH), tiny.ids(2, 6, seed=1)
    with (
        torch.no_grad(),
        unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=4)) as handle,
    ):
        memory = handle.remember(ids)
        inputs = memory.inputs()
        model(**inputs, decoder_input_ids=answer[:, :4])
        inputs[CACHE_ARGUMENT].crop(-2)
        found = model(**inputs, decoder_input_ids=answer[:, 4:]).logits
        fresh = memory.inputs()
        model(**fresh, decoder_input_ids=answer[:, :2])
        expected = model(**fresh, decoder_input_ids=answer[:, 4:]).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("store", STORES)
def test_beams_equal_a_run_with_the_memory_copied_for_each_beam(tiny, store):
    """The copy is made of documents: each stands in the batch as often as there are beams, so rows never share one."""
    model, ids = tiny.model("bart"), tiny.ids(2, LENGTH)
    options = {**FREE, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    with unlimiform(model, few_keys(store)) as handle:
        shared = model.generate(**handle.remember(ids).inputs(), **options)
        with torch.no_grad():
            repeated = handle.remember(ids.repeat_interleave(3, dim=0))
            scored = model(**repeated.inputs(), decoder_input_ids=shared.sequences.repeat_interleave(3, 0)).logits
    assert shared.sequences_scores is not None
    log_probabilities = scored[::3, :-1].log_softmax(-1).gather(-1, shared.sequences[:, 1:, None]).squeeze(-1)
    real = (shared.sequences[:, 1:] != 1).float()
    per_token = (log_probabilities * real).sum(1) / real.sum(1)
    torch.testing.assert_close(shared.sequences_scores, per_token, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", STORES)
def test_beams_of_shared_and_of_repeated_documents_generate_the_same(tiny, store):
    model, ids = tiny.model("bart"), tiny.ids(2, LENGTH)
    options = {**FREE, "num_beams": 3}
    with unlimiform(model, few_keys(store)) as handle:
        memory = handle.remember(ids)
        selected = model.generate(**memory.select([1, 0, 0, 1]).inputs(), **options)
        stored = handle.generate(ids[[1, 0, 0, 1]], **options)
    assert torch.equal(selected, stored)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("store", STORES)
def test_documents_in_another_order_are_read_by_their_own_rows(tiny, store, implementation):
    model, ids, answers = tiny.model("bart"), tiny.ids(3, LENGTH), tiny.ids(3, 4, seed=2)
    model.set_attn_implementation(implementation)
    order = [2, 0, 1]
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(store=store, **ALL)) as handle:
        found = model(**handle.remember(ids).select(order).inputs(), decoder_input_ids=answers, output_attentions=True)
        expected = model(**handle.remember(ids[order]).inputs(), decoder_input_ids=answers, output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found.cross_attentions, expected.cross_attentions, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", STORES)
def test_several_returned_sequences_are_those_of_as_many_rows_under_one_seed(tiny, store):
    model, ids = tiny.model("bart"), tiny.ids(2, LENGTH)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True}
    with unlimiform(model, few_keys(store)) as handle:
        memory = handle.remember(ids)
        torch.manual_seed(5)
        several = model.generate(**memory.inputs(), num_return_sequences=3, **options)
        torch.manual_seed(5)
        separate = model.generate(**memory.select([0, 0, 0, 1, 1, 1]).inputs(), **options)
    assert torch.equal(several, separate)
    assert len({tuple(row) for row in several.tolist()}) > 2


@pytest.mark.parametrize("store", STORES)
def test_sampling_repeats_under_one_seed(tiny, store):
    model, ids = tiny.model("bart"), tiny.ids(2, LENGTH)
    found = []
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store)) as handle:
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            found.append(handle.generate(ids, do_sample=True, max_new_tokens=8, min_new_tokens=8))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("store", STORES)
def test_windows_per_batch_moves_nothing_but_the_last_digits(tiny, store):
    model, rows = tiny.model("bart", dtype=torch.float64), [tiny.ids(n, seed=n) for n in (LENGTH, 40, 12)]
    labels, found = tiny.ids(3, 5, seed=2), []
    for size in (1, 2, 5, "auto"):
        config = UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=4, windows_per_batch=size)
        with torch.no_grad(), unlimiform(model, config) as handle:
            found.append(model(**handle.remember(*tiny.pad(rows, "right")).inputs(), labels=labels).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_memory_drifts_by_its_rounding_and_halves_the_bytes(tiny, store, dtype):
    model, ids, labels = tiny.model("bart"), tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    found, sizes = [], []
    for stored in (None, dtype):
        config = UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=None, memory_dtype=stored)
        with torch.no_grad(), unlimiform(model, config) as handle:
            memory = handle.remember(ids)
            sizes.append(memory.nbytes)
            found.append(model(**memory.inputs(), labels=labels).logits)
    assert sizes[1] * 2 == sizes[0]
    drift = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert 0 < drift < 20 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("store", STORES)
def test_a_model_in_bfloat16_reads_its_memory_as_close_as_it_reads_a_window(tiny, store):
    exact = tiny.model("bart")
    model, ids, labels = copy.deepcopy(exact).bfloat16(), tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    logits = []
    for each in (exact, model):
        with torch.no_grad(), unlimiform(each, UnlimiformerConfig(**ALL, store=store)) as handle:
            logits.append(each(**handle.remember(ids).inputs(), labels=labels).logits.float())
    with torch.no_grad():
        stock = [each(input_ids=ids[:, :WINDOW], labels=labels).logits.float() for each in (exact, model)]
    assert (logits[0] - logits[1]).abs().mean() < 2 * (stock[0] - stock[1]).abs().mean()


@pytest.mark.parametrize("store", STORES)
def test_a_decoder_prompt_may_be_given_and_is_part_of_the_sequences(tiny, store):
    model, ids, prompt = tiny.model("bart"), tiny.ids(2, LENGTH), tiny.ids(2, 3, seed=4)
    prompt[:, 0] = 2
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store)) as handle:
        memory = handle.remember(ids)
        found = model.generate(**memory.inputs(prompt), **FREE)
        free = model.generate(**memory.inputs(), **FREE)
    assert torch.equal(found[:, :3], prompt)
    assert not torch.equal(found, free)


def test_a_foreign_batch_with_a_memorys_cache_is_refused_with_both_numbers(tiny):
    model = tiny.model("bart")
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW)) as handle:
        inputs = handle.remember(tiny.ids(2, LENGTH)).inputs()
        with pytest.raises(ValueError, match=r"batch of 3 rows reads a memory made for 2 rows"):
            model(**inputs, decoder_input_ids=tiny.ids(3, 4))


def test_no_memory_layer_reads_the_placeholder_of_the_encoders_output(tiny):
    """The placeholder is NaN, so that any way around the memory shows in the logits."""
    model = tiny.model("bart")
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, first_layer=2)) as handle:
        inputs = handle.remember(tiny.ids(2, LENGTH)).inputs()
        assert inputs["encoder_outputs"].last_hidden_state.isnan().all()
        assert model(**inputs, decoder_input_ids=tiny.ids(2, 4)).logits.isfinite().all()
