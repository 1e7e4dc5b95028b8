"""Every encoder-decoder family: all keys equal stock full attention over the windows, few keys equal loops; steps,
batches, saving, removal."""

import copy
import itertools
import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import BaseModelOutput, MoEModelOutput

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import CACHE_ARGUMENT, cache_argument
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.families import ENCODER_DECODERS
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.training_regimes import training_with_memory

FAMILIES = sorted(ENCODER_DECODERS)
NEW = sorted(set(FAMILIES) - {"bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100"})
KINDS = ("t5", "switch_transformers", "t5gemma", "led", "fsmt", "bigbird_pegasus")
SOME = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NEW]
STORES = ["hidden", "keys_values"]
WINDOW, LENGTH = 16, 45
ALL = {"keys_per_query": None, "window": WINDOW}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # in float64, but for norms and softmaxes that families take in float32
FREE = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": [1]}


def stock_inputs(model, tiny, ids):
    """Each window encoded alone, the kept parts in their places, for the stock model to attend to in full."""
    documents = []
    with torch.no_grad():
        for row in ids:
            parts = []
            for start, end, first, last in tiny.kept(len(row), WINDOW, 0.5, False):
                encoded = copy.deepcopy(model).get_encoder()(input_ids=row[None, start:end]).last_hidden_state[0]
                parts.append(encoded[first - start : last - start])
            documents.append(torch.cat(parts))
    output = MoEModelOutput if ENCODER_DECODERS[model.config.model_type].is_sparse else BaseModelOutput
    mask = torch.ones(ids.shape, dtype=torch.long)
    return {"encoder_outputs": output(last_hidden_state=torch.stack(documents)), "attention_mask": mask}


def answered(model, inputs, answer):
    """Logits of the stock model. FSMT lets answer tokens given at once see each other, so it gets one at a time."""
    if not ENCODER_DECODERS[model.config.model_type].lacks_causal_mask:
        return model(**inputs, decoder_input_ids=answer).logits
    inputs = {**cache_argument(EncoderDecoderCache(DynamicCache(), DynamicCache())), **inputs}
    return torch.cat([model(**inputs, decoder_input_ids=part).logits for part in answer.split(1, dim=1)], dim=1)


def test_the_table_of_tiny_models_has_every_family(tiny):
    assert set(tiny.encoder_decoders) == set(ENCODER_DECODERS)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", NEW)
def test_all_keys_give_the_logits_of_full_attention_over_the_windows(tiny, family, store):
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH)
    stock, answer = copy.deepcopy(model), tiny.ids(2, 6, seed=1)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
        found = model(**handle.remember(ids).inputs(), decoder_input_ids=answer).logits
        expected = answered(stock, stock_inputs(stock, tiny, ids), answer)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", SOME)
def test_gradients_through_the_memory_are_those_of_full_attention_over_the_windows(tiny, family, store):
    model, ids, answer = tiny.model(family, dtype=torch.float64), tiny.ids(1, LENGTH), tiny.ids(1, 4, seed=1)
    stock = copy.deepcopy(model)
    config = UnlimiformerConfig(**ALL, store=store, training="retrieval")
    with training_with_memory(model, config, {"input_ids": ids, "decoder_input_ids": answer}, 0) as inputs:
        model(**inputs).logits.sin().sum().backward()
    parts = []
    for start, end, first, last in tiny.kept(LENGTH, WINDOW, 0.5, False):
        states = stock.get_encoder()(input_ids=ids[:, start:end]).last_hidden_state
        parts.append(states[:, first - start : last - start])
    inputs = stock_inputs(stock, tiny, ids)
    inputs["encoder_outputs"].last_hidden_state = torch.cat(parts, dim=1)
    answered(stock, inputs, answer).sin().sum().backward()
    whole = torch.stack([each.grad.norm() for each in stock.parameters() if each.grad is not None]).norm()
    for (name, found), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        wanted = torch.zeros_like(expected) if expected.grad is None else expected.grad
        given = torch.zeros_like(found) if found.grad is None else found.grad
        assert (given - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", SOME)
def test_all_keys_generate_what_full_attention_over_the_windows_generates(tiny, family, store, beams):
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH)
    stock = copy.deepcopy(model)
    options = {**FREE, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    with unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
        found = model.generate(**handle.remember(ids).inputs(), **options)
    expected = stock.generate(**stock_inputs(stock, tiny, ids), **options)
    assert torch.equal(found.sequences, expected.sequences)
    for scores, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, wanted, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_within_the_window_gives_the_stock_logits_and_its_keys_give_them_bit_for_bit(tiny, family):
    for store, dtype in (("keys_values", torch.float32), ("hidden", torch.float64)):
        model, ids = tiny.model(family, dtype=dtype), tiny.ids(2, WINDOW)
        with torch.no_grad():
            expected = answered(model, {"input_ids": ids}, tiny.ids(2, 6, seed=1))
            with unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
                found = answered(model, handle.remember(ids).inputs(), tiny.ids(2, 6, seed=1))
        if store == "keys_values":
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, **CLOSE)


KEPT = 5


def naive_cross_attention(query, key, value, scaling, softcap=None):
    """Loops in which each query keeps its `KEPT` best keys: (batch, heads, target, head_dim)."""
    output = torch.zeros_like(query)
    for b, h, t in itertools.product(*map(range, query.shape[:3])):
        group = h * key.shape[1] // query.shape[1]
        scores = scaling * key[b, group] @ query[b, h, t]
        kept = scores.argsort(descending=True)[:KEPT]
        scores = scores[kept] if softcap is None else softcap * (scores[kept] / softcap).tanh()
        output[b, h, t] = scores.softmax(0) @ value[b, group, kept]
    return output


def naive_where_keys_are_the_documents(module, query, key, value, attention_mask, **kwargs):
    """Those loops in cross-attention, which the number of keys tells apart; the family's own eager code elsewhere."""
    if key.shape[2] != LENGTH:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, **kwargs)
    scaling = 1.0 if kwargs.get("scaling") is None else kwargs["scaling"]
    return naive_cross_attention(query, key, value, scaling, kwargs.get("softcap")).transpose(1, 2), None


AttentionInterface.register("naive_few_keys_across", naive_where_keys_are_the_documents)
AttentionMaskInterface.register("naive_few_keys_across", eager_mask)


def loop_in_place(module, args, kwargs, output):
    """Forward hook of a cross-attention that computes its own softmax: the loops' answer in place of its own."""
    if "query" in kwargs:  # FSMT: time first
        hidden, states = (kwargs[name].transpose(0, 1) for name in ("query", "key"))
    else:
        hidden, states = kwargs["hidden_states"], kwargs["key_value_states"]
    query, key, value = (
        project(tensor).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for project, tensor in ((module.q_proj, hidden), (module.k_proj, states), (module.v_proj, states))
    )
    summed = naive_cross_attention(query, key, value, query.shape[-1] ** -0.5)
    answer = module.out_proj(summed.transpose(1, 2).flatten(2))
    return (answer.transpose(0, 1) if "query" in kwargs else answer, *output[1:])


def make_naive(model):
    """A copy of `model` whose cross-attention is made of loops."""
    naive = copy.deepcopy(model)
    if not ENCODER_DECODERS[model.config.model_type].swapped:
        for part in (naive, naive.get_decoder()):  # 5.17 does not pass it on to the decoders of the T5 family
            part.set_attn_implementation("naive_few_keys_across")
        return naive
    for layer in naive.get_decoder().layers:
        layer.encoder_attn.register_forward_hook(loop_in_place, with_kwargs=True)
    return naive


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", NEW)
def test_few_keys_give_the_logits_of_naive_loops(tiny, family, store):
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(1, LENGTH)
    answer = tiny.ids(1, 4, seed=1)
    with torch.no_grad():
        expected = answered(make_naive(model), stock_inputs(model, tiny, ids), answer)
        full = answered(model, stock_inputs(model, tiny, ids), answer)
        with unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=KEPT)) as handle:
            found = model(**handle.remember(ids).inputs(), decoder_input_ids=answer).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - full).abs().max() > 1e-3


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("family", NEW)
def test_cached_steps_and_crops_give_the_logits_of_teacher_forcing(tiny, family, store):
    model, ids, answer = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, 6, seed=1)
    wrong = tiny.ids(2, 2, seed=2)
    with (
        torch.no_grad(),
        unlimiform(model, UnlimiformerConfig(window=WINDOW, store=store, keys_per_query=4)) as handle,
    ):
        memory = handle.remember(ids)
        whole = model(**memory.inputs(), decoder_input_ids=answer).logits
        inputs = memory.inputs()
        steps = [model(**inputs, decoder_input_ids=part).logits for part in answer[:, :5].split([1, 3, 1], dim=1)]
        model(**inputs, decoder_input_ids=wrong)
        inputs[CACHE_ARGUMENT].crop(-2)
        steps.append(model(**inputs, decoder_input_ids=answer[:, 5:]).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_answer_tokens_move_no_earlier_logit_but_the_document_moves_the_first(tiny, family):
    model, ids, answer = tiny.model(family), tiny.ids(1, LENGTH), tiny.ids(1, 5, seed=1)
    changed, other = answer.clone(), ids.clone()
    changed[0, 3] = (answer[0, 3] + 1) % 50 + 3
    other[0, 30:40] = tiny.ids(10, seed=9)  # behind the first window
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        memory = handle.remember(ids)
        before = model(**memory.inputs(), decoder_input_ids=answer).logits
        after = model(**memory.inputs(), decoder_input_ids=changed).logits
        moved = model(**handle.remember(other).inputs(), decoder_input_ids=answer).logits
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])
    assert (before[:, 0] - moved[:, 0]).abs().max() > (1e-4 if family in NEW else 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", NEW)
def test_padding_on_either_side_and_what_stands_in_it_move_nothing(tiny, family, side):
    model, rows = tiny.model(family, dtype=torch.float64), [tiny.ids(n, seed=n) for n in (LENGTH, 9)]
    given = {"decoder_input_ids": tiny.ids(2, 4, seed=1)}
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        found = [model(**handle.remember(*tiny.pad(rows, side, f)).inputs(), **given).logits for f in (1, 7, 60)]
        for i, row in enumerate(rows):
            alone = model(
                **handle.remember(row[None]).inputs(), decoder_input_ids=given["decoder_input_ids"][i : i + 1]
            )
            torch.testing.assert_close(found[0][i : i + 1], alone.logits, **CLOSE)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", SOME)
def test_padded_documents_generate_what_each_generates_alone_with_beams(tiny, family):
    model, rows = tiny.model(family, dtype=torch.float64), [tiny.ids(n, seed=n) for n in (LENGTH, 9)]
    config = UnlimiformerConfig(window=WINDOW, keys_per_query=4)
    with unlimiform(model, config) as handle:
        together = model.generate(**handle.remember(*tiny.pad(rows, "right")).inputs(), num_beams=3, **FREE)
        for i, row in enumerate(rows):
            alone = model.generate(**handle.remember(row[None]).inputs(), num_beams=3, **FREE)
            assert torch.equal(together[i, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("family", SOME)
def test_a_memory_is_saved_and_read_and_removal_gives_the_model_back(tiny, family, tmp_path):
    model, ids, prompt = tiny.model(family), tiny.ids(2, LENGTH), {"decoder_input_ids": tiny.ids(2, 5, seed=1)}
    modules = dict(model.named_modules())
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(input_ids=ids[:, :40], **prompt).logits
        with unlimiform(model, UnlimiformerConfig(window=40, keys_per_query=4)) as handle:
            assert list(model.state_dict()) == names
            memory = handle.remember(ids)
            expected = model(**memory.inputs(), **prompt).logits
            memory.save_pretrained(tmp_path / "memory")
            loaded = Memory.from_pretrained(tmp_path / "memory", model)
            assert torch.equal(model(**loaded.inputs(), **prompt).logits, expected)
            other = ids.clone()
            other[:, :3] = tiny.ids(2, 3, seed=9)
            moved = model(**handle.remember(other).inputs(), **prompt).logits
            assert (moved[:, 0] - expected[:, 0]).abs().max() > 1e-4
            assert torch.equal(model(input_ids=ids[:, :40], **prompt).logits, before)
        assert torch.equal(model(input_ids=ids[:, :40], **prompt).logits, before)
    assert dict(model.named_modules()) == modules
