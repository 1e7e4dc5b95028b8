"""Generation of a retro-fitted decoder: with its cache it is a recomputation of everything, row by row."""

import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from graft import UnlimiformerConfig, unlimiform
from graft.modeling.retro.retriever import CachingRetriever, FixedNeighbours
from graft.modeling.transformers_compat import cache_argument, cache_of

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "gemma3_text", "olmo2"]


def last_logits(model, ids, retriever):
    """What a full recomputation, without any cache, says comes next."""
    retrieved = retriever.retrieved(ids) if ids.shape[1] >= 4 else None
    with torch.no_grad():
        return model(ids, retrieved=retrieved, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 7, 8])
def test_every_token_of_greedy_generation_is_the_best_of_a_full_recomputation(decoders, family, prompt):
    model, handle = decoders.fit(family, eos_token_id=None)
    ids, retriever = decoders.ids(2, prompt), decoders.Retriever()
    found = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=18, do_sample=False)
    assert found.shape == (2, prompt + 18)
    for length in range(prompt, found.shape[1]):
        scores = last_logits(model, found[:, :length], retriever)
        chosen = scores.gather(1, found[:, length, None])[:, 0]
        torch.testing.assert_close(chosen, scores.max(1).values, rtol=1e-6, atol=1e-6)
    stock = model.generate(**handle.inputs(ids), max_new_tokens=18, do_sample=False)
    assert not torch.equal(found, stock)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_of_beams_are_those_of_a_full_recomputation(decoders, family):
    model, handle = decoders.fit(family, eos_token_id=None)
    ids, retriever = decoders.ids(2, 6), decoders.Retriever()
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    output = model.generate(
        **handle.inputs(ids, retriever=retriever), **options, return_dict_in_generate=True, output_scores=True
    )
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        total = 0.0
        for length in range(6, 18):
            logprobs = last_logits(model, sequence[None, :length], retriever).log_softmax(-1)
            total += logprobs[0, sequence[length]].item()
        assert abs(total - score.item()) < 1e-4


def test_sampling_with_a_seed_equals_sampling_from_a_recomputation(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    ids, retriever = decoders.ids(1, 6), decoders.Retriever()
    torch.manual_seed(3)
    found = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=10, do_sample=True, top_k=0)
    torch.manual_seed(3)
    expected = ids
    for _ in range(10):
        token = torch.multinomial(last_logits(model, expected, retriever).float().softmax(-1), 1)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gemma3_text"])
def test_rows_of_a_left_padded_batch_generate_as_alone(decoders, family):
    model, handle = decoders.fit(family, eos_token_id=None)
    retriever = decoders.Retriever()
    rows = [decoders.ids(1, length, seed=length) for length in (11, 6, 3)]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0), value=1) for row in rows])
    mask = (ids != 1).long()
    found = model.generate(**handle.inputs(ids, mask, retriever), max_new_tokens=14, do_sample=False)
    for row, together in zip(rows, found, strict=True):
        alone = model.generate(**handle.inputs(row, retriever=retriever), max_new_tokens=14, do_sample=False)
        assert torch.equal(together[-14:], alone[0, -14:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[1] * 13, [4, 4, 4, 1], [5, 1, 3, 4], [3, 10], [12, 1]])
def test_any_split_into_passes_gives_the_logits_of_one(decoders, family, steps):
    model, _ = decoders.fit(family)
    ids = decoders.ids(2, 13)
    retrieved = decoders.Retriever().retrieved(ids)
    with torch.no_grad():
        expected = model(ids, retrieved=retrieved, use_cache=False).logits
        cache, found, past = DynamicCache(config=model.config), [], 0
        for step in steps:
            chunks = retrieved[:, past // 4 : (past + step) // 4]
            given = chunks if chunks.shape[1] or cache.get_seq_length() == 0 else None
            output = model(ids[:, past : past + step], retrieved=given, use_cache=True, **cache_argument(cache))
            found.append(output.logits)
            past += step
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_forward_pass_that_makes_its_cache_can_be_continued(decoders):
    model, _ = decoders.fit("llama")
    ids = decoders.ids(1, 12)
    retrieved = decoders.Retriever().retrieved(ids)
    with torch.no_grad():
        expected = model(ids, retrieved=retrieved).logits
        first = model(ids[:, :8], retrieved=retrieved[:, :2])
        cache = cache_of(dict(first))
        second = model(ids[:, 8:], retrieved=retrieved[:, 2:], **cache_argument(cache))
    torch.testing.assert_close(second.logits, expected[:, 8:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`retrieved` is missing: this pass completes 1 chunks"):
        model(ids[:, :4], **cache_argument(cache))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_static_cache_gives_the_same_tokens(decoders, family):
    model, handle = decoders.fit(family, eos_token_id=None)
    retriever = decoders.Retriever()
    ids = decoders.ids(2, 9)
    ids[1, :3] = 1
    mask, options = (ids != 1).long(), {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(**handle.inputs(ids, mask, retriever), **options)
    cache = StaticCache(config=model.config, max_cache_len=32)
    found = model.generate(**handle.inputs(ids, mask, retriever, cache=cache), **options, disable_compile=True)
    assert torch.equal(found, expected)


def test_a_model_in_train_mode_generates_the_same(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    ids, retriever = decoders.ids(2, 6), decoders.Retriever()
    expected = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=12, do_sample=False)
    model.train()
    found = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)
    assert handle.adapter.training


def test_prompt_lookup_gives_the_tokens_of_greedy_decoding(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    ids, retriever = decoders.ids(1, 6).repeat(1, 2), decoders.Retriever()
    expected = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=20, do_sample=False)
    found = model.generate(
        **handle.inputs(ids, retriever=retriever), max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3
    )
    assert torch.equal(found, expected)


def test_the_retriever_is_asked_once_per_complete_chunk(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    retriever = decoders.Retriever()
    options = {"max_new_tokens": 16, "do_sample": False, "suppress_tokens": [1]}  # padding would end a row
    model.generate(**handle.inputs(decoders.ids(1, 9), retriever=retriever), **options)
    # 2 chunks of the prompt in one call; then tokens 12, 16, 20, 24 complete one each; the 25th is never read
    assert (retriever.calls, retriever.rows) == (5, 2 + 4)


def test_beams_that_share_a_chunk_are_looked_up_once(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    retriever = decoders.Retriever()
    model.generate(**handle.inputs(decoders.ids(1, 8), retriever=retriever), max_new_tokens=2, num_beams=3)
    assert (retriever.calls, retriever.rows) == (1, 2)


def test_rows_that_have_finished_are_not_looked_up(decoders):
    model, handle = decoders.fit("llama")
    ids, retriever = decoders.ids(2, 4), decoders.Retriever()
    first = model.generate(**handle.inputs(ids[:1], retriever=retriever), max_new_tokens=1)[0, -1].item()
    retriever = decoders.Retriever()
    found = model.generate(
        **handle.inputs(ids, retriever=retriever), max_new_tokens=13, do_sample=False, eos_token_id=first
    )
    finished = int((found == 1).any(1).sum())
    assert finished == 1
    assert retriever.rows == 2 + (retriever.calls - 1)


def test_the_given_retrievers_work(decoders):
    model, handle = decoders.fit("llama", eos_token_id=None)
    ids, retriever = decoders.ids(2, 9), decoders.Retriever()
    expected = model.generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=9, do_sample=False)
    caching = CachingRetriever(retriever)
    for _ in range(2):
        found = model.generate(**handle.inputs(ids, retriever=caching), max_new_tokens=9, do_sample=False)
        assert torch.equal(found, expected)
    fixed = FixedNeighbours(decoders.ids(2, 6, seed=9))
    model.generate(**handle.inputs(ids, retriever=fixed), max_new_tokens=9, do_sample=False)


def test_threads_get_their_own_results(decoders):
    model, handle = decoders.fit("gemma2", eos_token_id=None)
    inputs = [decoders.ids(1, 5 + number, seed=number) for number in range(4)]
    retrievers = [decoders.Retriever() for _ in inputs]
    for number, retriever in enumerate(retrievers):
        retriever.table = retriever.table.roll(number, 0)

    def generate(number):
        given = handle.inputs(inputs[number], retriever=retrievers[number])
        return model.generate(**given, max_new_tokens=12, do_sample=False)

    expected = [generate(number) for number in range(4)]
    found = [[] for _ in inputs]
    threads = [
        threading.Thread(target=lambda number=number: [found[number].append(generate(number)) for _ in range(4)])
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, wanted in zip(found, expected, strict=True):
        assert len(each) == 4
        assert all(torch.equal(one, wanted) for one in each)


@pytest.mark.parametrize("first", ["memory", "retrieval"])
def test_with_a_memory_chunks_count_local_tokens(decoders, first):
    from graft.modeling.retro.retrofit import retrofit
    from graft.modeling.retro.retrofit_config import RetroFitConfig

    model = decoders.build("llama", eos_token_id=None)
    config = RetroFitConfig(chunk_size=4, neighbour_length=6, cross_attention_layers=[0, 2])
    if first == "retrieval":
        handle = retrofit(model, config)
    unlimited = unlimiform(model, UnlimiformerConfig(keys_per_query=None, window=8))
    if first == "memory":
        handle = retrofit(model, config)
    decoders.shake(handle.trainable_parameters())
    memory = unlimited.remember(decoders.ids(2, 21, seed=4))
    ids, retriever = decoders.ids(2, 5), decoders.Retriever()

    def inputs(tokens, retriever=None):
        return handle.inputs(**memory.inputs(tokens), retriever=retriever)

    without = model.generate(**memory.inputs(ids), max_new_tokens=15, do_sample=False)
    assert torch.equal(model.generate(**inputs(ids), max_new_tokens=15, do_sample=False), without)
    found = model.generate(**inputs(ids, retriever), max_new_tokens=15, do_sample=False)
    assert not torch.equal(found, without)
    assert retriever.rows == 2 + 6  # 4, 8, 12 and 16 of the local tokens, in two rows
    for length in range(5, 20):
        with torch.no_grad():
            scores = model(**inputs(found[:, :length], retriever)).logits[:, -1]
        chosen = scores.gather(1, found[:, length, None])[:, 0]
        torch.testing.assert_close(chosen, scores.max(1).values, rtol=1e-6, atol=1e-6)


# ---- Mistakes


def test_a_retriever_that_cannot_be_called_is_refused(decoders):
    _, handle = decoders.fit("llama")
    with pytest.raises(TypeError, match="`retriever` must be callable"):
        handle.inputs(decoders.ids(1, 5), retriever="corpus")


def test_an_argument_it_does_not_know_is_refused(decoders):
    _, handle = decoders.fit("llama")
    with pytest.raises(TypeError, match=r"a cache and `position_ids`, got \['chunks'\]"):
        handle.inputs(decoders.ids(1, 5), chunks=3)


def test_prompts_of_another_shape_are_refused(decoders):
    _, handle = decoders.fit("llama")
    with pytest.raises(ValueError, match=r"`input_ids` must be \(batch, prompt\), got \(5,\)"):
        handle.inputs(decoders.ids(5), retriever=decoders.Retriever())


def test_a_cache_that_holds_tokens_is_refused(decoders):
    model, handle = decoders.fit("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(decoders.ids(1, 5), use_cache=True, **cache_argument(cache))
    with pytest.raises(ValueError, match="holds 5 tokens that were not read with retrieval"):
        handle.inputs(decoders.ids(1, 5), retriever=decoders.Retriever(), cache=cache)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda chunks: torch.full((len(chunks), 6), 3), r"`retriever` function must return ids \(1, neighbours"),
        (lambda chunks: torch.full((len(chunks), 2, 6), 61), "but `vocab_size` is 61"),
        (lambda chunks: 1 / 0, "`retriever` function failed on 1 chunks"),
    ],
)
def test_a_retriever_that_answers_wrongly_is_named(decoders, answer, message):
    model, handle = decoders.fit("llama")
    with pytest.raises(ValueError, match=message):
        model.generate(**handle.inputs(decoders.ids(1, 5), retriever=answer), max_new_tokens=3)


def test_a_stock_model_refuses_a_retriever(decoders):
    model = decoders.build("llama")
    with pytest.raises((TypeError, ValueError), match="retriever"):
        model.generate(decoders.ids(1, 5), retriever=decoders.Retriever(), max_new_tokens=3)
