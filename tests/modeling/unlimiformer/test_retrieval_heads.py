"""Heads that find: a model of which one head looks where the asked token stands; shares against loops; refusals."""

import pytest
import torch

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.report import AttentionReport
from graft.modeling.unlimiformer.retrieval_heads import NEAR, found_attention

LENGTH = 600
FINDER = (1, 2)


class Numbers:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def model_with_a_finder(tiny):
    """A Llama in which queries and keys of one head are the tokens themselves: it looks where the asked one stands."""
    model = tiny.model("llama", num_key_value_heads=4, vocab_size=LENGTH, rope_parameters=SLOW)
    layer, head = FINDER
    attention, first = model.model.layers[layer].self_attn, model.model.layers[0]
    select = torch.zeros(attention.head_dim, model.config.hidden_size)
    still = [place for place in range(attention.head_dim) if place % (attention.head_dim // 2)]  # others turn fast
    select[still, range(len(still))] = 3
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()  # what reaches the finder is the token itself
        first.mlp.down_proj.weight.zero_()
        codes = torch.randn(LENGTH, len(still), generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.zero_()[:, : len(still)] = codes / codes.norm(dim=1, keepdim=True)
        model.model.layers[layer].input_layernorm.weight.fill_(1)
        attention.q_proj.weight[rows] = attention.k_proj.weight[rows] = select
    return model


SLOW = {"rope_type": "default", "rope_theta": 1e12}


def test_the_head_that_looks_at_what_is_asked_is_found_and_its_passage_is_the_place(tiny, tmp_path):
    model = model_with_a_finder(tiny)
    document = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))[None]  # no token twice
    with unlimiform(model, UnlimiformerConfig(window=64, keys_per_query=16, positions="origin")) as unlimited:
        memory = unlimited.remember(document)
        assert unlimited.retrieval_heads(memory, count=1) == [FINDER]
        with torch.no_grad():
            model(**memory.inputs(document[:, 305:310], record=(report := AttentionReport())))
        (passage,) = report.passages(Numbers(), count=1, length=20, heads=[FINDER])
        assert passage.start <= 305 < 310 <= passage.end
        assert passage.share > 0.9
        assert passage.text == Numbers().decode(document[0, passage.start : passage.end].tolist())
        read = report.matrix(heads=[FINDER, (0, 0)])
        assert read.shape == (5, LENGTH)
        halves = sum(report.matrix(heads=[head]) for head in (FINDER, (0, 0))) / 2
        torch.testing.assert_close(read, halves)
        assert int(report.matrix(heads=[FINDER])[2].argmax()) == 307
        html = report.heatmap(Numbers(), tmp_path / "page", heads=[FINDER]).read_text()
        assert "mean over head 2 of layer 1" in html
        assert f"{passage.start}" in html
        with pytest.raises(ValueError, match="`layer` 7 was not recorded"):
            report.passages(Numbers(), heads=[(7, 0)])
    with pytest.raises(RuntimeError, match="removed"):
        unlimited.retrieval_heads(memory)


def test_shares_are_the_median_over_stretches_of_what_loops_find_near_them(tiny):
    model = tiny.model("llama")
    document = tiny.ids(1, 400, seed=1)
    with (
        torch.no_grad(),
        unlimiform(model, UnlimiformerConfig(window=32, keys_per_query=8, first_layer=1)) as unlimited,
    ):
        memory = unlimited.remember(document)
        found = found_attention(model, memory, probes=3, tokens=4)
        shares = torch.zeros(3, 3, 4)
        for probe, start in enumerate((66, 200, 333)):
            model(**memory.inputs(document[:, start : start + 4], record=(report := AttentionReport())))
            for layer in (1, 2):
                for head in range(4):
                    for step in range(4):
                        for at, weight in zip(*report.tokens(step, layer, head), strict=True):
                            if start - NEAR <= at < start + 4 + NEAR:
                                shares[probe, layer, head] += weight / 4
    torch.testing.assert_close(found, shares.sort(0).values[1])
    assert (found[0] == 0).all()
    assert (found[1:] > 0).any()


def test_what_cannot_be_asked_is_refused(tiny):
    with unlimiform(tiny.model("llama"), UnlimiformerConfig(window=32)) as unlimited:
        memory = unlimited.remember(tiny.ids(1, 100))
        for options in ({"probes": 9, "tokens": 12}, {"probes": 0}, {"tokens": 0}):
            with pytest.raises(ValueError, match=r"`probes` \d+ stretches of `tokens` \d+ .* document of 100 tokens"):
                unlimited.retrieval_heads(memory, **options)
        assert len(unlimited.retrieval_heads(memory, count=100, probes=2)) == 12
    with unlimiform(tiny.model("bart"), UnlimiformerConfig(window=32)) as unlimited:
        memory = unlimited.remember(tiny.ids(1, 100))
        with pytest.raises(TypeError, match="encoder-decoder"):
            unlimited.retrieval_heads(memory)


def test_only_heads_that_read_the_memory_are_named_however_many_are_asked_for(tiny):
    model = tiny.model("llama")
    options = {"first_layer": 1, "heads": [0, 2]}
    with unlimiform(model, UnlimiformerConfig(window=16, keys_per_query=8, **options)) as unlimited:
        found = unlimited.retrieval_heads(unlimited.remember(tiny.ids(1, 60)), count=99, probes=2, tokens=5)
    assert sorted(found) == [(layer, head) for layer in range(1, model.config.num_hidden_layers) for head in (0, 2)]
