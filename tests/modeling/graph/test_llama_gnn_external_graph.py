"""A graph given with the input of a graph-aware Llama: added to attention's edges, causal, cached, refused in time."""

import pytest
import torch
from tiny_graph_llamas import SIZES
from tiny_graphs import GRAPHS, LENGTH, chunks
from transformers import DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from graft import ChunkGraph, GraphRecorder, TokenEdges
from graft.configuration.configuration_gnn import LlamaGNNConfig
from graft.modeling.graph.edge_storage import BlockedEdges, DenseEdges, SparseEdges
from graft.modeling.graph.external_graph import JoinedEdges
from graft.modeling.graph.modeling_llama_gnn import LlamaForCausalLMWithGNN
from graft.modeling.graph.sparse_graph_layers import SparseGraphUpdate
from graft.modeling.transformers_compat import cache_argument, cache_of

SPARSE = {"rank": 8, "num_layers": 2, "scale_first": 0.5}
PER_HEAD = {**SPARSE, "per_head": True, "mixes_heads": True}


def llama(sparse=SPARSE, **options):
    return {"attention": "llama", "sparse": sparse, **options}


READERS = {
    "plain": llama(),
    "after": llama(placement="after_mlp", layers=[1, 2]),
    "parallel": llama(placement="parallel"),
    "shared scores": llama(shares_scores=True, block_bytes=1000),
    "stored": llama({**SPARSE, "storage": "sparse"}),
    "per head": llama(PER_HEAD),
    "per head, stored": llama({**PER_HEAD, "storage": "sparse"}),
    "gcn": llama({**SPARSE, "layer": "gcn"}),
    "learned": llama(
        {**SPARSE, "reads": "normed_input", "matches_scale": True},
        adjacency={"combine": "learned", "learned_width": 5, "cutoff": None, "sharpness": None},
    ),
    "messages in the MLP": llama(mlp="multi_hop", placement="after_mlp"),
}
FEW = ["plain", "per head, stored"]


def build(options):
    torch.manual_seed(0)
    model = LlamaForCausalLMWithGNN(LlamaGNNConfig(**SIZES, gnn_config=options)).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "epsilon" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def written_out(graph, batch=2, length=LENGTH):
    """min(1, e_ij) as a matrix, by the definition alone."""
    matrix = torch.zeros(batch, length, length, dtype=torch.float64)
    if isinstance(graph, TokenEdges):
        for (row, reader, read), weight in zip(graph.index.tolist(), graph.weight.tolist(), strict=True):
            matrix[row, reader, read] += weight
        return matrix.clamp(max=1)
    for row, ids in enumerate(graph.chunk_ids.tolist()):
        for i in range(length):
            for j in range(i + 1):
                if min(ids[i], ids[j]) >= 0:
                    seen = sum(ids[k] == ids[j] for k in range(i + 1))
                    matrix[row, i, j] = min(1.0, float(graph.weights[row, ids[i], ids[j]]) / seen)
    return matrix


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("variant", READERS)
def test_a_graph_is_its_matrix_added_to_that_of_attention(variant, kind):
    model, graph, handles = build(READERS[variant]), GRAPHS[kind](), []
    found, without = logits(model, tokens(), graph=graph), logits(model, tokens())
    assert not torch.allclose(found, without)
    matrix = written_out(graph)

    def with_matrix(module, args):
        states, attention, *rest = args[0], args[1].whole(), *args[2:]
        weight = attention.weight
        if isinstance(attention, SparseEdges):
            weight = weight.new_zeros(*weight.shape[:-1], LENGTH).scatter_add(-1, attention.index, weight)
        return (states, DenseEdges(weight + (matrix[:, None] if weight.dim() == 4 else matrix)), *rest)

    for module in model.modules():
        if isinstance(module, SparseGraphUpdate):
            handles.append(module.register_forward_pre_hook(with_matrix))
    torch.testing.assert_close(found, logits(model, tokens()), atol=1e-10, rtol=1e-9)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, tokens()), without)


@pytest.mark.parametrize("variant", READERS)
def test_a_graph_of_no_weight_is_no_graph_bit_for_bit(variant):
    model, graph = build(READERS[variant]), chunks()
    none = ChunkGraph(graph.chunk_ids, torch.zeros_like(graph.weights))
    assert torch.equal(logits(model, tokens(), graph=none), logits(model, tokens()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("variant", READERS)
def test_later_tokens_and_edges_change_no_earlier_logit(variant, kind, training):
    model, graph = build(READERS[variant]).train(training), GRAPHS[kind]()
    other, later = tokens(), graph
    other[:, 8:] = tokens(seed=5)[:, 8:]
    if kind == "edges":
        kept = graph.index[:, 1] < 8
        later = TokenEdges(graph.index[kept], graph.weight[kept], 2)
    else:
        first = int(graph.chunk_ids[:, 7].max())
        weights = graph.weights.clone()
        weights[:, first + 1 :] *= 0.5  # chunks that no earlier token is in
        later = ChunkGraph(graph.chunk_ids, weights)
    found = []
    for ids, given in ((tokens(), graph), (other, later)):
        torch.manual_seed(3)  # the same dropout
        found.append(logits(model, ids, graph=given)[:, :8])
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", READERS)
def test_padding_and_its_content_change_no_real_logit(variant, side):
    model, ids, graph = build(READERS[variant]), tokens(3), chunks(3)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 4, 7)):
        mask[row, slice(0, pads) if side == "left" else slice(LENGTH - pads, LENGTH)] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "graph": graph}
    one, two = (logits(model, torch.where(mask == 1, ids, pad), **inputs) for pad in (1, 60))
    for row in range(3):
        real = mask[row] == 1
        assert torch.equal(one[row, real], two[row, real])
        alone = ChunkGraph(graph.chunk_ids[row : row + 1, real], graph.weights[row : row + 1])
        found = logits(model, ids[row : row + 1, real], graph=alone)[0]
        torch.testing.assert_close(one[row, real], found, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("variant", READERS)
def test_in_pieces_with_a_cache_logits_are_those_of_the_whole(variant, kind):
    model, graph = build(READERS[variant]), GRAPHS[kind]()
    whole = logits(model, tokens(), graph=graph, use_cache=False)
    for pieces in ([1] * 13, [6, 3, 4]):
        inputs, at, found = graph.inputs(model, DynamicCache(config=model.config)), 0, []
        for piece in pieces:
            found.append(logits(model, tokens()[:, at : at + piece], **inputs))
            at += piece
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("variant", FEW)
def test_greedy_generation_is_that_of_passes_over_all_also_in_a_loaded_model(variant, tmp_path):
    model, graph, ids = build(READERS[variant]), chunks(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(ids, **graph.inputs(model), **options)
    answer, real = ids, mask
    for _ in range(6):
        inputs = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0), "use_cache": False}
        chosen = logits(model, answer, graph=graph.inherit(answer.shape[1]), **inputs)[:, -1].argmax(-1, keepdim=True)
        answer, real = torch.cat([answer, chosen], 1), torch.cat([real, torch.ones_like(chosen)], 1)
    assert torch.equal(found, answer)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLMWithGNN.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(loaded, ids, graph=graph), logits(model, ids, graph=graph))
    assert torch.equal(loaded.generate(ids, **graph.inputs(loaded), **options), found)


def test_a_folder_with_its_own_copy_of_the_code_reads_the_graphs_of_this_one(tmp_path):
    model, graph = build(READERS["plain"]), chunks()
    model.save_pretrained(tmp_path)
    of_class = get_class_from_dynamic_module("modeling_llama_gnn.LlamaForCausalLMWithGNN", str(tmp_path))
    assert of_class is not LlamaForCausalLMWithGNN
    copy = of_class.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(copy, tokens(), graph=graph), logits(model, tokens(), graph=graph))
    found, expected = (
        each.generate(tokens(), **graph.inputs(each), max_new_tokens=5, do_sample=False) for each in (copy, model)
    )
    assert torch.equal(found, expected)
    inputs = graph.inputs(copy)
    assert torch.equal(logits(copy, tokens(), **inputs), logits(model, tokens(), graph=graph))


def test_beams_share_the_graph_of_their_row_and_prompt_lookup_gives_the_greedy_tokens():
    model, graph = build(READERS["plain"]), chunks()
    options = {"do_sample": False, "max_new_tokens": 6}
    together = model.generate(tokens(), **graph.inputs(model), **options, num_beams=3)
    for row in range(2):
        own = ChunkGraph(graph.chunk_ids[row : row + 1], graph.weights[row : row + 1])
        one = tokens()[row : row + 1]
        assert torch.equal(model.generate(one, **own.inputs(model), **options, num_beams=3)[0], together[row])
        looked_up = model.generate(one, **own.inputs(model), **options, prompt_lookup_num_tokens=2)
        assert torch.equal(looked_up, model.generate(one, **own.inputs(model), **options))


def test_a_pass_with_a_graph_leaves_it_in_the_cache_that_it_returns():
    model, graph, more = build(READERS["plain"]), chunks(), tokens(length=3, seed=9)
    with torch.no_grad():
        cache = cache_of(model(tokens(), graph=graph, use_cache=True))
    whole = logits(model, torch.cat([tokens(), more], 1), graph=graph.inherit(16), use_cache=False)
    torch.testing.assert_close(logits(model, more, **cache_argument(cache)), whole[:, 13:], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", FEW)
def test_every_weight_gets_a_gradient_and_checkpointing_gives_the_same(variant, reentrant):
    options, gradients = READERS[variant], []
    model = build({**options, "sparse": {**options["sparse"], "dropout": 0.0}}).train()
    graph = chunks()
    weights = graph.weights.clone().requires_grad_(not reentrant)  # torch takes gradients of arguments alone there
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        weights.grad = None
        model(tokens(), labels=tokens(), graph=ChunkGraph(graph.chunk_ids, weights)).loss.backward()
        gradients.append([each.grad.clone() for each in model.parameters()])
        if not reentrant:
            gradients[-1].append(weights.grad.clone())
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_a_recorder_sees_the_edges_of_attention_with_and_without_a_graph():
    model, seen = build(llama(layers=[0])), []
    for inputs in ({}, {"graph": chunks()}):
        with GraphRecorder(model) as recorder:
            logits(model, tokens(), **inputs)
        seen.append(recorder.adjacency(0).to_dense())
    assert torch.equal(*seen)


REFUSED = {
    "none": ({"attention": "llama"}, "network of `gnn_config.sparse`, which is None"),
    "gin": ({}, "network of `gnn_config.sparse`, which is None"),
    "pna": (llama({**SPARSE, "layer": "pna"}), "`sparse.layer` must be 'gin' or 'gcn', got 'pna'"),
    "recombination": (llama({**SPARSE, "layer": "recombination"}), "must be 'gin' or 'gcn', got 'recombination'"),
    "degree": (
        llama({"layer": "gcn", "normalises_degree": True}),
        "`sparse.normalises_degree=False` and `sparse.weighted_edges=True`, got True and True",
    ),
    "counted": (llama({"weighted_edges": False}), "got False and False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_add_up_a_graph_refuse_it_by_name(name):
    options, message = REFUSED[name]
    model = build(options)
    with pytest.raises(ValueError, match=message):
        model(tokens(), graph=chunks())
    with pytest.raises(ValueError, match=message):
        chunks().inputs(model)
    assert logits(model, tokens(), graph=None).isfinite().all()


def test_graphs_of_another_input_or_in_generate_are_refused():
    model = build(READERS["plain"])
    with pytest.raises(ValueError, match="`graph` has 3 rows, the input has 2"):
        model(tokens(), graph=chunks(3))
    with pytest.raises(ValueError, match=r"chunk_ids of shape \(2, 12\), the input has 13 tokens"):
        model(tokens(), graph=chunks(length=12))
    with pytest.raises(TypeError, match="`graph` must be a TokenEdges or a ChunkGraph, got dict"):
        model(tokens(), graph={"index": 1})
    with pytest.raises(ValueError, match=r"pass \*\*graph\.inputs\(model\)"):
        model.generate(tokens(), graph=chunks())


def test_the_network_meets_both_graphs():
    model, seen = build(READERS["plain"]), []
    model.model.layers[1].graph.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    logits(model, tokens(), graph=chunks())
    logits(model, tokens())
    assert [type(each) for each in seen] == [JoinedEdges, BlockedEdges]
