"""What a recorder shows is what the layers did, and without one nothing is left of it."""

import math
import threading

import pytest
import torch
from tiny_graph_llamas import SMALLER
from transformers import LlamaConfig, LlamaForCausalLM

from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.graph_recorder import GraphRecorder
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.transformers_compat import cache_argument, cache_of

SPARSE = {"attention": "llama", "sparse": {"rank": 6, "scale_first": 0.4}}
VARIANTS = {
    "sparse": SPARSE,
    "sparse edges": {**SPARSE, "sparse": {"rank": 6, "scale_first": 0.4, "storage": "sparse"}},
    "shared scores": {**SPARSE, "shares_scores": True},
    "per head": {**SPARSE, "sparse": {"rank": 4, "scale_first": 0.4, "per_head": True}},
    "gin": {"edges": {"transform": "silu"}},
    "differential": {"differential": True},
    "scored beside": {"scores": "mlp", "scoring_width": 8, "base_attention": True, "scale": 0.5},
    "pna": {"attention": "pna"},
    "pna edges": {"attention": "pna_vector", "edges": {"transform": "relu"}},
    "messages": {"attention": "llama", "mlp": "halfway_gin"},
}


def build(options, **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLMWithGNN(LlamaGNNConfig(**{**SMALLER, **changes}, gnn_config=options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.double()


def ids(batch=2, length=9, seed=3):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def attention_by_hand(model, layer, tokens):
    """The softmax of one layer for one text, from the hidden states that transformers itself reports."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder = model.model
    states = model(tokens, output_hidden_states=True).hidden_states[layer]
    block = decoder.layers[layer]
    normed = block.input_layernorm(states)
    attention = block.self_attn
    q = attention.q_proj(normed).unflatten(-1, (4, 4)).transpose(1, 2)
    k = attention.k_proj(normed).unflatten(-1, (2, 4)).transpose(1, 2)
    cos, sin = decoder.rotary_emb(normed, torch.arange(tokens.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    weights = torch.zeros(len(tokens), 4, tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    sharpening = getattr(attention, "sharpening", None)
    factor = 1.0 if sharpening is None else sharpening.item()
    for b in range(len(tokens)):
        for h in range(4):
            for i in range(tokens.shape[1]):
                scores = torch.stack([q[b, h, i] @ k[b, h // 2, j] for j in range(i + 1)])
                weights[b, h, i, : i + 1] = torch.softmax(factor * scores / 2.0, 0)
    return weights


@torch.no_grad()
def test_the_recorded_graph_of_a_network_and_its_statistics_equal_loops_over_rows():
    model, tokens = build(SPARSE), ids()
    weights = attention_by_hand(model, 1, tokens)
    graph = torch.zeros(2, 9, 9, dtype=torch.float64)
    edges, own, total, mass, most = 0, 0.0, 0.0, 0.0, 0
    for b in range(2):
        for i in range(9):
            count = 0
            for j in range(i + 1):
                a = 1 / (1 + math.exp(-10 * (min(1.0, weights[b, :, i, j].sum().item()) - 0.1)))
                if a > 0.6:
                    graph[b, i, j], count, total = a, count + 1, total + a
                    mass += weights[b, :, i, j].mean().item()
                    own += a if i == j else 0.0
            edges, most = edges + count, max(most, count)
    with GraphRecorder(model) as recorder:
        model(tokens)
    for b in range(2):
        torch.testing.assert_close(recorder.adjacency(1, b).to_dense(), graph[b], atol=1e-6, rtol=0)
    found = recorder.statistics()[1]
    assert (found["layer"], found["kind"], found["rows"], found["most_edges"]) == (1, "sparse", 18, most)
    assert found["edges_per_row"] == pytest.approx(edges / 18)
    assert found["density"] == pytest.approx(edges / 90)
    assert found["self_loop_share"] == pytest.approx(own / total, abs=1e-5)
    assert found["mass_kept"] == pytest.approx(mass / 18, abs=1e-5)
    assert found["threshold"] == 0.1
    assert found["graph scale"] == pytest.approx(model.model.layers[1].graph.scale.item())


@torch.no_grad()
def test_the_recorded_graphs_of_gin_attention_are_its_transformed_weights_by_head():
    model, tokens = build(VARIANTS["gin"]), ids(1)
    weights = attention_by_hand(model, 1, tokens)[0]
    moved = weights - 0.2
    expected = torch.where(torch.ones(9, 9).tril().bool(), moved / (1 + torch.exp(-moved)), 0.0)
    with GraphRecorder(model, per_head=True) as recorder, GraphRecorder(model) as mean:
        model(tokens)
    for head in range(4):
        torch.testing.assert_close(recorder.adjacency(1, 0, head).to_dense(), expected[head], atol=1e-6, rtol=0)
    torch.testing.assert_close(mean.adjacency(1).to_dense(), expected.mean(0), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_with_a_cache_and_blocks_of_rows_give_the_graph_of_the_whole(name):
    model, tokens = build(VARIANTS[name]), ids()
    with GraphRecorder(model) as whole:
        model(tokens)
    with GraphRecorder(model, block_bytes=2000) as blocks:
        model(tokens)
    with GraphRecorder(model) as pieces:
        cache = cache_of(model(tokens[:, :4]))
        cache = cache_of(model(tokens[:, 4:8], **cache_argument(cache)))
        model(tokens[:, 8:], **cache_argument(cache))
    assert torch.equal(pieces.input_ids, tokens)
    for layer in range(2):
        expected = whole.adjacency(layer, 1).to_dense()
        assert expected.shape == (9, 9)
        assert expected.any()
        assert torch.equal(expected, expected.tril())
        for other in (blocks, pieces):
            torch.testing.assert_close(other.adjacency(layer, 1).to_dense(), expected, atol=1e-6, rtol=0)
    for one, other in zip(whole.statistics(), pieces.statistics(), strict=True):
        assert {k: v for k, v in one.items() if k != "kind"} == pytest.approx(
            {k: v for k, v in other.items() if k != "kind"}, abs=1e-6
        )


@pytest.mark.parametrize("name", ["sparse", "gin", "shared scores"])
def test_recording_changes_no_output_and_leaves_nothing_on_the_model(name):
    model, tokens = build(VARIANTS[name]), ids()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = model(tokens).logits
    with GraphRecorder(model):
        assert hooks() > 0
        assert torch.equal(model(tokens).logits, before)
    assert hooks() == 0
    with pytest.raises(ZeroDivisionError), GraphRecorder(model):
        raise ZeroDivisionError
    assert hooks() == 0
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("name", ["sparse", "gin"])
def test_gradients_and_their_recomputation_do_not_mind_a_recorder(name):
    model, tokens = build(VARIANTS[name]).train(), ids()
    model.config.gnn_config.block_bytes = 2000
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    model(tokens, labels=tokens).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with GraphRecorder(model) as recorder:
        model(tokens, labels=tokens).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-8)
    assert [row["rows"] for row in recorder.statistics()] == [18, 18]


@torch.no_grad()
def test_padding_is_left_out_of_the_statistics():
    model, tokens = build(SPARSE), ids(1)
    padded = torch.cat([torch.full((1, 3), 7), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)], dim=1)
    with GraphRecorder(model) as alone:
        model(tokens)
    with GraphRecorder(model) as beside:
        model(padded, attention_mask=mask)
    for one, other in zip(alone.statistics(), beside.statistics(), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, abs=1e-5)
    torch.testing.assert_close(
        beside.adjacency(0).to_dense()[3:, 3:], alone.adjacency(0).to_dense(), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_a_generation_is_recorded_and_a_new_text_begins_anew():
    model, tokens = build(SPARSE), ids(1, 6)
    with GraphRecorder(model) as recorder:
        model(ids(1, 12, seed=5))
        longer = model.generate(tokens, max_new_tokens=5, do_sample=False)
    with GraphRecorder(model) as again:
        model(longer[:, :-1])
    assert torch.equal(recorder.input_ids, longer[:, :-1])
    assert recorder.statistics()[0]["rows"] == 12 + 10
    torch.testing.assert_close(recorder.adjacency(1).to_dense(), again.adjacency(1).to_dense(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_only_the_rows_asked_for_are_kept_and_edges_lead_from_read_to_reader():
    model = build(SPARSE)
    with GraphRecorder(model, rows=[3, 7]) as some, GraphRecorder(model) as every, GraphRecorder(model, ()) as none:
        model(ids())
    graph, full = some.adjacency(1).to_dense(), every.adjacency(1).to_dense()
    assert torch.equal(graph[[3, 7]], full[[3, 7]])
    assert graph.count_nonzero() == full[[3, 7]].count_nonzero()
    edges = some.edges(1)
    assert {(j, i) for j, i, _ in edges} == {(j, i) for i in (3, 7) for j in range(i + 1) if full[i, j]}
    assert all(weight == pytest.approx(full[i, j].item()) for j, i, weight in edges)
    assert none.statistics() == some.statistics()
    with pytest.raises(ValueError, match="`layer` 1 has no recorded rows"):
        none.adjacency(1)
    with pytest.raises(ValueError, match=r"`item` must lie in \[0, 2\), got 2"):
        some.adjacency(1, 2)
    with pytest.raises(ValueError, match=r"`head` must lie in \[0, 1\), got 3"):
        some.adjacency(1, 0, 3)


@torch.no_grad()
def test_threads_record_what_they_run_themselves():
    model, found, barrier = build(SPARSE), {}, threading.Barrier(2)

    def work(seed):
        texts = ids(1, 6 + seed, seed)
        with torch.no_grad(), GraphRecorder(model) as recorder:
            barrier.wait()
            for _ in range(10):
                model(texts)
            barrier.wait()
        found[seed] = recorder

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, recorder in found.items():
        with GraphRecorder(model) as alone:
            model(ids(1, 6 + seed, seed))
        assert recorder.statistics()[0]["rows"] == 10 * (6 + seed)
        assert torch.equal(recorder.adjacency(1).to_dense(), alone.adjacency(1).to_dense())


def test_a_recorder_in_use_cannot_begin_again():
    with GraphRecorder(build(SPARSE)) as recorder, pytest.raises(RuntimeError, match="recording already"):
        recorder.__enter__()


@torch.no_grad()
def test_a_plain_llama_shows_its_attention_and_a_mixed_model_all_of_its_layers():
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SMALLER, attn_implementation="eager")).eval()
    with GraphRecorder(plain) as recorder:
        weights = plain(ids(1), output_attentions=True).attentions[1][0].mean(0)
    torch.testing.assert_close(recorder.adjacency(1).to_dense(), weights, atol=1e-6, rtol=0)
    mixed = build({**SPARSE, "layers": [1]})
    with GraphRecorder(mixed) as recorder:
        mixed(ids(1))
    assert [row["kind"] for row in recorder.statistics()] == ["llama", "sparse"]
    with pytest.raises(ValueError, match="`model` must be a decoder"), GraphRecorder(_NoDecoder()):
        pass


class _NoDecoder(torch.nn.Module):
    config = LlamaConfig()


class Words:
    def decode(self, tokens):
        return f"<w{tokens[0]}> "


@torch.no_grad()
def test_the_page_shows_tokens_and_numbers_and_holds_its_pictures(tmp_path):
    model = build(VARIANTS["per head"])
    with GraphRecorder(model) as recorder:
        model(ids())
    page = recorder.page(tmp_path / "graph", Words(), item=1)
    text = page.read_text()
    assert f"&lt;w{ids()[1, 4]}&gt;" in text
    assert "<w" not in text
    assert text.count("data:image/png;base64") == 3
    assert "mass kept" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "graph-layer-0.png",
        "graph-layer-1.png",
        "graph-parameters.png",
        "graph.html",
    ]
    drawn = recorder.heat_map(0, tmp_path / "one.png", recorder.tokens(Words()))
    assert drawn.read_bytes().startswith(b"\x89PNG")
