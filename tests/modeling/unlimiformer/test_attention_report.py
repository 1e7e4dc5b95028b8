"""A report says what was read: the weights naive loops give, the mass the kept keys hold, and pages one can open."""

import re

import pytest
import torch

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.modeling.unlimiformer.attach import unlimiform
from graft.modeling.unlimiformer.report import DETAIL, SINKS, AttentionReport

WINDOW, LENGTH = 16, 45


class Letters:
    """A tokenizer of one character per token; some of them mean something in HTML."""

    def decode(self, ids):
        return "".join("<>&\"'"[i % 5] if i < 13 else chr(65 + i) for i in ids)


def read(tiny, family="bart", rows=None, target=4, **options):
    """A report of one forward of `target` tokens, and what attention modules were given: by layer, query and all."""
    model = tiny.model(family, dtype=torch.float64)
    config = UnlimiformerConfig(**{"window": WINDOW, "keys_per_query": 4, **options})
    rows = [tiny.ids(LENGTH)] if rows is None else rows
    report = AttentionReport()
    asked = tiny.ids(len(rows), target, seed=3)
    with torch.no_grad(), unlimiform(model, config) as handle:
        memory = handle.remember(*tiny.pad(rows, "right"))
        inputs = memory.inputs(*(() if family == "bart" else (asked,)), record=report)
        queries, hooks = {}, []
        for i, attention in enumerate(handle.attentions):
            hook = lambda m, a, out, at=i: queries.update({at: out})  # noqa: E731
            hooks.append(attention.q_proj.register_forward_hook(hook))
        model(**inputs, **({"decoder_input_ids": asked} if family == "bart" else {}))
        for hook in hooks:
            hook.remove()
    return model, memory, report, queries


def naive_shares(model, memory, queries, layer, document=0):
    """Softmax over all keys of an encoder-decoder's memory: (heads, target, tokens of the document)."""
    attention = model.get_decoder().layers[layer].encoder_attn
    states = memory.hidden[document, : memory.lengths[document]]
    shares = []
    for head in range(attention.num_heads):
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        keys = states @ attention.k_proj.weight[rows].T + attention.k_proj.bias[rows]
        shares.append((queries[layer][document][:, rows] @ keys.T * attention.head_dim**-0.5).softmax(-1))
    return torch.stack(shares).detach()


@pytest.mark.parametrize("keys_per_query", [1, 4, 16, None])
def test_tokens_are_the_best_keys_of_naive_loops_with_their_weights(tiny, keys_per_query):
    model, memory, report, queries = read(tiny, rows=[tiny.ids(LENGTH), tiny.ids(9)], keys_per_query=keys_per_query)
    for layer in range(3):
        for document, length in enumerate((LENGTH, 9)):
            shares = naive_shares(model, memory, queries, layer, document)
            for head, step in ((0, 0), (3, 2), (2, 3)):
                best, ids = shares[head, step].topk(min(keys_per_query or LENGTH, length))
                found_ids, weights = report.tokens(step, layer, head, document)
                few = min(len(best), DETAIL)
                assert found_ids[:few].tolist() == ids[:few].tolist()
                torch.testing.assert_close(weights[:few].double(), (best / best.sum())[:few], rtol=1e-5, atol=1e-6)
                assert float(weights[few:].sum()) == 0


def test_weights_of_each_step_sum_to_one(tiny):
    _, _, report, _ = read(tiny, "bart")
    matrix = report.matrix()
    assert matrix.shape == (4, LENGTH)
    torch.testing.assert_close(matrix.sum(1), torch.ones(4))
    assert (matrix >= 0).all()


def test_a_decoders_weights_sum_to_its_share_of_memory(tiny):
    _, _, report, _ = read(tiny, "llama")
    sums = report.matrix().sum(1)
    assert ((sums > 0) & (sums < 1)).all()
    assert abs(float(sums.mean()) - report.memory_share) < 1e-5


def test_a_decoders_share_of_memory_is_that_of_stock_attention_over_one_prompt(tiny):
    model, memory, report, _ = read(tiny, "llama", keys_per_query=None, window=64)
    model.set_attn_implementation("eager")
    prompt = torch.cat([memory.input_ids, tiny.ids(1, 4, seed=3)], dim=1)
    with torch.no_grad():
        attentions = torch.stack(model(input_ids=prompt, output_attentions=True).attentions)
    share = attentions[:, 0, :, LENGTH:, :LENGTH].double().sum(-1).mean()
    assert abs(report.memory_share - float(share)) < 1e-5
    expected = attentions[:, 0, :, LENGTH:, :LENGTH].mean(dim=(0, 1)).float()
    torch.testing.assert_close(report.matrix(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.parametrize("keys_per_query", [None, LENGTH])
def test_mass_is_one_where_every_key_is_kept(tiny, family, keys_per_query):
    _, _, report, _ = read(tiny, family, keys_per_query=keys_per_query)
    assert report.mass == 1


@pytest.mark.parametrize("keys_per_query", [1, 4, 16])
def test_mass_is_the_share_of_the_whole_softmax_that_the_kept_keys_hold(tiny, keys_per_query):
    model, memory, report, queries = read(tiny, keys_per_query=keys_per_query)
    kept = [naive_shares(model, memory, queries, layer).topk(keys_per_query).values.sum(-1) for layer in range(3)]
    assert abs(report.mass - float(torch.stack(kept).mean())) < 1e-6
    assert report.mass < 1


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_heads_that_do_not_read_the_memory_are_not_reported_as_reading_it(tiny, family):
    _, _, report, _ = read(tiny, family, heads=[1, 2])
    _, _, everything, _ = read(tiny, family)
    for head in (0, 3):
        assert float(report.tokens(1, 0, head)[1].sum()) == 0
    for head in (1, 2):
        assert torch.equal(report.tokens(1, 0, head)[0], everything.tokens(1, 0, head)[0])


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_mass_is_that_of_the_reading_heads(tiny, family):
    """In the first layer queries do not depend on what other heads read."""
    options = {"last_layer": 1, "keys_per_query": 2}
    several, alone = (read(tiny, family, heads=heads, **options)[2].mass for heads in ([1, 2], [1]))
    other = read(tiny, family, heads=[2], **options)[2].mass
    assert abs(several - (alone + other) / 2) < 1e-6
    assert abs(alone - other) > 1e-3
    everyone = [read(tiny, family, heads=[head], **options)[2].mass for head in range(4)]
    assert abs(read(tiny, family, **options)[2].mass - sum(everyone) / 4) < 1e-6


def test_a_first_step_that_reads_the_window_is_not_reported_as_reading_the_memory(tiny):
    _, _, report, _ = read(tiny, first_step="window")
    assert report.steps == [1, 2, 3] or float(report.matrix()[0].sum()) == 0


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_steps_and_layers_of_a_generation_are_all_recorded(tiny, family):
    model = tiny.model(family)
    with unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4, first_layer=1)) as handle:
        memory = handle.remember(tiny.ids(1, LENGTH))
        asked = () if family == "bart" else (tiny.ids(1, 3),)
        with handle.record() as report:
            inputs = memory.inputs(*asked)
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=2)
    assert report.steps == list(range(5 if family == "bart" else 3 + 4))
    report.tokens(4, 1, 0)
    with pytest.raises(ValueError, match=r"`step` 4 of `layer` 0 was not recorded.*layers \[1, 2\]"):
        report.tokens(4, 0, 0)
    with pytest.raises(ValueError, match=r"`head` must lie in \[0, 4\), got 4"):
        report.tokens(4, 1, 4)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_cached_steps_record_what_one_forward_records(tiny, family):
    _, memory, whole, _ = read(tiny, family)
    model = tiny.model(family, dtype=torch.float64)
    asked, report = tiny.ids(1, 4, seed=3), AttentionReport()
    with torch.no_grad(), unlimiform(model, memory.config):
        inputs = memory.inputs(*(() if family == "bart" else (asked,)), record=report)
        for step in range(4):
            part = asked[:, step : step + 1]
            if family == "bart":
                model(**inputs, decoder_input_ids=part)
            else:
                mask = inputs["attention_mask"][:, : WINDOW + step + 1]
                model(**{**inputs, "input_ids": part, "attention_mask": mask})
    torch.testing.assert_close(report.matrix(), whole.matrix(), rtol=1e-4, atol=1e-6)
    assert abs(report.mass - whole.mass) < 1e-6


def test_blocks_of_queries_change_no_report(tiny, monkeypatch):
    _, _, whole, _ = read(tiny, "llama")
    monkeypatch.setattr("graft.modeling.unlimiformer.knn_attention.SCORES_BYTES", 1)
    _, _, blocked, _ = read(tiny, "llama")
    torch.testing.assert_close(blocked.matrix(), whole.matrix())
    for head in range(4):
        for found, expected in zip(blocked.tokens(2, 1, head), whole.tokens(2, 1, head), strict=True):
            torch.testing.assert_close(found, expected)


def test_nothing_is_recorded_outside_the_with_or_without_a_report(tiny):
    model = tiny.model("bart")
    with unlimiform(model, UnlimiformerConfig(window=WINDOW)) as handle:
        memory = handle.remember(tiny.ids(1, LENGTH))
        with handle.record() as report:
            pass
        model.generate(**memory.inputs(), max_new_tokens=3)
    assert report.steps == []
    with pytest.raises(ValueError, match="Nothing was recorded"):
        report.matrix()


def test_a_report_changes_no_logit(tiny):
    for family in ("bart", "llama"):
        model = tiny.model(family)
        asked = tiny.ids(1, 4)
        with torch.no_grad(), unlimiform(model, UnlimiformerConfig(window=WINDOW, keys_per_query=4)) as handle:
            memory, logits = handle.remember(tiny.ids(1, LENGTH)), []
            for record in (None, AttentionReport()):
                if family == "bart":
                    logits.append(model(**memory.inputs(record=record), decoder_input_ids=asked).logits)
                else:
                    logits.append(model(**memory.inputs(asked, record=record)).logits)
        assert torch.equal(*logits)


def test_a_report_made_inside_an_inner_record_is_the_inner_ones_alone(tiny):
    model = tiny.model("bart")
    with unlimiform(model, UnlimiformerConfig(window=WINDOW)) as handle:
        memory = handle.remember(tiny.ids(1, LENGTH))
        with handle.record() as outer, handle.record() as inner:
            model.generate(**memory.inputs(), max_new_tokens=3, min_new_tokens=3)
    assert outer.steps == []
    assert inner.steps == [0, 1, 2]


def test_passages_are_the_most_read_stretches_apart_from_each_other(tiny):
    _, memory, report, _ = read(tiny, "bart", keys_per_query=None)
    read_of = report.matrix().sum(0)
    read_of[:SINKS] = 0
    read_of = read_of / read_of.sum()
    passages = report.passages(Letters(), count=3, length=8)
    sums = [float(read_of[start : start + 8].sum()) for start in range(LENGTH - 7)]
    assert passages[0].start == max(range(len(sums)), key=sums.__getitem__)
    for passage in passages:
        assert passage.end - passage.start == 8
        assert abs(passage.share - sums[passage.start]) < 1e-6
        assert passage.text == Letters().decode(memory.input_ids[0, passage.start : passage.end].tolist())
    for i, one in enumerate(passages):
        assert all(one.end <= other.start or other.end <= one.start for other in passages[:i])
    assert [p.share for p in passages] == sorted((p.share for p in passages), reverse=True)


def test_passages_of_a_document_shorter_than_one_are_the_document(tiny):
    _, _, report, _ = read(tiny, "bart", rows=[tiny.ids(7)])
    assert [(p.start, p.end) for p in report.passages(Letters(), length=64)] == [(0, 7)]


def test_the_heat_map_is_two_files_and_its_text_is_escaped(tiny, tmp_path):
    _, memory, report, _ = read(tiny, "bart")
    path = report.heatmap(Letters(), tmp_path / "pages" / "read", answer="<b>42</b>")
    assert path == tmp_path / "pages" / "read.html"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    html = path.read_text()
    assert "&lt;b&gt;42&lt;/b&gt;" in html
    assert "<b>42" not in html
    assert "<script" not in html
    document = html[html.rindex('class="tokens"') :]
    text = re.sub(r"<[^>]*>", "", document[document.index(">") + 1 :])
    unescaped = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#x27;", "'")
    assert Letters().decode(memory.input_ids[0].tolist()) in unescaped.replace("&amp;", "&")


def test_the_heat_map_of_one_step_over_a_two_token_document_is_written(tiny, tmp_path):
    _, _, report, _ = read(tiny, "bart", rows=[tiny.ids(2)], target=1)
    assert report.heatmap(Letters(), tmp_path / "small.html").is_file()


def test_documents_of_a_batch_are_reported_apart(tiny):
    rows = [tiny.ids(LENGTH), tiny.ids(9)]
    _, _, both, _ = read(tiny, "bart", rows=rows)
    assert both.matrix(1).shape == (4, 9)
    _, _, alone, _ = read(tiny, "bart", rows=rows[:1])
    torch.testing.assert_close(both.matrix(0), alone.matrix(0))
