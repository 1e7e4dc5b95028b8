"""Generation that retrieves: cached equals uncached in every decoding mode, and nothing is looked up in vain."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.modeling_retro import RetroForCausalLM
from graft.modeling.retro.retriever import CachingRetriever, CallableRetriever, FixedNeighbours
from graft.modeling.transformers_compat import CACHE_ARGUMENT, cache_argument, cache_of

CHUNK = 4


def build_model(**changes) -> RetroForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "encoder_hidden_size": 12,
        "num_encoder_layers": 1,
        "cross_attention_layers": [0, 2],
        "chunk_size": CHUNK,
        "neighbour_length": 6,
        "initializer_range": 0.6,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return RetroForCausalLM(RetroConfig(**{**sizes, **changes})).double().eval()


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


class CountingRetriever:
    """Neighbours by the sum of a chunk's ids; counts its calls and the rows it was asked for."""

    def __init__(self) -> None:
        self.table = torch.randint(3, 61, (61, 2, 6), generator=torch.Generator().manual_seed(7))
        self.table[::3, -1, 3:] = 0
        self.table[::5, 0] = 0
        self.calls = self.rows = 0

    def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.rows += len(chunks)
        return self.table[chunks.sum(1) % 61]

    def all_of(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, chunks, 2, 6) for all complete chunks."""
        count = ids.shape[1] // CHUNK
        return self.table[ids[:, : count * CHUNK].unflatten(1, (count, CHUNK)).sum(2) % 61]


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 12, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "returned sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3},
    "prefill in pieces": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 7, 9])
def test_cached_generation_equals_uncached(mode, length):
    model, ids = build_model(), prompt(2, length)
    if mode == "prefill in pieces" and length == 1:
        ids = prompt(2, 4)
    tokens = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        kind = {**MODES[mode], "use_cache": use_cache}
        if not use_cache:
            kind.pop("prefill_chunk_size", None)
        tokens.append(model.generate(ids, max_new_tokens=14, retriever=CountingRetriever(), **kind))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("length", [5, 8])
def test_every_greedy_token_is_the_arg_max_of_a_full_recompute(length):
    model, retriever = build_model(), CountingRetriever()
    tokens = model.generate(prompt(3, length), max_new_tokens=15, retriever=retriever)
    logits = model(tokens, retrieved=retriever.all_of(tokens)).logits
    best = logits[:, length - 1 : -1].max(-1)
    chosen = logits[:, length - 1 : -1].gather(2, tokens[:, length:, None])[..., 0]
    assert (best.values - chosen).max() < 1e-9


def test_generation_depends_on_what_was_retrieved():
    model, ids = build_model(), prompt(1, 9)
    plain = model.generate(ids, max_new_tokens=12)
    assert not torch.equal(plain, model.generate(ids, max_new_tokens=12, retriever=CountingRetriever()))


@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
def test_left_padded_prompts_generate_as_each_alone(mode):
    model = build_model()
    lengths = [9, 4, 1, 11]
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(1, length, seed=row)
        mask[row, width - length :] = 1
    options = {"max_new_tokens": 13, "num_beams": 3 if mode == "beams" else 1}
    together = model.generate(ids, attention_mask=mask, retriever=CountingRetriever(), **options)
    for row, length in enumerate(lengths):
        alone = model.generate(prompt(1, length, seed=row), retriever=CountingRetriever(), **options)
        assert torch.equal(together[row, width - length :], alone[0])


def test_assisted_decoding_gives_the_greedy_tokens():
    model, assistant = build_model(), build_model(initializer_range=0.61)
    for length in (5, 8):
        ids = prompt(1, length)
        greedy = model.generate(ids, max_new_tokens=20, retriever=CountingRetriever())
        for draft in (3, 4):
            assistant.generation_config.num_assistant_tokens = draft
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assisted = model.generate(ids, max_new_tokens=20, retriever=CountingRetriever(), assistant_model=assistant)
            assert torch.equal(assisted, greedy)


def test_prompt_look_up_decoding_gives_the_greedy_tokens():
    model, ids = build_model(), prompt(1, 9).repeat(1, 2)
    greedy = model.generate(ids, max_new_tokens=16, retriever=CountingRetriever())
    looked_up = model.generate(ids, max_new_tokens=16, retriever=CountingRetriever(), prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)


def test_each_completed_chunk_is_looked_up_once():
    model, retriever = build_model(), CountingRetriever()
    model.generate(prompt(2, 9), max_new_tokens=14, retriever=retriever)
    # The prompt completes 2 chunks of 2 rows; tokens 12, 16 and 20 complete one each. The last token, 22, reads them.
    assert retriever.calls == 4
    assert retriever.rows == 4 + 3 * 2


def test_a_chunk_completed_by_the_last_token_is_not_looked_up():
    model, retriever = build_model(), CountingRetriever()
    model.generate(prompt(1, 5), max_new_tokens=3, retriever=retriever)
    assert retriever.calls == 1


def test_beams_that_share_a_chunk_look_it_up_once():
    model, retriever = build_model(), CountingRetriever()
    model.generate(prompt(1, 8).repeat(3, 1), max_new_tokens=1, retriever=retriever)
    assert retriever.rows == 2


def test_finished_rows_are_not_looked_up():
    model, retriever = build_model(), CountingRetriever()
    ids = prompt(2, 4)
    free = model.generate(ids, max_new_tokens=12, retriever=CountingRetriever())
    end = next(int(token) for token in free[0, 4:8] if token not in free[1, 4:])
    tokens = model.generate(ids, max_new_tokens=12, eos_token_id=end, pad_token_id=0, retriever=retriever)
    assert torch.equal(tokens[1], free[1])
    assert (tokens[0] == 0).sum() >= 8
    assert retriever.rows == 2 + 2  # the prompts' chunks, then those of the second row alone


@given(data=st.data())
def test_any_split_into_steps_gives_the_logits_of_one_pass(data):
    model, retriever = build_model(), CountingRetriever()
    length = data.draw(st.integers(1, 22))
    ids = prompt(2, length, seed=length)
    retrieved = retriever.all_of(ids)
    expected = model(ids, retrieved=retrieved).logits
    cache, logits, past = DynamicCache(config=model.config), [], 0
    while past < length:
        step = data.draw(st.integers(1, length - past))
        completed = retrieved[:, past // CHUNK : (past + step) // CHUNK]
        output = model(
            ids[:, past : past + step],
            retrieved=completed if completed.shape[1] else None,
            **cache_argument(cache),
        )
        assert cache_of(dict(output)) is cache
        logits.append(output.logits)
        past += step
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-9, atol=1e-10)


def filled_cache(model, ids, retrieved, **options):
    cache = DynamicCache(config=model.config)
    model(ids, retrieved=retrieved, **cache_argument(cache), **options)
    return cache


def continued(model, cache, ids, retrieved=None, **options):
    return model(ids, retrieved=retrieved, **cache_argument(cache), **options).logits


@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_operations_on_the_cache_are_those_on_the_batch(operation, is_padded):
    model, retriever = build_model(), CountingRetriever()
    ids, more = prompt(3, 10), prompt(6, 3, seed=2)
    mask = torch.ones(3, 10, dtype=torch.long)
    if is_padded:
        mask[1, :3] = mask[2, :6] = 0
    retrieved = torch.zeros(3, 2, 2, 6, dtype=torch.long)
    for row in range(3):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        found = retriever.all_of(own)
        retrieved[row, : found.shape[1]] = found[0]
    rows = {"reorder": [2, 0, 0], "select": [1, 2], "repeat": [0, 0, 1, 1, 2, 2]}[operation]
    cache = filled_cache(model, ids, retrieved, attention_mask=mask)
    if operation == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    elif operation == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        cache.batch_repeat_interleave(2)
    completed = int(mask[rows].sum(1).max()) // CHUNK
    expected = filled_cache(model, ids[rows], retrieved[rows][:, :completed], attention_mask=mask[rows])
    steps = [more[: len(rows), i : i + 1] for i in range(3)]
    for number, step in enumerate(steps):
        longer = torch.cat([mask[rows], torch.ones(len(rows), number + 1, dtype=torch.long)], dim=1)
        found = retriever.table[torch.arange(len(rows))][:, None]
        closes = ((longer.sum(1) % CHUNK) == 0).any()
        given_now = {"retrieved": found if closes else None, "attention_mask": longer}
        torch.testing.assert_close(
            continued(model, cache, step, **given_now), continued(model, expected, step, **given_now)
        )


@given(length=st.integers(7, 20), taken=st.integers(1, 7))
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(length, taken):
    model, retriever = build_model(), CountingRetriever()
    ids = prompt(2, length, seed=3)
    cache = filled_cache(model, ids, retriever.all_of(ids))
    most = length % CHUNK + CHUNK
    if taken > most:
        with pytest.raises(ValueError, match=f"`crop` can take back at most {most} tokens here, got {taken}"):
            cache.crop(-taken)
        return
    cache.crop(-taken)
    other = prompt(2, 9, seed=4)
    whole = torch.cat([ids[:, : length - taken], other], dim=1)
    retrieved = retriever.all_of(whole)
    expected = model(whole, retrieved=retrieved).logits[:, length - taken :]
    start = (length - taken) // CHUNK
    torch.testing.assert_close(continued(model, cache, other, retrieved[:, start:]), expected, rtol=1e-9, atol=1e-10)


def test_a_reset_cache_begins_anew():
    model, retriever = build_model(), CountingRetriever()
    ids = prompt(1, 10)
    cache = filled_cache(model, prompt(2, 7, seed=9), retriever.all_of(prompt(2, 7, seed=9)))
    cache.reset()
    if cache.layers[1].get_seq_length():
        pytest.skip("this transformers only blanks the tokens of a dynamic cache")
    expected = model(ids, retrieved=retriever.all_of(ids)).logits
    torch.testing.assert_close(continued(model, cache, ids, retriever.all_of(ids)), expected)


def test_a_static_cache_gives_the_tokens_of_a_dynamic_one():
    model, ids = build_model(), prompt(2, 6)
    expected = model.generate(ids, max_new_tokens=11, retriever=CountingRetriever())
    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens = model.generate(ids, max_new_tokens=11, retriever=CountingRetriever(), **cache_argument(cache))
    assert torch.equal(tokens, expected)


def test_a_conversation_goes_on_from_its_cache():
    model, retriever = build_model(), CountingRetriever()
    ids = prompt(1, 6)
    first = model.generate(ids, max_new_tokens=5, retriever=retriever, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompt(1, 5, seed=8)], dim=1)
    gone_on = model.generate(
        longer, max_new_tokens=9, retriever=retriever, **cache_argument(getattr(first, CACHE_ARGUMENT))
    )
    assert torch.equal(gone_on, model.generate(longer, max_new_tokens=9, retriever=CountingRetriever()))


def test_the_forward_receives_the_cache():
    model = build_model()
    seen = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(cache_of(kwargs)), with_kwargs=True)
    model.generate(prompt(1, 3), max_new_tokens=3)
    assert all(cache is seen[0] and cache is not None for cache in seen)


def test_two_threads_generate_their_own_texts():
    model = build_model()
    prompts = [prompt(1, 6, seed=seed) for seed in range(4)]
    expected = [model.generate(ids, max_new_tokens=24, retriever=CountingRetriever()) for ids in prompts]
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        results[number] = model.generate(prompts[number], max_new_tokens=24, retriever=CountingRetriever())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], expected[number]) for number in range(4))


def test_fixed_neighbours_are_the_same_for_every_chunk():
    model, neighbours = build_model(), prompt(2, 6, seed=5)
    ids = prompt(1, 9)
    tokens = model.generate(ids, max_new_tokens=4, retriever=FixedNeighbours(neighbours))
    logits = model(tokens, retrieved=neighbours.expand(1, 3, -1, -1)).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), tokens[:, 9:])


class Letters:
    """A tokenizer of single letters: a is 3, b is 4, ..."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - 94 for letter in text] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(int(token) + 94) for token in row) for row in rows]


def test_a_function_on_texts_becomes_a_retriever():
    config = build_model().config
    retriever = CallableRetriever(lambda texts: [[text[::-1]] for text in texts], Letters(), config)
    found = retriever(torch.tensor([[3, 4, 5, 6]]))
    assert found.tolist() == [[[6, 5, 4, 3, 0, 0], [0, 0, 0, 0, 0, 0]]]


def test_a_caching_retriever_asks_once_and_forgets_the_longest_unused():
    inner = CountingRetriever()
    retriever = CachingRetriever(inner, size=2)
    a, b, c = prompt(3, 4).split(1)
    for chunks in (a, b, torch.cat([a, a, b])):
        assert torch.equal(retriever(chunks), inner.table[chunks.sum(1) % 61])
    assert inner.rows == 2
    retriever(a), retriever(c), retriever(a)
    assert inner.rows == 3
    retriever(b)
    assert inner.rows == 4


def broken(chunks):
    raise KeyError("no such corpus")


BAD_RETRIEVERS = {
    "raises": (broken, ValueError, "`retriever` function failed on 1 chunks, the first"),
    "wrong rows": (
        lambda chunks: torch.ones(3, 2, 6, dtype=torch.long),
        ValueError,
        r"must return ids \(1, neighbours",
    ),
    "too long": (lambda chunks: torch.ones(1, 2, 7, dtype=torch.long), ValueError, "at most 6"),
    "no tensor": (lambda chunks: [[1]], ValueError, "got list"),
    "beyond the vocabulary": (lambda chunks: torch.full((1, 2, 6), 61), ValueError, "`vocab_size` is 61"),
    "not callable": (7, TypeError, "`retriever` must be callable.*got int"),
}


@pytest.mark.parametrize("case", BAD_RETRIEVERS)
def test_bad_retrievers_are_named(case):
    retriever, error, message = BAD_RETRIEVERS[case]
    with pytest.raises(error, match=message) as caught:
        build_model().generate(prompt(1, 5), max_new_tokens=3, retriever=retriever)
    assert case != "raises" or isinstance(caught.value.__cause__, KeyError)


def test_neighbours_may_not_stop_half_way():
    model, retriever = build_model(), CountingRetriever()
    ids = prompt(1, 7)
    cache = filled_cache(model, ids, retriever.all_of(ids))
    with pytest.raises(ValueError, match="`retrieved` is missing: this pass completes 1 chunks"):
        continued(model, cache, prompt(1, 1))


def test_a_cache_filled_by_another_model_is_refused():
    model = build_model()
    cache = DynamicCache(config=model.config)
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), layer)
    with pytest.raises(ValueError, match="holds 5 tokens that were not read with retrieval"):
        continued(model, cache, prompt(1, 1))
