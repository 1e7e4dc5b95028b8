"""A graph given with the input of a sparse-GIN adapter: read, causal, carried through generations, refused in time."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny_decoders import ADAPTED, PARALLEL, tiny_decoder
from tiny_graphs import GRAPHS, LENGTH, chunks, edges
from transformers import DynamicCache

from graft import ChunkGraph, TokenEdges
from graft.modeling.graph.external_edges import expand_chunks
from graft.modeling.graph.external_graph import held_graph
from graft.modeling.graph.sparse_gin_config import SparseGINConfig
from graft.modeling.graph.sparse_gin_model import register_with_peft
from graft.modeling.transformers_compat import cache_argument, cache_of

register_with_peft()

FEW = ["gpt2", "llama", "mistral"]
MODES = ["causal", "external_only"]
GRID = [(family, mode) for family in ADAPTED for mode in (MODES if family in FEW else MODES[:1])]


def fit(family="llama", seed=1, base=None, **options):
    base = tiny_decoder(family) if base is None else base
    defaults = {"rank": 6, "task_type": "CAUSAL_LM", "dropout": 0.0, "scale_first": 0.5}
    model = get_peft_model(base, SparseGINConfig(**{**defaults, **options}))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.base_model.sparse_gin.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.copy_(noise + (0.5 if parameter.shape == (1,) else 0.0))
    return model.eval()


def ids(batch=2, length=LENGTH, seed=0):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", sorted(GRAPHS))
@pytest.mark.parametrize("family", ADAPTED)
def test_the_graph_acts_and_no_later_token_or_edge_changes_an_earlier_logit(family, kind, mode):
    model, tokens, graph = fit(family, edge_mode=mode), ids(), GRAPHS[kind]()
    found = logits(model, tokens, graph=graph)
    assert not torch.allclose(found, logits(model, tokens))
    other = tokens.clone()
    other[:, 8:] = ids(seed=5)[:, 8:]
    assert torch.equal(logits(model, other, graph=graph)[:, :8], found[:, :8])
    if kind == "edges":
        fewer = graph.index[:, 1] < 8
        graph = TokenEdges(graph.index[fewer], graph.weight[fewer], 2)
        torch.testing.assert_close(logits(model, tokens, graph=graph)[:, :8], found[:, :8], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ADAPTED)
def test_one_edge_moves_its_reader_and_nothing_before(family):
    model, tokens = fit(family, layers_to_transform=[1]), ids(1)
    graph = TokenEdges(torch.tensor([[0, 9, 2]]), torch.ones(1, dtype=torch.float64))
    moved = (logits(model, tokens, graph=graph) != logits(model, tokens)).any(-1)[0]
    assert moved.nonzero().flatten()[0] == 9


@pytest.mark.parametrize(("family", "mode"), GRID)
def test_chunks_are_their_expanded_edges_and_weight_0_is_no_graph(family, mode):
    model, tokens, graph = fit(family, edge_mode=mode), ids(), chunks()
    pairs = expand_chunks(graph)
    index = pairs.nonzero()
    expanded = TokenEdges(index, pairs[tuple(index.T)], 2)
    found = logits(model, tokens, graph=graph)
    torch.testing.assert_close(logits(model, tokens, graph=expanded), found, atol=1e-5, rtol=1e-5)
    none = ChunkGraph(graph.chunk_ids, torch.zeros_like(graph.weights))
    assert torch.equal(logits(model, tokens, graph=none), logits(model, tokens))


@pytest.mark.parametrize("family", ["llama", *PARALLEL])
def test_attention_edges_and_given_ones_are_added_up(family):
    """One layer's update, against the matrix of both graphs."""
    model, tokens, graph = fit(family, layers_to_transform=[1]), ids(), chunks()
    update, seen = model.base_model.sparse_gin.adapters["default"].layers["1"], []
    handle = update.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    logits(model, tokens, graph=graph, use_cache=False)
    handle.remove()
    states, joined, _, output = seen[0]
    attention = joined.attention.whole()
    both = attention.with_weight(attention.weight + expand_chunks(graph))
    with torch.no_grad():
        torch.testing.assert_close(update(states, both), output, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_a_message_runs_along_a_given_edge_where_attention_carries_nothing(mode, storage):
    model, tokens = (
        fit(edge_mode=mode, storage=storage, adjacency={"combine": "mean"}, layers_to_transform=[1]),
        ids(1),
    )
    for layer in model.get_base_model().model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.k_proj.weight)  # equal weights: no edge of attention survives the cut
    other = tokens.clone()
    other[0, 2] = 3 + (other[0, 2] - 2) % 58
    graph = TokenEdges(torch.tensor([[0, 9, 2]]), torch.ones(1, dtype=torch.float64))
    moved = (logits(model, tokens, graph=graph) != logits(model, other, graph=graph)).any(-1)[0].nonzero().flatten()
    without = (logits(model, tokens) != logits(model, other)).any(-1)[0].nonzero().flatten()
    assert 9 in moved
    assert 9 not in without


def repeated_keys(model, small):
    """The weights of `small`, whose heads share keys and values in pairs, as `model` has them for each head."""
    state = dict(small.state_dict())
    for name, weight in model.state_dict().items():
        found = state[name]
        if found.shape != weight.shape:
            fused = name.endswith("qkv_proj.weight")
            own, shared = (found[:32], found[32:]) if fused else (found[:0], found)
            heads = shared if shared.dim() == 2 and shared.shape[1] == 8 else shared.unflatten(0, (-1, 8))
            both = heads.repeat_interleave(2, 0).reshape(-1, *weight.shape[1:])
            state[name] = torch.cat([own, both])
    return state


@pytest.mark.parametrize("family", sorted({*ADAPTED} - {"gpt2", "gpt_neox"}))
def test_heads_that_share_keys_read_the_graphs_of_heads_with_keys_of_their_own(family):
    small, tokens, graph = tiny_decoder(family), ids(), chunks()
    base = tiny_decoder(family, num_key_value_heads=4)
    assert sum(weight.numel() for weight in base.parameters()) > sum(weight.numel() for weight in small.parameters())
    base.load_state_dict(repeated_keys(base, small))
    torch.testing.assert_close(logits(base, tokens), logits(small, tokens), atol=1e-6, rtol=1e-6)
    found, expected = (logits(fit(base=each), tokens, graph=graph) for each in (small, base))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "mode"), GRID)
def test_padding_and_its_content_change_no_real_logit(family, mode, side):
    if family == "gemma2":  # its stock eager attention makes padding NaN in float64
        base, close = tiny_decoder(family, torch.float32), {"atol": 2e-5, "rtol": 1e-4}
    else:
        base, close = tiny_decoder(family), {"atol": 1e-5, "rtol": 1e-5}
    model, tokens, graph = fit(base=base, edge_mode=mode), ids(3), chunks(3)
    mask = torch.ones_like(tokens)
    for row, pads in enumerate((0, 4, 7)):
        mask[row, slice(0, pads) if side == "left" else slice(13 - pads, 13)] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "graph": graph}
    one, two = (logits(model, torch.where(mask == 1, tokens, pad), **inputs) for pad in (1, 60))
    for row in range(3):
        real = mask[row] == 1
        assert torch.equal(one[row, real], two[row, real])
        alone = ChunkGraph(graph.chunk_ids[row : row + 1, real], graph.weights[row : row + 1])
        found = logits(model, tokens[row : row + 1, real], graph=alone)[0]
        torch.testing.assert_close(one[row, real], found, **close)


@pytest.mark.parametrize("kind", sorted(GRAPHS))
@pytest.mark.parametrize(("family", "mode"), GRID)
def test_in_pieces_with_a_cache_logits_are_those_of_the_whole(family, kind, mode):
    """Also where a sliding window of 6 has dropped keys that the graph reads."""
    model, tokens, graph = fit(family, num_layers=2, edge_mode=mode), ids(length=21), GRAPHS[kind](length=21)
    whole = logits(model, tokens, graph=graph, use_cache=False)
    for pieces in ([9, *[1] * 12], [6, 3, 12]):
        inputs, at, found = graph.inputs(model, DynamicCache(config=model.config)), 0, []
        for piece in pieces:
            found.append(logits(model, tokens[:, at : at + piece], **inputs))
            at += piece
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "mode"), GRID)
def test_new_tokens_of_a_generation_belong_to_the_last_chunk(family, mode):
    """The scores of each greedy token are those of one pass over all tokens, the graph written out for it."""
    model, tokens, graph = fit(family, edge_mode=mode), ids(), chunks()
    mask = torch.ones_like(tokens)
    if family != "gemma2":  # its stock eager attention makes padding NaN in float64
        mask[0, :4] = 0
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(input_ids=tokens, attention_mask=mask, **graph.inputs(model), max_new_tokens=8, **options)
    mask = torch.nn.functional.pad(mask, (0, 8), value=1)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    expected, outside = (
        logits(
            model, found.sequences, graph=ChunkGraph(torch.cat([graph.chunk_ids, more], 1), graph.weights), **inputs
        )
        for more in (graph.chunk_ids[:, -1:].expand(-1, 8), torch.full((2, 8), -1))
    )
    close = {"atol": 1e-5, "rtol": 1e-4, "check_dtype": False}  # `generate` gives float32
    torch.testing.assert_close(torch.stack(found.logits, 1), expected[:, LENGTH - 1 : -1], **close)
    assert not torch.allclose(outside[:, LENGTH:], expected[:, LENGTH:], atol=1e-4)


def log_likelihood(model, answer, graph):
    scores = logits(model, answer, graph=graph.inherit(answer.shape[1]), use_cache=False).log_softmax(-1)
    picked = scores[:, LENGTH - 1 : -1].gather(-1, answer[:, LENGTH:, None])
    return picked.sum((1, 2))


def test_beams_share_the_graph_of_their_row():
    """The scores that beam search returns are the log-likelihoods of its answers under each row's own graph."""
    model, tokens, graph = fit(), ids(), chunks()
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 6}
    options |= {"output_scores": True, "return_dict_in_generate": True, "length_penalty": 0.0}
    found = model.generate(input_ids=tokens, **graph.inputs(model), **options)
    own = ChunkGraph(graph.chunk_ids.repeat_interleave(2, 0), graph.weights.repeat_interleave(2, 0))
    expected = log_likelihood(model, found.sequences, own)
    torch.testing.assert_close(found.sequences_scores.double(), expected, atol=1e-4, rtol=1e-4)
    swapped = ChunkGraph(own.chunk_ids.flip(0), own.weights.flip(0))
    assert not torch.allclose(log_likelihood(model, found.sequences, swapped), expected, atol=1e-3)


def test_prompt_lookup_crops_the_cache_and_gives_the_greedy_tokens():
    model, tokens, graph = fit(), ids(1), chunks(1)
    found = [
        model.generate(input_ids=tokens, **graph.inputs(model), max_new_tokens=10, do_sample=False, **options)
        for options in ({}, {"prompt_lookup_num_tokens": 2})
    ]
    assert torch.equal(*found)


def test_a_pass_with_a_graph_leaves_it_in_the_cache_that_it_returns():
    model, tokens, graph = fit(), ids(), chunks()
    with torch.no_grad():
        cache = cache_of(model(input_ids=tokens, graph=graph, use_cache=True))
    assert held_graph(cache).graph is graph
    more = ids(length=3, seed=9)
    whole = logits(model, torch.cat([tokens, more], 1), graph=graph.inherit(16), use_cache=False)
    found = logits(model, more, **cache_argument(cache))
    torch.testing.assert_close(found, whole[:, 13:], atol=1e-6, rtol=1e-5)
    cache.crop(-3)
    opened = graph.append_chunk(torch.tensor([[0.5, 0.0, 1.0, 0.25, 1.0]], dtype=torch.float64), tokens=3)
    whole = logits(model, torch.cat([tokens, more], 1), graph=opened, use_cache=False)
    found = logits(model, more, graph=opened, **cache_argument(cache))
    torch.testing.assert_close(found, whole[:, 13:], atol=1e-6, rtol=1e-5)


def test_rows_of_the_graph_follow_the_batch_of_the_cache():
    graph, cache = chunks(), DynamicCache(config=fit().config)
    held = held_graph(graph.inputs(fit(), cache)["cache" if "cache" in cache_argument(cache) else "past_key_values"])
    assert held.rows_of(4).tolist() == [0, 0, 1, 1]
    held.inner.update(*torch.zeros(2, 4, 1, 3, 2))
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    assert held.rows_of(4).tolist() == [1, 0, 0, 1]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert held.rows_of(2).tolist() == [1, 1]
    cache.batch_repeat_interleave(2)
    assert held.rows_of(4).tolist() == [1, 1, 1, 1]
    cache.reset()
    assert held.rows_of(2).tolist() == [0, 1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_weight_gets_a_gradient_and_checkpointing_gives_the_same(mode, reentrant):
    model, tokens, graph, gradients = fit(edge_mode=mode).train(), ids(), chunks(), []
    model.enable_input_require_grads()
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, graph=graph).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_disabled_the_graph_is_not_read_and_a_copy_reads_it():
    model, tokens, graph = fit(), ids(), chunks()
    found = logits(model, tokens, graph=graph)
    assert torch.equal(logits(copy.deepcopy(model), tokens, graph=graph), found)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens, graph=graph), logits(model, tokens))
    model.add_adapter("other", SparseGINConfig(rank=4, edge_mode="external_only", scale_first=0.5))
    assert torch.equal(logits(model, tokens, graph=graph), found)


def test_a_task_that_needs_one_edge_is_learnt_with_the_graph_alone():
    """The answer at the last token is a token far before it, where one edge leads; attention's values are 0."""
    model = fit(edge_mode="external_only", rank=16)
    for layer in model.get_base_model().model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
    rng, weight = torch.Generator().manual_seed(4), torch.ones(16, dtype=torch.float64)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = {"true": [], "shuffled": []}
    for _ in range(60):
        tokens = torch.randint(3, 61, (16, 6), generator=rng)
        answer = 3 + torch.randint(0, 4, (16,), generator=rng)
        tokens[:, 1], tokens[:, 5] = answer, 7
        row = torch.arange(16)
        index = torch.stack([row, torch.full_like(row, 5), torch.full_like(row, 1)], 1)
        elsewhere = index.clone()
        elsewhere[:, 2] = 3
        for name, edge in (("true", index), ("shuffled", elsewhere)):
            output = model(input_ids=tokens, graph=TokenEdges(edge, weight, 16)).logits[:, -1, 3:7]
            loss = torch.nn.functional.cross_entropy(output, answer - 3)
            losses[name].append(loss.item())
            if name == "true":
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    assert sum(losses["true"][-5:]) / 5 < 0.35
    assert sum(losses["shuffled"][-5:]) / 5 > 1.0  # chance is 1.39


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (lambda: chunks(3), ValueError, "`graph` has 3 rows, the input has 2"),
        (lambda: chunks(length=12), ValueError, r"chunk_ids of shape \(2, 12\), the input has 13 tokens"),
        (lambda: chunks(length=14), ValueError, r"chunk_ids of shape \(2, 14\), the input has 13 tokens"),
        (lambda: edges(length=40), ValueError, r"`graph` has an edge of token \d+, the input has 13 tokens"),
        (lambda: {"chunk_ids": 1}, TypeError, "`graph` must be a TokenEdges or a ChunkGraph, got dict"),
    ],
)
def test_a_graph_of_another_input_is_refused(graph, error, message):
    with pytest.raises(error, match=message):
        logits(fit(), ids(), graph=graph())


def test_generations_that_cannot_read_the_graph_are_refused():
    model, graph = fit(), chunks()
    with pytest.raises(ValueError, match=r"pass \*\*graph\.inputs\(model\)"):
        model.generate(input_ids=ids(), graph=graph)
    with pytest.raises(ValueError, match="`graph` has 2 rows, the input has 3"):
        model.generate(input_ids=ids(3), **graph.inputs(model), max_new_tokens=2)
    with pytest.raises(ValueError, match="`model` reads no graph"):
        graph.inputs(fit().unload())
