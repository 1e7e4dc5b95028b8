"""A question in front of every window of an encoder: against a loop over windows, stored once, grown, saved."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory

WINDOW = 16


def attach(tiny, family="bart", **options):
    model = tiny.model(family, dtype=torch.float64)
    return model, unlimiform(model, UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, **options}))


def naive_states(model, prefix, document, overlap, tiny):
    """Encode each window of the document behind the prefix and keep its middle; the prefix from the first."""
    kept = []
    for start, end, keep_start, keep_end in tiny.kept(len(document), WINDOW - len(prefix), overlap, False):
        with torch.no_grad():
            states = model.get_encoder()(torch.cat([prefix, document[start:end]])[None]).last_hidden_state[0]
        if start == 0:
            kept.append(states[: len(prefix)])
        body = states[len(prefix) :]
        kept.append(body[keep_start - start : keep_end - start])
    return torch.cat(kept)


@given(length=integers(1, 60), prefix=integers(1, 15), overlap=sampled_from([0.0, 0.3, 0.5]))
def test_each_window_is_read_behind_the_prefix(tiny, length, prefix, overlap):
    model, handle = attach(tiny, overlap=overlap)
    document, asked = tiny.ids(length, seed=1), tiny.ids(prefix, seed=2)
    memory = handle.remember(document[None], prefix_ids=asked[None])
    assert torch.equal(memory.input_ids[0], torch.cat([asked, document]))
    assert torch.allclose(memory.hidden[0], naive_states(model, asked, document, overlap, tiny), rtol=0, atol=1e-10)


@pytest.mark.parametrize("store", ["hidden", "keys_values"])
def test_documents_with_prefixes_of_different_lengths_are_as_each_alone(tiny, store):
    _, handle = attach(tiny, store=store, heads=[1])
    rows, asked = ([tiny.ids(n, seed=n) for n in lengths] for lengths in ((45, 7, 30), (3, 9, 1)))
    ids, mask = tiny.pad(rows, "left")
    prefix_ids, prefix_mask = tiny.pad(asked, "right")
    memory = handle.remember(ids, mask, prefix_ids=prefix_ids, prefix_mask=prefix_mask)
    for i, (row, prefix) in enumerate(zip(rows, asked, strict=True)):
        alone = handle.remember(row[None], prefix_ids=prefix[None])
        for name, expected in alone.tensors().items():
            found = memory.tensors()[name][i, ..., : expected.shape[-2], :]
            assert torch.allclose(found, expected[0], rtol=0, atol=1e-10), name


def test_one_window_with_a_prefix_is_prefix_and_document_in_one(tiny):
    _, handle = attach(tiny)
    document, asked = tiny.ids(1, 10, seed=1), tiny.ids(1, 6, seed=2)
    together = handle.remember(torch.cat([asked, document], dim=1))
    assert torch.equal(handle.remember(document, prefix_ids=asked).hidden, together.hidden)


@pytest.mark.parametrize("before", [4, 13, 40])
def test_a_document_behind_a_prefix_grows_as_if_read_at_once(tiny, before):
    _, handle = attach(tiny, heads=[0, 2])
    document, asked = tiny.ids(2, 60, seed=1), tiny.ids(2, 3, seed=2)
    memory = handle.append(handle.remember(document[:, :before], prefix_ids=asked), document[:, before:])
    whole = handle.remember(document, prefix_ids=asked)
    assert memory.prefixes == whole.prefixes == (3, 3)
    assert torch.equal(memory.input_ids, whole.input_ids)
    for name, expected in whole.tensors().items():
        assert torch.allclose(memory.tensors()[name], expected, rtol=0, atol=1e-10), name


def test_a_saved_memory_keeps_its_prefixes_and_grows_after_loading(tiny, tmp_path):
    model, handle = attach(tiny)
    document, asked = tiny.ids(2, 60, seed=1), tiny.pad([tiny.ids(3, seed=2), tiny.ids(5, seed=3)], "right")
    memory = handle.remember(document[:, :40], prefix_ids=asked[0], prefix_mask=asked[1]).select([1])
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "memory"), model)
    assert loaded.prefixes == (5,)
    grown = handle.append(loaded, document[1:, 40:])
    whole = handle.remember(document[1:], prefix_ids=asked[0][1:])
    assert torch.allclose(grown.hidden, whole.hidden, rtol=0, atol=1e-10)


def test_generation_reads_the_prefix(tiny):
    """Another question changes what every window was encoded to, the last one's tokens too."""
    model, handle = attach(tiny, keys_per_query=None)
    document = tiny.ids(1, 50, seed=1)
    first, second = (handle.remember(document, prefix_ids=tiny.ids(1, 4, seed=seed)) for seed in (2, 3))
    assert not torch.allclose(first.hidden[0, -1], second.hidden[0, -1])
    asked = tiny.ids(1, 3)
    with torch.no_grad():
        logits = [model(**memory.inputs(), decoder_input_ids=asked).logits for memory in (first, second)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize(
    ("count", "tokens", "said"),
    [(1, WINDOW, f"{WINDOW} tokens, and a window {WINDOW}"), (2, 3, "each of 1 documents, got 2"), (1, 0, "tokens")],
)
def test_prefixes_that_cannot_be_are_refused_by_name(tiny, count, tokens, said):
    _, handle = attach(tiny)
    with pytest.raises(ValueError, match=f"`prefix_ids`.*{said}"):
        handle.remember(tiny.ids(1, 30), prefix_ids=tiny.ids(count, tokens))


def test_a_mask_of_no_prefix_is_refused(tiny):
    _, handle = attach(tiny)
    with pytest.raises(ValueError, match="`prefix_mask` .* but `prefix_ids` is None"):
        handle.remember(tiny.ids(1, 30), prefix_mask=torch.ones(1, 3))


def test_a_decoder_is_asked_behind_its_memory_instead(tiny):
    _, handle = attach(tiny, "llama")
    with pytest.raises(ValueError, match="`prefix_ids` needs an encoder"):
        handle.remember(tiny.ids(1, 30), prefix_ids=tiny.ids(1, 3))
