"""The permanent decoders remember all of a long input but its end, and are the stock model in everything else."""

import copy

import pytest
import torch

from graft import (
    UnlimiformerConfig,
    UnlimiformerLlamaConfig,
    UnlimiformerLlamaForCausalLM,
    UnlimiformerQwen3Config,
    UnlimiformerQwen3ForCausalLM,
    unlimiform,
)

WINDOW, LENGTH, LOCAL = 16, 45, 6
OPTIONS = {"window": WINDOW, "keys_per_query": 4, "local_tokens": LOCAL}
SEVEN_KEYS = {**OPTIONS, "keys_per_query": 7}
PERMANENT = {
    "llama": (UnlimiformerLlamaConfig, UnlimiformerLlamaForCausalLM),
    "qwen3": (UnlimiformerQwen3Config, UnlimiformerQwen3ForCausalLM),
}
RULES = {
    "few keys": {},
    "all keys": {"keys_per_query": None},
    "upper layers": {"first_layer": 1, "heads": [1, 3], "sinks": 2},
    "true": {"positions": "true"},
    "bfloat16 memory": {"memory_dtype": "bfloat16"},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(params=PERMANENT)
def permanent(request, tiny):
    """Builds a stock model and a permanent one of the same weights."""

    def build(dtype=torch.float32, **options):
        return tiny.permanent(request.param, PERMANENT[request.param][1], {**OPTIONS, **options}, dtype)

    return build


def tail_labels(ids, count):
    labels = torch.full_like(ids, -100)
    labels[:, -count:] = ids[:, -count:]
    return labels


@pytest.mark.parametrize("rule", RULES)
def test_logits_and_loss_of_long_inputs_are_the_handles_for_the_local_tokens(permanent, tiny, rule):
    stock, model = permanent(**RULES[rule])
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        found = model(input_ids=ids, labels=tail_labels(ids, LOCAL))
        with unlimiform(stock, UnlimiformerConfig(**{**OPTIONS, **RULES[rule]})) as handle:
            memory, end = handle.remember(ids[:, :-LOCAL]), ids[:, -LOCAL:]
            expected = stock(**memory.inputs(end), labels=end)
    assert found.logits.shape == (2, LOCAL, 61)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_all_keys_of_a_document_within_the_window_give_the_stock_logits(permanent, tiny):
    stock, model = permanent(keys_per_query=None, window=64)
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        expected = stock(input_ids=ids).logits[:, -LOCAL:]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_padded_inputs_of_different_lengths_give_what_each_gives_alone(permanent, tiny, rule, side):
    _, model = permanent(dtype=torch.float64, **RULES[rule])
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 20, 9)]
    ids, mask = tiny.pad(rows, side)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(input_ids=row[None]).logits[0]
            # Few queries gather their values and many multiply all, which rounds differently in half precision.
            tolerance = 5e-2 if "bfloat16" in rule else 1e-4
            torch.testing.assert_close(together[i], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_padded_inputs_is_that_of_each_labelled_token_alone(permanent, tiny, side):
    _, model = permanent()
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 20, 9)]
    ids, mask = tiny.pad(rows, side)
    labels, real = torch.full_like(ids, -100), mask.bool()
    for i, row in enumerate(rows):
        places = real[i].nonzero().flatten()[-3:]
        labels[i, places] = row[-3:]
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        alone = [model(input_ids=row[None], labels=tail_labels(row[None], 3)).loss for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_wide_batch_of_rows_that_are_all_short_has_the_loss_of_the_stock_model(permanent, tiny, side):
    """The batch is wider than `local_tokens`, but no row is: nothing is remembered, and nothing may be refused."""
    stock, model = permanent()
    ids, mask = (both[:2] for both in tiny.pad([tiny.ids(LOCAL), tiny.ids(3, seed=1), tiny.ids(LOCAL + 4)], side))
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=labels)
        expected = stock(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_inputs_within_local_tokens_are_the_stock_models_bit_for_bit(permanent, tiny):
    stock, model = permanent()
    ids = tiny.ids(2, LOCAL)
    with torch.no_grad():
        found, expected = model(input_ids=ids, labels=ids), stock(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=5), stock.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_generate_takes_inputs_of_any_length_and_returns_them_whole_with_handles_tokens(permanent, tiny, rule, mode):
    stock, model = permanent(**RULES[rule])
    ids = tiny.ids(2, LENGTH)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **MODES[mode]}
    with unlimiform(stock, UnlimiformerConfig(**{**OPTIONS, **RULES[rule]})) as handle:
        torch.manual_seed(1)
        expected = handle.generate(ids, **options)[:, LOCAL:]
    copies = options.get("num_return_sequences", 1)
    for inputs in ({"inputs": ids}, {"input_ids": ids}):
        torch.manual_seed(1)
        found = model.generate(**inputs, **options)
        assert torch.equal(found[:, :LENGTH], ids.repeat_interleave(copies, dim=0))
        assert torch.equal(found[:, LENGTH:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_from_padded_inputs_gives_what_each_gives_alone(permanent, tiny, side):
    _, model = permanent()
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 20, 9)]
    ids, mask = tiny.pad(rows, side)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together[:, :LENGTH], ids)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, LENGTH:], model.generate(row[None], **options)[0, len(row) :])


def test_generated_outputs_as_an_object_hold_the_whole_input(permanent, tiny):
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(found.sequences, model.generate(ids, **options))
    assert len(found.scores) == 5


def test_generate_without_a_cache_reads_the_memory_and_gives_the_same_tokens(permanent, tiny):
    """Each step then remembers anew, and its local tokens are the prompt's last ones and those generated: so the
    memory must not move with the answer."""
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, use_cache=False, **options), model.generate(ids, **options))


def test_a_forward_without_a_cache_gives_the_same_logits(permanent, tiny):
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        without = model(input_ids=ids, use_cache=False)
        assert torch.equal(without.logits, model(input_ids=ids).logits)
    assert without.get("cache") is None
    assert without.get("past_key_values") is None


@pytest.mark.parametrize("place", [0, LENGTH - LOCAL - 1])
def test_labels_on_remembered_tokens_are_refused_with_the_way_out(permanent, tiny, place):
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    labels = tail_labels(ids, LOCAL)
    labels[1, place] = 5
    with pytest.raises(ValueError, match=r"`labels`.*last 6 tokens.*`local_tokens`.*-100"):
        model(input_ids=ids, labels=labels)


def test_labels_of_another_shape_are_refused_by_name(permanent, tiny):
    _, model = permanent()
    with pytest.raises(ValueError, match="`labels`"):
        model(input_ids=tiny.ids(2, LENGTH), labels=tiny.ids(2, LENGTH - 1))


def test_training_is_the_stock_models_bit_for_bit(permanent, tiny):
    stock, model = permanent()
    ids = tiny.ids(2, LENGTH)
    for each in (stock, model):
        each.train()(input_ids=ids, labels=ids).loss.backward()
    for (name, one), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_gradient_checkpointing_changes_no_gradient_of_a_training_step(permanent, tiny):
    _, model = permanent()
    ids, gradients = tiny.ids(2, LENGTH), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_with_gradient_checkpointing_on_reads_the_memory(permanent, tiny):
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.gradient_checkpointing_enable()
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_bfloat16_weights_read_and_generate_finite_answers_close_to_float32(permanent, tiny):
    _, model = permanent(keys_per_query=None)
    ids, half = tiny.ids(2, LENGTH), copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact, found = model(input_ids=ids).logits, half(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert (exact - found.float()).abs().mean() < 0.1 * exact.abs().mean()
    assert half.generate(ids, max_new_tokens=5).shape == (2, LENGTH + 5)


def test_one_memory_answers_several_questions_through_the_permanent_class(permanent, tiny):
    stock, model = permanent()
    ids, questions = tiny.ids(1, LENGTH), tiny.ids(3, 5, seed=4)
    memory = model.remember(ids)
    with torch.no_grad(), unlimiform(stock, UnlimiformerConfig(**OPTIONS)) as handle:
        expected = stock(**handle.remember(ids).select([0, 0, 0]).inputs(questions)).logits
        assert torch.equal(model(**memory.select([0, 0, 0]).inputs(questions)).logits, expected)


def test_logits_to_keep_counts_from_the_end_of_the_local_tokens(permanent, tiny):
    _, model = permanent()
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        found = model(input_ids=ids, logits_to_keep=2).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, -2:], rtol=1e-5, atol=1e-5)


def test_embeddings_of_ones_own_are_read_as_the_stock_model_reads_them(permanent, tiny):
    stock, model = permanent()
    embeddings = stock.get_input_embeddings()(tiny.ids(2, LENGTH))
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, stock(inputs_embeds=embeddings).logits)


def test_more_new_tokens_than_positions_are_refused_before_any_is_made(permanent, tiny):
    _, model = permanent()
    room = 128 - WINDOW - LOCAL + 1
    with pytest.raises(ValueError, match=f"`max_new_tokens` is {room + 1} after"):
        model.generate(tiny.ids(2, LENGTH), max_new_tokens=room + 1)
