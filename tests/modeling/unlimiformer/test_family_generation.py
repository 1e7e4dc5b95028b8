"""Every family, decoder or encoder-decoder, behind a memory of few keys: beams, samples, assisted decoding, growing,
threads, removal."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.transformers_compat import ASSISTS_FROM_A_CACHE
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.families import DECODERS, ENCODER_DECODERS

KINDS = ("bart", "t5", "t5gemma", "led", "fsmt", "nllb-moe", "llama", "gemma2", "gpt_oss", "gpt_neox", "gpt2", "opt")
FAMILIES = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in sorted(DECODERS) + sorted(ENCODER_DECODERS)
]
WINDOW, LENGTH = 16, 45
FEW = UnlimiformerConfig(window=WINDOW, keys_per_query=4)
FREE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1, "suppress_tokens": [1]}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # stock rotary tables and some norms are float32 in a float64 model


def question_of(model, tiny, rows):
    """What a decoder is asked; an encoder-decoder begins by itself."""
    return () if model.config.is_encoder_decoder else (tiny.ids(rows, 4, seed=7),)


def teacher_forced(model, memory, sequences):
    """Logits behind a memory, of tokens that were generated."""
    if model.config.is_encoder_decoder:
        return model(**memory.inputs(), decoder_input_ids=sequences[:, :-1]).logits
    return model(**memory.inputs(sequences[:, :-1])).logits[:, 3:]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_have_the_scores_of_documents_that_are_stored_for_each_row(tiny, family):
    """Rows that follow beams around must find their own document: here none shares one."""
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH)
    options = {**FREE, "num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    with torch.no_grad(), unlimiform(model, FEW) as handle:
        found = model.generate(
            **handle.remember(ids).inputs(*question_of(model, tiny, 2)), output_scores=True, **options
        )
        repeated = handle.remember(ids.repeat_interleave(3, dim=0))
        logits = teacher_forced(model, repeated, found.sequences)
    answer = found.sequences[:, -5:, None]
    scores = logits.log_softmax(-1).gather(-1, answer).mean((1, 2))
    torch.testing.assert_close(found.sequences_scores.to(scores), scores, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_samples_are_those_of_as_many_rows_under_one_seed(tiny, family):
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH)
    options = {**FREE, "do_sample": True}
    with unlimiform(model, FEW) as handle:
        memory, asked = handle.remember(ids), question_of(model, tiny, 2)
        torch.manual_seed(5)
        several = model.generate(**memory.inputs(*asked), num_return_sequences=3, **options)
        torch.manual_seed(5)
        rows = memory.select([0, 0, 0, 1, 1, 1])
        separate = model.generate(**rows.inputs(*(each.repeat_interleave(3, 0) for each in asked)), **options)
    assert torch.equal(several, separate)
    assert len({tuple(row) for row in several.tolist()}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_generates_the_greedy_tokens(tiny, family):
    """From a prompt that repeats itself, so that its own words are tried as the answer's."""
    model = tiny.model(family, dtype=torch.float64)
    if not (model.config.is_encoder_decoder or ASSISTS_FROM_A_CACHE):
        pytest.skip("refused before transformers 5.18")
    prompt, options = torch.cat([tiny.ids(1, 6)] * 2, dim=1), {**FREE, "max_new_tokens": 12}
    if model.config.is_encoder_decoder:
        prompt[:, 0] = model.config.decoder_start_token_id or 0
    with unlimiform(model, FEW) as handle:
        memory = handle.remember(tiny.ids(1, LENGTH))
        greedy = model.generate(**memory.inputs(prompt), **options)
        assisted = model.generate(**memory.inputs(prompt), **options, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grown_memory_gives_the_logits_of_one_that_read_everything_at_once(tiny, family):
    model, ids, answer = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH), tiny.ids(2, 5, seed=1)
    with torch.no_grad(), unlimiform(model, FEW) as handle:
        grown = handle.append(handle.remember(ids[:, :30]), ids[:, 30:])
        found, expected = (teacher_forced(model, memory, answer) for memory in (grown, handle.remember(ids)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_with_different_memories_answer_as_one_after_the_other(tiny, family):
    model = tiny.model(family)
    with unlimiform(model, FEW) as handle:
        memories = [handle.remember(tiny.ids(2, length, seed=length)) for length in (45, 33)]

        def answer(memory):
            """Tokens and the score of each row, which tells memories apart where tokens do not."""
            options = {**FREE, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
            found = model.generate(**memory.inputs(*question_of(model, tiny, 2)), **options)
            return found.sequences, found.sequences_scores

        start = Barrier(2)

        def at_once(memory):
            start.wait()
            return [answer(memory) for _ in range(4)]

        in_turn = list(map(answer, memories))
        with ThreadPoolExecutor(2) as pool:
            for expected, found in zip(in_turn, pool.map(at_once, memories), strict=True):
                for each in found:
                    torch.testing.assert_close(each, expected)
    assert not torch.allclose(*(scores for _, scores in in_turn))


def left_behind(model):
    """What attaching could change, by name: values, and identities where objects must be the same."""
    modules = dict(model.named_modules())
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "configs": {name: id(module.config) for name, module in modules.items() if hasattr(module, "config")},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind_by_removal_nor_by_an_exception_after_which_it_is_served_again(tiny, family):
    model, ids = tiny.model(family), tiny.ids(1, LENGTH)
    model.generate(ids[:, :9], **FREE)  # what a model leaves on itself is not ours
    before, weights = left_behind(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def answer(handle):
        return model.generate(**handle.remember(ids).inputs(*question_of(model, tiny, 1)), **FREE)

    def fail(handle):
        answers.append(answer(handle))
        raise KeyError("mine")

    answers = []
    with pytest.raises(KeyError, match="mine"), unlimiform(model, FEW) as handle:
        fail(handle)
    assert left_behind(model) == before
    with unlimiform(model, FEW) as handle:
        answers.append(answer(handle))
    assert left_behind(model) == before
    assert torch.equal(*answers)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
