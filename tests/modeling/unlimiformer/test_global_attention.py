"""LED's global attention in windows: against a loop over windows, batched, behind a prefix, grown, saved, refused."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.memory import Memory

WINDOW = 16  # tolerances are those of float32: LED computes its softmax in it, whatever the dtype


def attach(tiny, family="led", **options):
    model = tiny.model(family, dtype=torch.float64)
    return model, unlimiform(model, UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, **options}))


def some(*shape, seed=0):
    """One token in four has global attention."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.25).long()


@torch.no_grad()
def naive_states(model, tiny, document, mask, overlap, prefix=0):
    """Encode each window with its slice of the mask; the first `prefix` tokens stand in front of each of them."""
    head, body, kept = document[:prefix], document[prefix:], []
    for start, end, keep_start, keep_end in tiny.kept(len(body), WINDOW - prefix, overlap, False):
        seen = torch.cat([mask[:prefix], mask[prefix + start : prefix + end]])
        ids = torch.cat([head, body[start:end]])
        states = model.get_encoder()(ids[None], global_attention_mask=seen[None]).last_hidden_state[0]
        kept.append(states[(0 if start == 0 else prefix + keep_start - start) : prefix + keep_end - start])
    return torch.cat(kept)


@given(length=integers(1, 60), overlap=sampled_from([0.0, 0.3, 0.5]), seed=integers(0, 9))
def test_each_window_is_read_with_its_slice_of_the_mask(tiny, length, overlap, seed):
    model, handle = attach(tiny, overlap=overlap)
    document, mask = tiny.ids(length, seed=seed), some(length, seed=seed)
    memory = handle.remember(document[None], global_attention_mask=mask[None])
    assert torch.allclose(memory.hidden[0], naive_states(model, tiny, document, mask, overlap), rtol=0, atol=1e-5)


def test_global_attention_changes_what_is_read_and_a_mask_of_zeros_does_not(tiny):
    _, handle = attach(tiny)
    document = tiny.ids(1, 40, seed=1)
    plain = handle.remember(document).hidden
    none = handle.remember(document, global_attention_mask=torch.zeros_like(document)).hidden
    first = handle.remember(document, global_attention_mask=torch.eye(1, 40)).hidden
    assert torch.allclose(none, plain, rtol=0, atol=1e-12)
    assert not torch.allclose(first[0, :8], plain[0, :8], rtol=0, atol=1e-4)
    assert torch.allclose(first[0, 24:], plain[0, 24:], rtol=0, atol=1e-12)  # in windows that do not hold the token


def test_documents_of_different_lengths_are_as_each_alone_padded_on_either_side(tiny):
    _, handle = attach(tiny)
    rows = [tiny.ids(length, seed=length) for length in (45, 7, 30)]
    masks = [some(len(row), seed=len(row)) for row in rows]
    for side in ("left", "right"):
        (ids, mask), (seen, _) = tiny.pad(rows, side), tiny.pad(masks, side)
        memory = handle.remember(ids, mask, global_attention_mask=seen)
        for i, (row, of_row) in enumerate(zip(rows, masks, strict=True)):
            alone = handle.remember(row[None], global_attention_mask=of_row[None]).hidden[0]
            assert torch.allclose(memory.hidden[i, : len(row)], alone, rtol=0, atol=1e-5)


def test_tokens_of_a_prefix_have_it_in_every_window(tiny):
    model, handle = attach(tiny, overlap=0.3)
    document, asked = tiny.ids(40, seed=1), tiny.ids(3, seed=2)
    mask = some(40, seed=3)
    memory = handle.remember(document[None], prefix_ids=asked[None], global_attention_mask=mask[None])
    both, seen = torch.cat([asked, document]), torch.cat([torch.ones(3, dtype=torch.long), mask])
    assert torch.allclose(memory.hidden[0], naive_states(model, tiny, both, seen, 0.3, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", ["both", "old", "new"])
def test_a_document_grows_and_is_kept_as_if_read_at_once(tiny, tmp_path, masked):
    model, handle = attach(tiny)
    document, mask = tiny.ids(2, 60, seed=1), some(2, 60, seed=2)
    if masked != "both":
        mask[:, slice(40, None) if masked == "old" else slice(40)] = 0
    old, new = (None if masked == other else part for other, part in (("new", mask[:, :40]), ("old", mask[:, 40:])))
    memory = handle.remember(document[:, :40], global_attention_mask=old).select([1])
    loaded = Memory.from_pretrained(memory.save_pretrained(tmp_path / "memory"), model)
    grown = handle.append(loaded, document[1:, 40:], global_attention_mask=None if new is None else new[1:])
    whole = handle.remember(document[1:], global_attention_mask=mask[1:])
    assert torch.equal(grown.global_tokens, whole.global_tokens)
    assert torch.allclose(grown.hidden, whole.hidden, rtol=0, atol=1e-5)


def test_generate_of_one_call_reads_with_it(tiny):
    model, handle = attach(tiny)
    document, mask = tiny.ids(1, 40, seed=1), some(1, 40, seed=2)
    memory = handle.remember(document, global_attention_mask=mask)
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**memory.inputs(), **options).logits[0]
    assert torch.equal(handle.generate(document, global_attention_mask=mask, **options).logits[0], expected)
    assert not torch.equal(handle.generate(document, **options).logits[0], expected)


@pytest.mark.parametrize(("family", "width", "said"), [("led", 39, r"\(1, 40\), got \(1, 39\)"), ("bart", 40, "LED")])
def test_a_mask_that_cannot_be_used_is_refused(tiny, family, width, said):
    _, handle = attach(tiny, family)
    options = {"global_attention_mask": torch.ones(1, width, dtype=torch.long)}
    for call in (handle.remember, handle.generate):
        with pytest.raises(ValueError, match=f"`global_attention_mask`.*{said}"):
            call(tiny.ids(1, 40), **options)
    with pytest.raises(ValueError, match="`global_attention_mask` is for LED.*LlamaForCausalLM"):
        attach(tiny, "llama")[1].generate(tiny.ids(1, 40), **options)
