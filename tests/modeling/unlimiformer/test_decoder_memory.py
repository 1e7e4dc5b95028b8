"""Decoders with a memory: document and question equal one prompt, and naive loops where keys are chosen."""

import copy
import itertools
from functools import partial

import pytest
import torch

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import ASSISTS_FROM_A_CACHE, CACHE_ARGUMENT
from graft.modeling.unlimiformer.attach import unlimiform

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
WINDOW, LENGTH = 16, 45
CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # scores reach 20
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FREE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}


def few_keys(**options):
    return UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, **options})


def all_keys(**options):
    return UnlimiformerConfig(**{"window": 64, "keys_per_query": None, **options})


# Document and question equal one prompt


@pytest.mark.parametrize("question_length", [1, 7, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_document_and_question_give_the_logits_of_one_prompt(tiny, family, question_length):
    model, ids, question = tiny.model(family), tiny.ids(2, LENGTH), tiny.ids(2, question_length, seed=1)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([ids, question], dim=1)).logits[:, LENGTH:]
        with unlimiform(model, all_keys()) as handle:
            found = model(**handle.remember(ids).inputs(question)).logits
    torch.testing.assert_close(found, expected, **CLOSE)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_document_and_question_generate_what_one_prompt_generates(tiny, family, mode):
    model, ids, question = tiny.model(family), tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=1)
    options = {**FREE, **MODES[mode]}
    torch.manual_seed(3)
    expected = model.generate(torch.cat([ids, question], dim=1), **options)[:, LENGTH:]
    with unlimiform(model, all_keys()) as handle:
        inputs = handle.remember(ids).inputs(question)
        torch.manual_seed(3)
        found = model.generate(**inputs, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("store", ["auto", "keys_values"])
def test_handle_generate_splits_off_local_tokens_and_equals_one_prompt(tiny, store):
    model, ids = tiny.model("llama"), tiny.ids(2, LENGTH)
    expected = model.generate(ids, **FREE)
    with unlimiform(model, all_keys(local_tokens=6, store=store)) as handle:
        found = handle.generate(ids, **FREE)
    assert torch.equal(found, expected[:, LENGTH - 6 :])


def test_handle_generate_of_a_short_input_is_the_stock_models(tiny):
    model, ids = tiny.model("llama"), tiny.ids(2, 12)
    expected = model.generate(ids, **FREE)
    with unlimiform(model, few_keys(local_tokens=12)) as handle:
        assert torch.equal(handle.generate(ids, **FREE), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_handle_generate_of_padded_inputs_equals_each_alone(tiny, side):
    model, rows = tiny.model("llama"), [tiny.ids(n, seed=n) for n in (LENGTH, 20, 9)]
    with unlimiform(model, few_keys(local_tokens=6)) as handle:
        together = handle.generate(*tiny.pad(rows, side), **FREE)
        alone = [handle.generate(row[None], **FREE) for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_documents_within_and_beyond_local_tokens_in_one_call_are_refused(tiny):
    with (
        unlimiform(tiny.model("llama"), few_keys(local_tokens=12)) as handle,
        pytest.raises(ValueError, match=r"document of 9 tokens.*`local_tokens` 12.*45.*separate calls"),
    ):
        handle.generate(*tiny.pad([tiny.ids(LENGTH), tiny.ids(9)], "left"), **FREE)


# Naive loops


def naive_rotated(key, position, frequencies):
    """One key (head_dim,) turned to `position`."""
    half = len(frequencies)
    angle = position * frequencies
    first, second = key[:half], key[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def naive_target(position, length, rule):
    if rule == "origin":
        return 0
    return position * WINDOW // length if rule == "squeeze" and length > WINDOW else position


def note(seen, name, module, args, output):
    seen[name] = output


def naive_memory(model, ids, kept, rule):
    """Per layer, keys (groups, tokens, head_dim), each turned once and directly to its place, and values.

    Keys before their rotation are seen by hooks, in a plain pass over each window of one document.
    """
    layers = model.model.layers
    length, frequencies = len(ids), model.model.rotary_emb.inv_freq.double()
    keys, values = [[] for _ in layers], [[] for _ in layers]
    for start, end, first, last in kept:
        seen, hooks = {}, []
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            for name, module in (("k", getattr(attention, "k_norm", attention.k_proj)), ("v", attention.v_proj)):
                hooks.append(module.register_forward_hook(partial(note, seen, (i, name))))
        with torch.no_grad():
            model.model(input_ids=ids[None, start:end], use_cache=False)
        for hook in hooks:
            hook.remove()
        for i in range(len(layers)):
            for position in range(first, last):
                unrotated = seen[i, "k"][0, position - start].view(2, 8)
                target = naive_target(position, length, rule)
                keys[i].append(torch.stack([naive_rotated(k, target, frequencies) for k in unrotated]))
                values[i].append(seen[i, "v"][0, position - start].view(2, 8))
    return [(torch.stack(k, dim=1), torch.stack(v, dim=1)) for k, v in zip(keys, values, strict=True)]


def make_naive(model, memories, taken, config):
    """Replace every self-attention of `model` by loops over rows, heads and tokens: one softmax over all keys seen.

    Args:
        memories: of each row, what `naive_memory` returned.
        taken: of each row, positions the memory takes.
        config: an UnlimiformerConfig whose rule the loops follow.
    """
    layers = model.model.layers
    first, last = config.first_layer % len(layers), config.last_layer
    last = len(layers) if last is None else last % len(layers)
    frequencies = model.model.rotary_emb.inv_freq.double()

    def projected(attention, name, hidden, width=8):
        states = getattr(attention, f"{name}_proj")(hidden).view(*hidden.shape[:-1], -1, width)
        return getattr(attention, f"{name}_norm")(states) if hasattr(attention, f"{name}_norm") else states

    def forward_of(index, attention):
        def forward(hidden_states, *args, **kwargs):
            batch, target, _ = hidden_states.shape
            query, key, value = (projected(attention, name, hidden_states) for name in "qkv")
            output = torch.zeros_like(query)
            for b, t, h in itertools.product(range(batch), range(target), range(query.shape[2])):
                group = h // 2
                q = naive_rotated(query[b, t, h], taken[b] + t, frequencies) * 8**-0.5
                local = [naive_rotated(key[b, j, group], taken[b] + j, frequencies) for j in range(t + 1)]
                all_keys, all_values = torch.stack(local), value[b, : t + 1, group]
                if first <= index < last and (config.heads is None or h in config.heads):
                    keys, values = (tensor[group] for tensor in memories[b][index])
                    if config.exclude_window and len(keys) > WINDOW:
                        keys, values = keys[WINDOW:], values[WINDOW:]
                    ranking = keys @ q
                    ranking[: config.sinks] = torch.inf
                    kept = ranking.argsort(descending=True)[: config.keys_per_query]
                    all_keys, all_values = torch.cat([keys[kept], all_keys]), torch.cat([values[kept], all_values])
                output[b, t, h] = (all_keys @ q).softmax(0) @ all_values
            return attention.o_proj(output.flatten(2)), None

        return forward

    for index, layer in enumerate(layers):
        layer.self_attn.forward = forward_of(index, layer.self_attn)
    return model


RULES = {
    "few keys": {},
    "all keys": {"keys_per_query": None},
    "two heads": {"heads": [0, 3]},
    "one head of a group": {"heads": [2]},
    "upper layers": {"first_layer": 1},
    "lower layers": {"last_layer": -1},
    "sinks": {"sinks": 2},
    "only sinks": {"sinks": 4},
    "without the window": {"exclude_window": True},
    "true": {"positions": "true"},
    "origin": {"positions": "origin"},
    "no overlap": {"overlap": 0.0},
    "much at once": {"heads": [1, 2], "first_layer": -2, "last_layer": 2, "sinks": 1, "positions": "origin"},
}


def naive_logits(tiny, model, rows, questions, config):
    """Logits of each question behind its document, by loops in float64."""
    memories, taken = [], []
    for row in rows:
        kept = tiny.kept(len(row), WINDOW, config.overlap, causal=True)
        memories.append(naive_memory(model, row, kept, config.positions))
        taken.append(len(row) if config.positions == "true" else min(len(row), WINDOW))
    naive = make_naive(copy.deepcopy(model), memories, taken, config)
    with torch.no_grad():
        return naive(input_ids=questions, use_cache=False).logits


@pytest.mark.parametrize("rule", RULES)
def test_chosen_keys_give_the_logits_of_naive_loops(tiny, rule):
    """The stock model makes its rotary tables in float32, which bounds how close it comes to the loops."""
    model = tiny.model("llama", dtype=torch.float64)
    rows, questions, config = [tiny.ids(LENGTH), tiny.ids(9, seed=1)], tiny.ids(2, 5, seed=2), few_keys(**RULES[rule])
    expected = naive_logits(tiny, model, rows, questions, config)
    with torch.no_grad(), unlimiform(model, config) as handle:
        found = model(**handle.remember(*tiny.pad(rows, "left")).inputs(questions)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_keys_give_the_logits_of_naive_loops_in_every_family(tiny, family):
    model = tiny.model(family, dtype=torch.float64)
    ids, question, config = tiny.ids(1, LENGTH), tiny.ids(1, 5, seed=2), few_keys()
    expected = naive_logits(tiny, model, [ids[0]], question, config)
    with torch.no_grad(), unlimiform(model, config) as handle:
        found = model(**handle.remember(ids).inputs(question)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_outside_the_range_attend_to_local_tokens_behind_the_memorys_positions(tiny):
    """With a memory in no layer that is read, only positions are left of it: and rotary attention is relative."""
    model, ids, question = tiny.model("llama", num_hidden_layers=2), tiny.ids(1, LENGTH), tiny.ids(1, 6, seed=1)
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad(), unlimiform(model, few_keys(first_layer=1)) as handle:
        memory = handle.remember(ids)
        seen.clear()
        model(**memory.inputs(question))
        model(input_ids=question)
    hook.remove()
    found, alone = (out[0] if isinstance(out, tuple) else out for out in seen)
    torch.testing.assert_close(found, alone, **CLOSE)


# Steps, pieces and crops


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pieces", [[3, 4], [1, 5, 1], [1] * 7])
def test_a_question_in_pieces_equals_the_whole_question(tiny, rule, pieces):
    model, ids, question = tiny.model("llama", dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, 7, seed=1)
    with torch.no_grad(), unlimiform(model, few_keys(**RULES[rule])) as handle:
        memory = handle.remember(ids)
        whole = model(**memory.inputs(question)).logits
        cache, steps, mask = memory.inputs(question)[CACHE_ARGUMENT], [], memory.inputs(question)["attention_mask"]
        behind, done = mask.shape[1] - 7, 0
        for part in question.split(pieces, dim=1):
            done += part.shape[1]
            inputs = {"input_ids": part, "attention_mask": mask[:, : behind + done], CACHE_ARGUMENT: cache}
            steps.append(model(**inputs).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_whole_forwards(tiny, family):
    model, ids, question = tiny.model(family), tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=1)
    with torch.no_grad(), unlimiform(model, few_keys()) as handle:
        memory = handle.remember(ids)
        found = model.generate(**memory.inputs(question), **FREE)
        sequence = question
        for _ in range(8):
            logits = model(**memory.inputs(sequence)).logits[:, -1]
            logits[:, 2] = -torch.inf  # no end
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, sequence)


def test_a_cropped_cache_goes_on_as_if_the_cut_tokens_had_never_been(tiny):
    model, ids, question = tiny.model("llama", dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, 7, seed=1)
    with torch.no_grad(), unlimiform(model, few_keys()) as handle:
        memory = handle.remember(ids)
        expected = model(**memory.inputs(question)).logits[:, 4:]
        wrong_turn = torch.cat([question[:, :4], tiny.ids(2, 3, seed=8)], dim=1)
        inputs = memory.inputs(wrong_turn)
        model(**inputs)
        inputs[CACHE_ARGUMENT].crop(-3)
        found = model(**{**inputs, "input_ids": question[:, 4:]}).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Batches


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("document_side", ["left", "right"])
@pytest.mark.parametrize("question_side", ["left", "right"])
def test_documents_and_questions_of_different_lengths_equal_each_alone(tiny, rule, document_side, question_side):
    model = tiny.model("llama", dtype=torch.float64)
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 7, 20)]
    questions = [tiny.ids(n, seed=n) for n in (3, 6, 1)]
    asked, real = tiny.pad(questions, question_side)
    with torch.no_grad(), unlimiform(model, few_keys(**RULES[rule])) as handle:
        inputs = handle.remember(*tiny.pad(rows, document_side)).inputs(asked, real)
        together = model(**inputs).logits
        for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
            alone = model(**handle.remember(row[None]).inputs(question[None])).logits[0]
            torch.testing.assert_close(together[i][real[i].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_documents_and_questions_generate_what_each_generates_alone(tiny, family, mode):
    model = tiny.model(family)
    rows = [tiny.ids(n, seed=n) for n in (LENGTH, 7, 20)]
    questions = [tiny.ids(n, seed=n) for n in (3, 6, 1)]
    options = {**FREE, **MODES[mode]}
    with unlimiform(model, few_keys()) as handle:
        inputs = handle.remember(*tiny.pad(rows, "right")).inputs(*tiny.pad(questions, "left"))
        together = model.generate(**inputs, **options)[:, 6:]
        for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
            alone = model.generate(**handle.remember(row[None]).inputs(question[None]), **options)
            assert torch.equal(together[i], alone[0, len(question) :])


def test_sampling_from_padded_rows_equals_sampling_from_unpadded_ones_under_one_seed(tiny):
    model, rows = tiny.model("llama"), [tiny.ids(LENGTH), tiny.ids(LENGTH, seed=1)]
    questions = tiny.ids(2, 4, seed=2)
    options = {**FREE, "do_sample": True, "temperature": 1.5}
    with unlimiform(model, few_keys()) as handle:
        torch.manual_seed(4)
        plain = model.generate(**handle.remember(torch.stack(rows)).inputs(questions), **options)
        padded = tiny.pad([*rows, tiny.ids(60, seed=5)], "left")
        memory = handle.remember(*padded).select([0, 1])
        asked = torch.cat([torch.full((2, 2), 1), questions], dim=1)
        torch.manual_seed(4)
        found = model.generate(**memory.inputs(asked, (asked != 1).long()), **options)
    assert torch.equal(found[:, 6:], plain[:, 4:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_moves_nothing(tiny, side):
    model, rows, questions = tiny.model("llama"), [tiny.ids(LENGTH), tiny.ids(7)], [tiny.ids(5), tiny.ids(2)]
    found = []
    with torch.no_grad(), unlimiform(model, few_keys()) as handle:
        for filler in (1, 7, 60):
            asked, real = tiny.pad(questions, side, filler)
            memory = handle.remember(*tiny.pad(rows, side, filler))
            found.append(model(**memory.inputs(asked, real)).logits[real.bool()])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_many_questions_of_few_documents_equal_each_alone(tiny):
    model, ids = tiny.model("llama", dtype=torch.float64), tiny.ids(2, LENGTH)
    asked, rows = tiny.ids(4, 5, seed=3), [1, 0, 1, 1]
    with torch.no_grad(), unlimiform(model, few_keys()) as handle:
        memory = handle.remember(ids)
        together = model(**memory.select(rows).inputs(asked)).logits
        for i, document in enumerate(rows):
            alone = model(**memory[document].inputs(asked[i : i + 1])).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)


def test_beams_of_selected_rows_equal_those_of_repeated_documents(tiny):
    model, ids, asked = tiny.model("llama"), tiny.ids(2, LENGTH), tiny.ids(4, 5, seed=3)
    options = {**FREE, "num_beams": 3}
    with unlimiform(model, few_keys()) as handle:
        selected = model.generate(**handle.remember(ids).select([1, 0, 0, 1]).inputs(asked), **options)
        stored = model.generate(**handle.remember(ids[[1, 0, 0, 1]]).inputs(asked), **options)
    assert torch.equal(selected, stored)


def test_windows_per_batch_moves_nothing_but_the_last_digits(tiny):
    model, rows = tiny.model("llama", dtype=torch.float64), [tiny.ids(n, seed=n) for n in (LENGTH, 40, 12)]
    question, found = tiny.ids(3, 4, seed=2), []
    for size in (1, 2, 5, "auto"):
        with torch.no_grad(), unlimiform(model, few_keys(windows_per_batch=size)) as handle:
            found.append(model(**handle.remember(*tiny.pad(rows, "right")).inputs(question)).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **EXACT)


# Assisted decoding


@pytest.mark.skipif(not ASSISTS_FROM_A_CACHE, reason="transformers older than 5.18")
@pytest.mark.parametrize("keys_per_query", [4, None])
def test_assisted_decoding_generates_the_greedy_tokens(tiny, keys_per_query):
    model, ids = tiny.model("llama"), tiny.ids(1, LENGTH)
    question = torch.cat([tiny.ids(1, 6)] * 2, dim=1)
    with unlimiform(model, few_keys(keys_per_query=keys_per_query)) as handle:
        memory = handle.remember(ids)
        greedy = model.generate(**memory.inputs(question), **{**FREE, "max_new_tokens": 20})
        options = {**FREE, "max_new_tokens": 20, "prompt_lookup_num_tokens": 3}
        assisted = model.generate(**memory.inputs(question), **options)
    assert torch.equal(assisted, greedy)


@pytest.mark.skipif(ASSISTS_FROM_A_CACHE, reason="transformers 5.18 or newer")
def test_assisted_decoding_is_refused_where_transformers_would_cut_the_mask(tiny):
    model, question = tiny.model("llama"), tiny.ids(1, 6)
    with unlimiform(model, few_keys()) as handle:
        inputs = handle.remember(tiny.ids(1, LENGTH)).inputs(question)
        with pytest.raises(RuntimeError, match=r"transformers 5\.18 or newer"):
            model.generate(**inputs, **FREE, prompt_lookup_num_tokens=3)


def test_assisted_decoding_of_a_padded_question_is_refused(tiny):
    model, question = tiny.model("llama"), tiny.ids(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with unlimiform(model, few_keys()) as handle:
        inputs = handle.remember(tiny.ids(1, LENGTH)).inputs(question, mask)
        with pytest.raises(RuntimeError, match="question without padding"):
            model.generate(**inputs, **FREE, prompt_lookup_num_tokens=3)


# Causality, gradients, dtypes


@pytest.mark.parametrize("family", FAMILIES)
def test_later_question_tokens_move_no_earlier_logit_but_the_document_moves_the_first(tiny, family):
    model, ids, question = tiny.model(family), tiny.ids(1, LENGTH), tiny.ids(1, 6, seed=1)
    changed, other = question.clone(), ids.clone()
    changed[0, 3] = (question[0, 3] + 1) % 50 + 3
    other[0, :5] = tiny.ids(5, seed=9)
    with torch.no_grad(), unlimiform(model, few_keys()) as handle:
        memory = handle.remember(ids)
        before = model(**memory.inputs(question)).logits
        after = model(**memory.inputs(changed)).logits
        moved = model(**handle.remember(other).inputs(question)).logits
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])
    assert (before[:, 0] - moved[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("keys_per_query", [4, None])
def test_gradients_through_a_question_behind_a_memory_are_those_of_naive_loops(tiny, keys_per_query):
    model, ids, question = tiny.model("llama", dtype=torch.float64), tiny.ids(1, LENGTH), tiny.ids(1, 6, seed=1)
    config = few_keys(keys_per_query=keys_per_query)
    memories = [naive_memory(model, ids[0], tiny.kept(LENGTH, WINDOW, 0.5, causal=True), "squeeze")]
    naive = make_naive(copy.deepcopy(model), memories, [WINDOW], config)
    with unlimiform(model, config) as handle:
        memory = handle.remember(ids)
        assert not any(tensor.requires_grad for tensor in memory.keys.values())
        for each, inputs in ((model, memory.inputs(question)), (naive, {"input_ids": question, "use_cache": False})):
            each(**inputs).logits.log_softmax(-1)[..., 7].sum().backward()
    wanted = dict(naive.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-3)
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_memory_drifts_by_its_rounding_and_halves_the_bytes(tiny, dtype):
    model, ids, question = tiny.model("llama"), tiny.ids(2, LENGTH), tiny.ids(2, 6, seed=1)
    found, sizes = [], []
    for stored in (None, dtype):
        with torch.no_grad(), unlimiform(model, few_keys(keys_per_query=None, memory_dtype=stored)) as handle:
            memory = handle.remember(ids)
            sizes.append(memory.nbytes)
            found.append(model(**memory.inputs(question)).logits)
    assert sizes[1] * 2 == sizes[0]
    drift = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert 0 < drift < 20 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_implementation_moves_nothing(tiny, implementation):
    rows, questions = [tiny.ids(LENGTH), tiny.ids(9)], [tiny.ids(5), tiny.ids(3)]
    logits = []
    for each in ("sdpa", implementation):
        model = tiny.model("llama")
        model.set_attn_implementation(each)
        asked, real = tiny.pad(questions, "left")
        with torch.no_grad(), unlimiform(model, few_keys()) as handle:
            inputs = handle.remember(*tiny.pad(rows, "right")).inputs(asked, real)
            logits.append(model(**inputs).logits[real.bool()])
    torch.testing.assert_close(logits[0], logits[1], **CLOSE)
