"""Every decoder-only family: document and question equal one prompt; chosen keys equal a loop over stock scores;
beams, crops, padding."""

import copy
import itertools

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
)
from transformers.masking_utils import eager_mask

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import CACHE_ARGUMENT, cache_argument
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.families import DECODERS, full_attention_layers, layer_types
from graft.modeling.unlimiformer.memory import Memory
from graft.modeling.unlimiformer.training_regimes import training_with_memory

KINDS = ("gemma2", "gpt_oss", "cohere2", "smollm3", "gpt_neox", "gptj", "gpt2", "opt", "biogpt", "gpt_bigcode")
FAMILIES = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in sorted(DECODERS)]
WINDOW, LENGTH, QUESTION = 16, 45, 6
# The embedding of padding is zero, and so are the scores of a query made of it: a choice among ties is no test.
FREE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [1]}
# Stock rotary tables, and some norms, are float32 in a float64 model, which bounds how close anything comes.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def stock_logits(model, ids, question):
    """The stock model over one prompt; in sliding layers the question sees nothing of the document."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return one_prompt(model, ids, question)


def one_prompt(model, ids, question):
    """Those logits of a model whose attention is eager already."""
    prompt = torch.cat([ids, question], dim=1)
    if len(set(layer_types(model.config))) == 1:
        return model(input_ids=prompt).logits[:, ids.shape[1] :]
    total, window = prompt.shape[1], model.config.sliding_window
    place = torch.arange(total)
    causal = place[:, None] >= place
    sliding = causal & (place[:, None] - place < window)
    sliding[ids.shape[1] :, : ids.shape[1]] = False
    masks = {}
    for name, seen in (("full_attention", causal), ("sliding_attention", sliding)):
        blocked = torch.zeros(1, 1, total, total, dtype=model.dtype)
        masks[name] = blocked.masked_fill(~seen, torch.finfo(model.dtype).min).expand(len(prompt), -1, -1, -1)
    return model(input_ids=prompt, attention_mask=masks).logits[:, ids.shape[1] :]


def test_the_table_of_tiny_models_has_every_family(tiny):
    assert set(tiny.decoders) == set(DECODERS)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_document_and_question_give_the_logits_of_one_prompt(tiny, family):
    model = tiny.model(family, dtype=torch.float64)
    ids, question = tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    with torch.no_grad():
        expected = stock_logits(model, ids, question)
        with unlimiform(model, UnlimiformerConfig(window=64, keys_per_query=None)) as handle:
            memory = handle.remember(ids)
            found = model(**memory.inputs(question)).logits
    assert sorted(memory.keys) == full_attention_layers(model.config)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_question_and_memory_are_those_of_one_prompt(tiny, family):
    model = tiny.model(family, dtype=torch.float64)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    ids, question = tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    options = {"training": "retrieval", "memory_gradient": True}
    config = UnlimiformerConfig(window=64, keys_per_query=None, **options)
    with training_with_memory(model, config, {"memory_ids": ids, "input_ids": question}, 0) as inputs:
        model(**inputs).logits.sin().sum().backward()
    one_prompt(stock, ids, question).sin().sum().backward()
    whole = torch.stack([each.grad.norm() for each in stock.parameters() if each.grad is not None]).norm()
    for (name, found), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        if found.grad is None or expected.grad is None:
            assert found.grad is expected.grad, name
        else:  # a parameter's whole gradient: single numbers carry the rounding of float32 tables
            assert (found.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_has_the_probability_that_one_prompt_gives_it(tiny, family, beams):
    """Greedy tokens are those of one prompt; of beams the scores are, whichever way they went to get there."""
    model = tiny.model(family, dtype=torch.float64)
    ids, question = tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    options = {**FREE, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=64, keys_per_query=None)) as handle:
        found = model.generate(**handle.remember(ids).inputs(question), **options)
        logits = stock_logits(model, ids, found.sequences[:, :-1])[:, QUESTION - 1 :]
    answer = found.sequences[:, QUESTION:, None]
    if beams == 1:
        logits[..., [1, 2]] = -torch.inf  # suppressed, and no end
        assert torch.equal(logits.argmax(-1, keepdim=True), answer)
    else:
        expected = logits.log_softmax(-1).gather(-1, answer).mean((1, 2))
        torch.testing.assert_close(found.sequences_scores.to(expected), expected, **CLOSE)


def naive_attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    """Eager attention by loops in which queries past the document keep their `KEPT` best keys of it."""
    heads, groups, output = query.shape[1], key.shape[1], torch.zeros_like(query)
    slides = kwargs.get("sliding_window") is not None
    for b, h, t in itertools.product(*map(range, query.shape[:3])):
        keys, values = key[b, h * groups // heads], value[b, h * groups // heads]
        scores = scaling * keys @ query[b, h, t]
        allowed = torch.arange(len(keys)) <= t
        if t >= DOCUMENT:
            seen = torch.zeros_like(allowed)
            if not slides:
                seen[scores[:DOCUMENT].argsort(descending=True)[:KEPT]] = True
            allowed[:DOCUMENT] = seen[:DOCUMENT]
        if slides:
            allowed &= torch.arange(len(keys)) > t - module.sliding_window
        scores = scores[allowed] if softcap is None else softcap * (scores[allowed] / softcap).tanh()
        sink = scores.new_full((1,), -torch.inf) if s_aux is None else s_aux[h : h + 1]
        output[b, h, t] = torch.cat([scores, sink]).softmax(0)[:-1] @ values[allowed]
    return output.transpose(1, 2), None


DOCUMENT, KEPT = 14, 3
AttentionInterface.register("naive_few_keys", naive_attention)
AttentionMaskInterface.register("naive_few_keys", eager_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_keys_give_the_logits_of_loops_over_stock_scores(tiny, family):
    model = tiny.model(family, dtype=torch.float64)
    ids, question = tiny.ids(1, DOCUMENT), tiny.ids(1, QUESTION, seed=1)
    naive = copy.deepcopy(model)
    naive.set_attn_implementation("naive_few_keys")
    with torch.no_grad():
        expected = naive(input_ids=torch.cat([ids, question], dim=1)).logits[:, DOCUMENT:]
        with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=KEPT)) as handle:
            found = model(**handle.remember(ids).inputs(question)).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("positions", ["squeeze", "true", "origin"])
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_moved_keys_of_the_first_layer_are_those_rotated_at_their_target(tiny, family, positions):
    """The first layer's keys hang on tokens and positions only, so a stock pass told the targets makes them."""
    if DECODERS[family].positions == "table" and positions != "squeeze":
        pytest.skip("refused: a table of positions has no targets")
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(1, LENGTH)
    places = torch.arange(LENGTH)
    targets = {"squeeze": places * WINDOW // LENGTH, "true": places, "origin": 0 * places}[positions]
    if DECODERS[family].positions == "table":  # as their window had them
        targets = torch.cat([torch.arange(a, b) - s for s, _, a, b in tiny.kept(LENGTH, WINDOW, 0.5, True)])
    cache = DynamicCache()
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, positions=positions)) as handle:
        model(input_ids=ids, position_ids=targets[None], **cache_argument(cache))
        found = handle.remember(ids).keys[0]
    torch.testing.assert_close(found, cache.layers[0].keys, **CLOSE)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_documents_and_questions_generate_what_each_generates_alone(tiny, family, options):
    # Stock Gemma 2 takes its softmax in float32, where the float64 mask of a padded query is -inf throughout.
    model = tiny.model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    rows, questions = [tiny.ids(n, seed=n) for n in (LENGTH, 7)], [tiny.ids(n, seed=n) for n in (3, 6)]
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        inputs = handle.remember(*tiny.pad(rows, "right")).inputs(*tiny.pad(questions, "left"))
        together = model.generate(**inputs, **FREE, **options)[:, 6:]
        for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
            alone = model.generate(**handle.remember(row[None]).inputs(question[None]), **FREE, **options)
            assert torch.equal(together[i], alone[0, len(question) :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_and_what_stands_in_it_move_nothing(tiny, family, side):
    model = tiny.model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)  # as said above
    rows, questions = [tiny.ids(n, seed=n) for n in (LENGTH, 7)], [tiny.ids(n, seed=n) for n in (3, 6)]
    found = []
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        for filler in (7, 60):
            asked, real = tiny.pad(questions, side, filler)
            logits = model(**handle.remember(*tiny.pad(rows, side, filler)).inputs(asked, real)).logits
            found.append([row[there.bool()] for row, there in zip(logits, real, strict=True)])
        for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
            alone = model(**handle.remember(row[None]).inputs(question[None])).logits[0]
            torch.testing.assert_close(found[0][i], alone, **CLOSE)
            assert torch.equal(found[0][i], found[1][i])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cropped_cache_goes_on_as_if_the_cut_tokens_had_never_been(tiny, family):
    model, ids, question = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    wrong_turn = torch.cat([question[:, :4], tiny.ids(2, 2, seed=8)], dim=1)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        memory = handle.remember(ids)
        expected = model(**memory.inputs(question)).logits[:, 4:]
        inputs = memory.inputs(wrong_turn)
        model(**inputs)
        inputs[CACHE_ARGUMENT].crop(-2)
        found = model(**{**inputs, "input_ids": question[:, 4:]}).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_in_pieces_equals_the_whole_and_sees_nothing_later(tiny, family):
    model, ids, question = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    other = ids.clone()
    other[:, :3] = tiny.ids(2, 3, seed=9)
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
        memory = handle.remember(ids)
        whole = model(**memory.inputs(question)).logits
        inputs, pieces = memory.inputs(question), []
        behind = inputs["attention_mask"].shape[1] - QUESTION
        for start in range(0, QUESTION, 2):
            mask = inputs["attention_mask"][:, : behind + start + 2]
            given = {"input_ids": question[:, start : start + 2], "attention_mask": mask}
            pieces.append(model(**given, **{CACHE_ARGUMENT: inputs[CACHE_ARGUMENT]}).logits)
        moved = model(**handle.remember(other).inputs(question)).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
    assert (moved[:, 0] - whole[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_memory_reads_bitwise_the_same_and_removal_gives_the_model_back(tiny, family, tmp_path):
    model, ids, question = tiny.model(family), tiny.ids(2, LENGTH), tiny.ids(2, QUESTION, seed=1)
    with torch.no_grad():
        before = model(input_ids=question).logits
        with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
            memory = handle.remember(ids)
            expected = model(**memory.inputs(question)).logits
            memory.save_pretrained(tmp_path / "memory")
            loaded = Memory.from_pretrained(tmp_path / "memory", model)
            assert torch.equal(model(**loaded.inputs(question)).logits, expected)
            assert torch.equal(model(input_ids=question).logits, before)
        assert torch.equal(model(input_ids=question).logits, before)


# What does not fit


def test_a_decoder_with_a_table_keeps_its_reserve_free(tiny):
    model = tiny.model("gpt2")
    with unlimiform(model, UnlimiformerConfig(reserve=28)) as handle:
        assert handle.window == 100
    with pytest.raises(ValueError, match=r"`reserve` must leave some of the model's 128 positions, got 256"):
        unlimiform(model)


@pytest.mark.parametrize("positions", ["true", "origin"])
def test_rules_of_rotary_positions_are_refused_for_a_table(tiny, positions):
    with pytest.raises(ValueError, match=rf"`positions` '{positions}' moves rotary keys.*table.*\"squeeze\""):
        unlimiform(tiny.model("opt"), UnlimiformerConfig(window=WINDOW, positions=positions))


def test_repr_lists_the_layers_that_hold_memory(tiny):
    with unlimiform(tiny.model("gemma2"), UnlimiformerConfig(window=WINDOW)) as handle:
        assert "layers 0, 2, window 16" in repr(handle)


def test_a_range_without_full_attention_is_refused_with_the_layers_types(tiny):
    config = UnlimiformerConfig(window=WINDOW, first_layer=1, last_layer=2)
    with pytest.raises(ValueError, match=r"layers 1 to 1 of `model` are of type \['sliding_attention'\]"):
        unlimiform(tiny.model("gemma2"), config)


def test_attention_that_this_transformers_computes_by_itself_is_refused(tiny, monkeypatch):
    model = tiny.model("llama")
    monkeypatch.delattr("transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(TypeError, match="LlamaForCausalLM, whose attention transformers .* it needs a newer"):
        unlimiform(model)
