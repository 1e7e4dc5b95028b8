"""Appending to a memory equals remembering the whole at once, in any order of appending, selecting and saving,
whatever fails in between and in two threads at once."""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, data, floats, integers, lists, sampled_from

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.windows import plan_windows, tokens_kept

WINDOW = 16
RULES = {
    "bart hidden": ("bart", {"store": "hidden", "keys_per_query": 4}),
    "bart keys": ("bart", {"store": "keys_values", "keys_per_query": 4, "overlap": 0.25}),
    "bart windows": ("bart", {"keys_per_query": 4, "heads": [1], "first_layer": 1, "first_step": "window"}),
    "t5 no overlap": ("t5", {"keys_per_query": 5, "overlap": 0.0}),
    "llama squeeze": ("llama", {"keys_per_query": 4, "sinks": 1}),
    "llama origin": ("llama", {"keys_per_query": 4, "positions": "origin", "overlap": 0.3}),
    "llama true": ("llama", {"keys_per_query": None, "positions": "true", "first_layer": 1}),
    "cohere neighbours": ("cohere", {"keys_per_query": 4}),
    "phi partial": ("phi", {"keys_per_query": 4}),
    "gpt2 table": ("gpt2", {"keys_per_query": 4}),
}
MODELS = {}
STEPS = ["append", "select", "save", "ask", "interrupted", "half read"]


def attached(tiny, rule):
    """A model in float64, so that a choice of keys never hangs on rounding, and its attachment."""
    family, options = RULES[rule]
    if rule not in MODELS:
        model = tiny.model(family, dtype=torch.float64)
        MODELS[rule] = model, unlimiform(model, UnlimiformerConfig(window=WINDOW, **options))
    return MODELS[rule]


def logits(model, memory, tiny):
    asked = tiny.ids(len(memory), 4, seed=9)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**memory.inputs(), decoder_input_ids=asked).logits
        return model(**memory.inputs(asked)).logits


def assert_same(model, memory, rows, handle, tiny):
    """Tokens, lengths, stored vectors at real tokens, and logits are those of remembering `rows` at once."""
    whole = handle.remember(*tiny.pad(rows, "left"))
    assert [int(memory.lengths[document]) for document in memory.documents] == list(map(len, rows))
    assert memory.tensors().keys() == whole.tensors().keys()
    for i, (row, document) in enumerate(zip(rows, memory.documents, strict=True)):
        assert torch.equal(memory.input_ids[document, : len(row)], row)
        for name, expected in whole.tensors().items():
            real = min(len(row), WINDOW) if name.startswith("window_") else len(row)
            found = memory.tensors()[name][document]
            assert torch.allclose(found[..., :real, :], expected[i][..., :real, :], rtol=0, atol=1e-10), name
    assert torch.allclose(logits(model, memory, tiny), logits(model, whole, tiny), rtol=0, atol=1e-9)


@given(
    window=integers(1, 40), overlap=floats(0, 0.99), before=integers(1, 200), more=integers(1, 120), causal=booleans()
)
def test_tokens_kept_were_kept_by_the_very_window_that_the_grown_document_has(window, overlap, before, more, causal):
    def reader(length):
        return {
            token: (part.start, part.end)
            for part in plan_windows(length, window, overlap, causal)
            for token in range(part.keep_start, part.keep_end)
        }

    kept = tokens_kept(before, before + more, window, overlap, causal)
    old, new = reader(before), reader(before + more)
    assert all(old[token] == new[token] for token in range(kept))
    margin = int(window * overlap / 2)
    count = len(plan_windows(before, window, overlap, causal))
    promised = (count - 1) * (window - 2 * margin) + margin * (2 if causal else 1) if count > 1 else 0
    assert promised <= kept <= before


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cuts", [(5, 9), (16, 1), (16, 40), (30, 3), (45, 50)])
def test_append_equals_remembering_at_once(tiny, rule, cuts):
    model, handle = attached(tiny, rule)
    first, second = tiny.ids(cuts[0], seed=1), tiny.ids(cuts[1], seed=2)
    memory = handle.append(handle.remember(first[None]), second[None])
    assert_same(model, memory, [torch.cat([first, second])], handle, tiny)


@pytest.mark.parametrize("rule", ["bart hidden", "bart windows", "llama squeeze"])
def test_documents_of_a_batch_grow_by_different_lengths(tiny, rule):
    model, handle = attached(tiny, rule)
    rows = [tiny.ids(n, seed=n) for n in (45, 7, 30)]
    more = [tiny.ids(n, seed=100 + n) for n in (2, 40, 11)]
    memory = handle.append(handle.remember(*tiny.pad(rows, "right")), *tiny.pad(more, "left"))
    assert_same(model, memory, [torch.cat(both) for both in zip(rows, more, strict=True)], handle, tiny)


class Stopped(Exception):
    """What a user's interruption is in these tests."""


def interrupted(model, memory, asked):
    """A generation that ends with an exception at its second token."""

    def stop(ids, scores):
        if ids.shape[1] > (1 if model.config.is_encoder_decoder else asked.shape[1]):
            raise Stopped
        return scores

    with pytest.raises(Stopped):
        model.generate(**memory.inputs(asked), max_new_tokens=4, min_new_tokens=4, logits_processor=[stop])


def half_read(model, handle, memory, more):
    """An append that ends with an exception in its last window; reading by another thread is left alone."""
    thread = threading.get_ident()

    def stop(module, args, output):
        if threading.get_ident() == thread:
            raise Stopped

    body = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, model.base_model_prefix)
    hook = body.register_forward_hook(stop)
    with pytest.raises(Stopped):
        handle.append(memory, *more)
    hook.remove()


def check_sequence(tiny, rule, draw):
    """A random sequence of operations on a memory and on plain lists of tokens."""
    model, handle = attached(tiny, rule)
    lengths = draw(lists(integers(1, 40), min_size=1, max_size=3))
    rows = [tiny.ids(n, seed=i) for i, n in enumerate(lengths)]
    memory = handle.remember(*tiny.pad(rows, "right"))
    for seed, step in enumerate(draw(lists(sampled_from(STEPS), max_size=5)), 10):
        if step == "append":
            if max(map(len, rows)) > 80:  # positions "true" ends at 128
                continue
            more = [tiny.ids(draw(integers(1, 20)), seed=seed * 10 + i) for i in range(len(rows))]
            memory = handle.append(memory, *tiny.pad(more, draw(sampled_from(["left", "right"]))))
            rows = [torch.cat(both) for both in zip(rows, more, strict=True)]
        elif step == "select":
            chosen = draw(lists(integers(0, len(rows) - 1), min_size=1, max_size=3))
            memory, rows = memory.select(chosen), [rows[i] for i in chosen]
        elif step == "save":
            with tempfile.TemporaryDirectory() as folder:
                memory = Memory.from_pretrained(memory.save_pretrained(Path(folder) / "memory"), model)
        elif step == "half read":
            if max(map(len, rows)) <= 80:
                half_read(model, handle, memory, tiny.pad([tiny.ids(9, seed=seed)] * len(rows), "left"))
        else:
            asked = None if model.config.is_encoder_decoder else tiny.ids(len(rows), 2, seed=3)
            if step == "interrupted":
                interrupted(model, memory, asked)
            else:
                model.generate(**memory.inputs(asked), max_new_tokens=2, do_sample=False, num_beams=2)
    assert_same(model, memory, rows, handle, tiny)


@given(data=data(), rule=sampled_from(sorted(RULES)))
def test_any_sequence_of_append_select_save_and_generate_equals_remembering_at_once(tiny, data, rule):
    check_sequence(tiny, rule, data.draw)


@pytest.mark.slow
@settings(max_examples=200)
@given(data=data(), rule=sampled_from(sorted(RULES)))
def test_two_hundred_sequences_equal_remembering_at_once(tiny, data, rule):
    check_sequence(tiny, rule, data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bart hidden", "llama squeeze"])
def test_sequences_of_two_threads_on_one_model_equal_remembering_at_once(tiny, rule):
    attached(tiny, rule)  # before the threads ask for it

    def work(_):
        @settings(max_examples=25, database=None)
        @given(data=data())
        def sequences(data):
            check_sequence(tiny, rule, data.draw)

        sequences()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


@pytest.mark.parametrize(("rule", "windows"), [("bart hidden", 3), ("llama squeeze", 3)])
def test_only_windows_that_change_are_read(tiny, rule, windows):
    """100 tokens are 12 windows of 16 at stride 8, the last from 84 on; 8 more tokens make 13."""
    model, handle = attached(tiny, rule)
    memory = handle.remember(tiny.ids(1, 100, seed=1))
    body = model.get_encoder() if model.config.is_encoder_decoder else model.model
    read = []
    hook = body.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True)
    handle.append(memory, tiny.ids(1, 8, seed=2))
    hook.remove()
    assert 1 <= sum(map(len, read)) <= windows


def test_the_old_memory_stays_as_it_is_and_branches(tiny):
    model, handle = attached(tiny, "llama squeeze")
    first = tiny.ids(40, seed=1)
    memory = handle.remember(first[None])
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    more = tiny.ids(2, 9, seed=2)
    branches = handle.append(memory.select([0, 0]), more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.tensors().items())
    assert_same(model, branches, [torch.cat([first, row]) for row in more], handle, tiny)


def test_a_half_precision_memory_grows_within_its_rounding(tiny):
    model = tiny.model("llama")
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, memory_dtype="bfloat16", keys_per_query=None)) as handle:
        tokens = tiny.ids(1, 60, seed=1)
        memory = handle.append(handle.remember(tokens[:, :40]), tokens[:, 40:])
        whole = handle.remember(tokens)
        for name, expected in whole.tensors().items():
            found = memory.tensors()[name]
            assert found.dtype == torch.bfloat16
            assert (found.float() - expected.float()).norm() <= 0.01 * expected.float().norm(), name


def test_a_memory_of_other_weights_is_refused_with_both_fingerprints(tiny):
    _, handle = attached(tiny, "bart hidden")
    with unlimiform(tiny.model("bart", seed=5, dtype=torch.float64), handle.config) as other:
        memory = other.remember(tiny.ids(1, 20))
    with pytest.raises(ValueError, match=rf"`memory`.*{memory.fingerprint}"):
        handle.append(memory, tiny.ids(1, 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positions": "origin"}, "`positions` 'origin'.*'squeeze'"),
        ({"overlap": 0.25}, "`overlap` 0.25.*0.5"),
        ({"window": 8}, "`window` 8.*16"),
        ({"first_layer": 1}, "`first_layer` 1.*0"),
    ],
)
def test_a_memory_of_other_options_is_refused_with_both_values(tiny, options, said):
    model = tiny.model("llama")
    config = {"window": WINDOW, "keys_per_query": 4}
    with unlimiform(model, UnlimiformerConfig(**{**config, **options})) as other:
        memory = other.remember(tiny.ids(1, 20))
    with unlimiform(model, UnlimiformerConfig(**config)) as handle, pytest.raises(ValueError, match=said):
        handle.append(memory, tiny.ids(1, 3))


def test_a_memory_of_another_store_is_refused_with_both(tiny):
    model = tiny.model("bart")
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, store="hidden")) as other:
        memory = other.remember(tiny.ids(1, 20))
    config = UnlimiformerConfig(window=WINDOW, store="keys_values")
    with unlimiform(model, config) as handle, pytest.raises(ValueError, match="`store` 'hidden'.*'keys_values'"):
        handle.append(memory, tiny.ids(1, 3))


def test_rows_in_another_number_are_refused_with_both(tiny):
    _, handle = attached(tiny, "llama squeeze")
    with pytest.raises(ValueError, match="each of the memory's 2 rows, got 1"):
        handle.append(handle.remember(tiny.ids(2, 20)), tiny.ids(1, 3))


def test_after_removal_nothing_is_appended(tiny):
    handle = unlimiform(tiny.model("llama"), UnlimiformerConfig(window=WINDOW))
    memory = handle.remember(tiny.ids(1, 20))
    handle.remove()
    with pytest.raises(RuntimeError):
        handle.append(memory, tiny.ids(1, 3))
