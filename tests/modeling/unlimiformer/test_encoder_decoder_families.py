"""Every encoder-decoder family: all keys equal stock full attention over the windows; batches, saving, removal."""

import copy

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, MoEModelOutput

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.families import ENCODER_DECODERS
from graft.modeling.unlimiformer.memory import Memory

FAMILIES = sorted(ENCODER_DECODERS)
NEW = sorted(set(FAMILIES) - {"bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100"})
KINDS = ("t5", "switch_transformers", "t5gemma", "led", "fsmt", "bigbird_pegasus")
SOME = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NEW]
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


def test_the_table_of_tiny_models_has_every_family(tiny):
    assert set(tiny.encoder_decoders) == set(ENCODER_DECODERS)


@pytest.mark.parametrize("store", ["hidden", "keys_values"])
@pytest.mark.parametrize("family", NEW)
def test_all_keys_give_the_logits_of_full_attention_over_the_windows(tiny, family, store):
    model, ids = tiny.model(family, dtype=torch.float64), tiny.ids(2, LENGTH)
    stock, prompt = copy.deepcopy(model), {"decoder_input_ids": tiny.ids(2, 6, seed=1)}
    with torch.no_grad(), unlimiform(model, UnlimiformerConfig(**ALL, store=store)) as handle:
        found = model(**handle.remember(ids).inputs(), **prompt).logits
        expected = stock(**stock_inputs(stock, tiny, ids), **prompt).logits
    torch.testing.assert_close(found, expected, **CLOSE)


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
