"""The permanent encoder-decoders read long sources as the stock model with a handle does, and are it in all else."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput

from graft import (
    Memory,
    UnlimiformerBart,
    UnlimiformerBartConfig,
    UnlimiformerConfig,
    UnlimiformerT5Config,
    UnlimiformerT5ForConditionalGeneration,
    unlimiform,
)

WINDOW, LENGTH = 16, 45
OPTIONS = {"window": WINDOW, "keys_per_query": 4}
SEVEN_KEYS = {**OPTIONS, "keys_per_query": 7}
PERMANENT = {
    "bart": (UnlimiformerBartConfig, UnlimiformerBart),
    "t5": (UnlimiformerT5Config, UnlimiformerT5ForConditionalGeneration),
}
RULES = {
    "hidden": {"store": "hidden"},
    "keys": {"store": "keys_values"},
    "all keys": {"keys_per_query": None},
    "window first": {"first_step": "window", "heads": [1, 3], "first_layer": 1},
    "bfloat16 memory": {"memory_dtype": "bfloat16"},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "assisted": {"prompt_lookup_num_tokens": 2},
}


@pytest.fixture(params=PERMANENT)
def permanent(request, tiny):
    """Builds a stock model and a permanent one of the same weights."""

    def build(dtype=torch.float32, **options):
        return tiny.permanent(request.param, PERMANENT[request.param][1], {**OPTIONS, **options}, dtype)

    return build


@pytest.mark.parametrize("rule", RULES)
def test_logits_and_loss_of_long_inputs_are_the_handles(permanent, tiny, rule):
    stock, model = permanent(**RULES[rule])
    ids, mask = tiny.pad([tiny.ids(LENGTH), tiny.ids(9)], "right")
    labels = tiny.ids(2, 5, seed=2)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=labels)
        with unlimiform(stock, UnlimiformerConfig(**{**OPTIONS, **RULES[rule]})) as handle:
            expected = stock(**handle.remember(ids, mask).inputs(), labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_inputs_within_the_window_are_the_stock_models(permanent, tiny):
    stock, model = permanent(keys_per_query=None, store="keys_values")
    ids, labels = tiny.ids(2, WINDOW), tiny.ids(2, 5, seed=2)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, labels=labels).logits, stock(input_ids=ids, labels=labels).logits)


@pytest.mark.parametrize("option", ["cache_implementation", "guidance_scale", "assistant_model"])
def test_options_of_generate_that_no_memory_serves_are_refused_before_reading(permanent, tiny, option, monkeypatch):
    stock, model = permanent()
    monkeypatch.setattr(model, "remember", None)  # calling it would be a TypeError
    value = {"cache_implementation": "static", "guidance_scale": 1.5, "assistant_model": stock}[option]
    with pytest.raises(ValueError, match=f"`{option}` does not go with the memory"):
        model.generate(tiny.ids(1, LENGTH), max_new_tokens=2, **{option: value})


def test_offloaded_weights_are_refused_by_name(permanent, tiny, tmp_path):
    _, model = permanent()
    model.save_pretrained(tmp_path)
    placed = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    offloaded = type(model).from_pretrained(tmp_path, **placed).eval()
    with pytest.raises(ValueError, match="offloaded weights, `.*weight` among them.*device_map"):
        offloaded.generate(tiny.ids(1, LENGTH), max_new_tokens=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_generate_takes_inputs_of_any_length_and_gives_the_handles_tokens(permanent, tiny, rule, mode):
    stock, model = permanent(**RULES[rule])
    rows = 1 if mode == "assisted" else 2
    ids, mask = tiny.pad([tiny.ids(LENGTH), tiny.ids(9)][:rows], "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **MODES[mode]}
    if mode != "assisted":
        options["no_repeat_ngram_size"] = 1  # tiny models like to repeat one token
    with unlimiform(stock, UnlimiformerConfig(**{**OPTIONS, **RULES[rule]})) as handle:
        torch.manual_seed(1)
        expected = handle.generate(ids, mask, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    torch.manual_seed(1)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
def test_generate_without_a_cache_gives_the_same_tokens(permanent, tiny, mode):
    _, model = permanent()
    ids, mask = tiny.pad([tiny.ids(LENGTH), tiny.ids(9)], "right")
    options = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1, **MODES[mode]}
    torch.manual_seed(1)
    expected = model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), expected)


def test_a_forward_without_a_cache_returns_none_and_the_same_logits(permanent, tiny):
    _, model = permanent()
    ids, answer = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    with torch.no_grad():
        with_cache = model(input_ids=ids, decoder_input_ids=answer)
        without = model(input_ids=ids, decoder_input_ids=answer, use_cache=False)
    assert torch.equal(with_cache.logits, without.logits)
    assert without.get("cache") is None
    assert without.get("past_key_values") is None


def test_documents_remembered_once_are_asked_many_times(permanent, tiny):
    _, model = permanent()
    ids, answer = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    memory = model.remember(ids)
    with torch.no_grad():
        assert torch.equal(
            model(memory=memory, decoder_input_ids=answer).logits,
            model(input_ids=ids, decoder_input_ids=answer).logits,
        )
    expected = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(memory=memory, max_new_tokens=5), expected)
    assert torch.equal(model.generate(memory=memory, max_new_tokens=5), expected)


def test_a_decoder_prompt_begins_the_sequences(permanent, tiny):
    _, model = permanent()
    prompt = torch.tensor([[2, 10, 20], [2, 30, 40]])
    found = model.generate(tiny.ids(2, LENGTH), decoder_input_ids=prompt, max_new_tokens=4)
    assert torch.equal(found[:, :3], prompt)


def test_outputs_as_a_tuple_begin_with_loss_and_logits(permanent, tiny):
    _, model = permanent()
    ids, labels = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels)
        found = model(input_ids=ids, labels=labels, return_dict=False)
    assert torch.equal(found[0], expected.loss)
    assert torch.equal(found[1], expected.logits)


def test_training_sees_the_first_window_as_the_stock_model_does(permanent, tiny):
    stock, model = permanent()
    ids, mask = tiny.pad([tiny.ids(LENGTH), tiny.ids(9)], "right")
    labels = tiny.ids(2, 5, seed=2)
    found = model.train()(input_ids=ids, attention_mask=mask, labels=labels)
    expected = stock.train()(input_ids=ids[:, :WINDOW], attention_mask=mask[:, :WINDOW], labels=labels)
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    for (name, one), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_training_on_left_padded_documents_sees_tokens_and_not_their_padding(permanent, tiny):
    """The first window of a document begins at its first token, on whichever side the padding stands."""
    _, model = permanent()
    rows, labels = [tiny.ids(LENGTH), tiny.ids(9)], tiny.ids(2, 5, seed=2)
    model.train()
    right, left = (
        model(input_ids=ids, attention_mask=mask, labels=labels).logits
        for ids, mask in (tiny.pad(rows, "right"), tiny.pad(rows, "left"))
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_a_memory_in_train_mode_gives_the_logits_of_eval_mode(permanent, tiny):
    _, model = permanent()
    memory, labels = model.remember(tiny.ids(2, LENGTH)), tiny.ids(2, 5, seed=2)
    expected = model(memory=memory, labels=labels)
    found = model.train()(memory=memory, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.get_decoder().parameters() if p.grad is not None)


def test_gradient_checkpointing_changes_no_gradient_of_a_training_step(permanent, tiny):
    _, model = permanent()
    ids, labels, gradients = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_with_gradient_checkpointing_on_reads_the_memory(permanent, tiny):
    _, model = permanent()
    ids, labels = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).logits
        model.gradient_checkpointing_enable()
        assert torch.equal(model.eval()(input_ids=ids, labels=labels).logits, expected)


def test_a_memory_of_a_model_loaded_from_a_stock_checkpoint_is_its_own_after_saving_both(permanent, tiny, tmp_path):
    stock, model = permanent()
    stock.save_pretrained(tmp_path / "stock")
    model = type(model).from_pretrained(tmp_path / "stock", unlimiformer_config=OPTIONS)
    memory, answer = model.remember(tiny.ids(1, LENGTH)), tiny.ids(1, 4)
    memory.save_pretrained(tmp_path / "book")
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    loaded = Memory.from_pretrained(tmp_path / "book", again)
    with torch.no_grad():
        expected = model(memory=memory, decoder_input_ids=answer).logits
        assert torch.equal(again(memory=loaded, decoder_input_ids=answer).logits, expected)


def test_bfloat16_weights_read_and_generate_finite_answers_close_to_float32(permanent, tiny):
    _, model = permanent(keys_per_query=None)
    ids, labels = tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=2)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact, found = model(input_ids=ids, labels=labels).logits, half(input_ids=ids, labels=labels).logits
    assert found.dtype == torch.bfloat16
    assert (exact - found.float()).abs().mean() < 0.1 * exact.abs().mean()
    assert half.generate(ids, max_new_tokens=5).shape[0] == 2


def test_encoder_outputs_of_ones_own_are_read_as_the_stock_model_reads_them(permanent, tiny):
    stock, model = permanent()
    states = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "decoder_input_ids": tiny.ids(2, 5)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_options_that_do_not_fit_the_model_are_refused_when_it_is_made(permanent, tiny):
    with pytest.raises(ValueError, match=r"`heads` must lie in \[0, 4\)"):
        permanent(heads=[9])


def test_the_trainer_trains_on_windows_and_predicts_with_memory(permanent, tiny, tmp_path):
    _, model = permanent()
    rows = [{"input_ids": tiny.ids(LENGTH, seed=i), "labels": tiny.ids(5, seed=9 + i)} for i in range(4)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        predict_with_generate=True,
        generation_max_length=7,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    prediction = trainer.predict(rows)
    model.eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    expected = model.generate(ids, max_length=7)
    assert torch.equal(torch.tensor(prediction.predictions)[:, : expected.shape[1]], expected)
    with torch.no_grad():
        labels = torch.stack([row["labels"] for row in rows])
        losses = [model(input_ids=ids[pair], labels=labels[pair]).loss for pair in (slice(0, 2), slice(2, 4))]
    assert abs(prediction.metrics["test_loss"] - float(sum(losses) / 2)) < 1e-4


@pytest.mark.parametrize("permanent", ["bart"], indirect=True)  # T5 has positions for any number
def test_more_new_tokens_than_positions_are_refused_before_any_is_made(permanent, tiny):
    _, model = permanent()
    room = 64
    with pytest.raises(ValueError, match=f"`max_new_tokens` is {room + 1} after"):
        model.generate(tiny.ids(2, LENGTH), max_new_tokens=room + 1)
