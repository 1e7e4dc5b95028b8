"""What tokens read along edges and chunks given from elsewhere: equal to loops, and never of a later token."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.modeling.graph import external_edges
from graft.modeling.graph.external_edges import ChunkGraph, TokenEdges, expand_chunks
from graft.modeling.graph.external_graph import PassShape


def chunk_case(seed, batch=2, length=11, chunks=4, shared=False):
    """A ChunkGraph with tokens of no chunk, empty chunks, and weights above what a mean leaves below 1."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, chunks, (batch, length), generator=rng).sort(1).values
    ids = ids.masked_fill(torch.rand(batch, length, generator=rng) < 0.2, -1)
    weights = 4 * torch.rand(1 if shared else batch, chunks, chunks, generator=rng, dtype=torch.float64)
    weights = weights * (torch.rand(weights.shape, generator=rng) < 0.7)
    return ChunkGraph(ids, weights.tril())


def edge_case(seed, batch=2, length=11, count=30):
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, length, (count, 2), generator=rng).sort(1, descending=True).values
    index = torch.cat([torch.randint(0, batch, (count, 1), generator=rng), pairs], 1)
    return TokenEdges(index, torch.rand(count, generator=rng, dtype=torch.float64), batch)


def nodes_of(seed, batch=2, length=11, width=3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=rng, dtype=torch.float64)


def shape(batch, past, new, mask=None, rows=None):
    return PassShape(torch.arange(batch) if rows is None else rows, mask, past, new)


def read(graph, nodes, past=0, **options):
    return graph.over(shape(nodes.shape[0], past, nodes.shape[1] - past, **options)).messages(nodes)


def chunk_loop(graph, nodes, mask=None):
    """sum_c' W[c, c'] mean_{j <= i, j in c'} z_j, no edge above 1, token by token."""
    ids, found = graph.chunk_ids.tolist(), torch.zeros_like(nodes)
    for b in range(nodes.shape[0]):
        weights = graph.weights[b % graph.weights.shape[0]]
        real = [j for j in range(nodes.shape[1]) if ids[b][j] >= 0 and (mask is None or mask[b, j])]
        for i in real:
            for c in range(weights.shape[0]):
                members = [j for j in real if ids[b][j] == c and j <= i]
                for j in members:
                    found[b, i] += min(1.0, float(weights[ids[b][i], c]) / len(members)) * nodes[b, j]
    return found


def edge_loop(graph, nodes):
    total = {}
    for place, weight in zip(graph.index.tolist(), graph.weight.tolist(), strict=True):
        total[tuple(place)] = total.get(tuple(place), 0.0) + weight
    found = torch.zeros_like(nodes)
    for (b, i, j), weight in total.items():
        found[b, i] += min(1.0, weight) * nodes[b, j]
    return found


def dense_edges(graph):
    """A ChunkGraph as TokenEdges."""
    pairs = expand_chunks(graph)
    index = pairs.nonzero()
    return TokenEdges(index, pairs[tuple(index.T)], graph.batch)


SEEDS = st.integers(0, 10**6)
CASES = {"chunks": chunk_case, "edges": edge_case}


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_chunks_equal_a_loop_and_their_expansion(seed, batch, length, chunks, shared):
    graph, nodes = chunk_case(seed, batch, length, chunks, shared), nodes_of(seed, batch, length)
    expected = chunk_loop(graph, nodes)
    torch.testing.assert_close(read(graph, nodes), expected, atol=1e-10, rtol=1e-10)
    with patch.object(external_edges, "_BLOCK", 1 + seed % 5):
        torch.testing.assert_close(read(graph, nodes), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(expand_chunks(graph) @ nodes, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(read(dense_edges(graph), nodes), expected, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 3), st.integers(1, 12), st.integers(0, 40))
def test_edges_equal_a_loop_and_those_listed_twice_are_added_before_they_are_cut(seed, batch, length, count):
    graph, nodes = edge_case(seed, batch, length, count), nodes_of(seed, batch, length)
    torch.testing.assert_close(read(graph, nodes), edge_loop(graph, nodes), atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(sorted(CASES)), st.integers(1, 10))
def test_rows_of_a_later_pass_are_those_of_the_whole(seed, kind, past):
    graph, nodes = CASES[kind](seed), nodes_of(seed)
    whole = read(graph, nodes)
    with patch.object(external_edges, "_BLOCK", 3):
        torch.testing.assert_close(read(graph, nodes, past), whole[:, past:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(read(graph, nodes, past), whole[:, past:], atol=1e-12, rtol=1e-12)
    before = graph.over(shape(2, 0, past)).messages(nodes[:, :past])
    torch.testing.assert_close(before, whole[:, :past], atol=1e-12, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(sorted(CASES)), st.integers(0, 10))
def test_later_nodes_change_no_earlier_row(seed, kind, place):
    graph, nodes = CASES[kind](seed), nodes_of(seed)
    other = nodes.clone()
    other[:, place + 1 :] = torch.nan if kind == "edges" else 1e3
    assert torch.equal(read(graph, nodes)[:, : place + 1], read(graph, other)[:, : place + 1])


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_later_chunks_change_no_earlier_row(seed):
    graph, nodes = chunk_case(seed), nodes_of(seed)
    weights = graph.weights.clone()
    weights[:, 2:] = torch.rand_like(weights[:, 2:]).tril(2)
    other = ChunkGraph(graph.chunk_ids, weights)
    early = (graph.chunk_ids < 2)[..., None]
    assert torch.equal(read(graph, nodes) * early, read(other, nodes) * early)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 5))
def test_padding_has_no_chunk_and_what_stands_there_is_not_read(seed, pads):
    graph, nodes = chunk_case(seed), nodes_of(seed)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :pads], mask[1, 11 - pads :] = 0, 0
    found = read(graph, nodes.masked_fill(mask[..., None] == 0, 1e3), mask=mask)
    torch.testing.assert_close(found, chunk_loop(graph, nodes, mask), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", sorted(CASES))
def test_gradients_are_those_of_finite_differences(kind):
    graph, nodes = CASES[kind](3), nodes_of(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: read(graph, z), (nodes,))


def test_weights_may_be_trained():
    graph = chunk_case(5)
    weights = (0.2 * graph.weights).requires_grad_()
    read(ChunkGraph(graph.chunk_ids, weights), nodes_of(5)).square().sum().backward()
    assert weights.grad.any()


@pytest.mark.parametrize("kind", sorted(CASES))
def test_beams_share_a_row_of_the_graph(kind):
    graph, rows = CASES[kind](7), torch.tensor([1, 0, 1, 1])
    nodes = nodes_of(7, 4)
    found = read(graph, nodes, rows=rows)
    for place, row in enumerate(rows.tolist()):
        alone = torch.zeros(2, 11, 3, dtype=torch.float64)
        alone[row] = nodes[place]
        torch.testing.assert_close(found[place], read(graph, alone)[row], atol=1e-12, rtol=1e-12)


def test_empty_chunks_change_nothing_wherever_they_are_put_in():
    graph, nodes = chunk_case(2), nodes_of(2)
    moved = torch.tensor([1, 2, 4, 5])
    weights = torch.rand(2, 7, 7, dtype=torch.float64).tril()
    weights[:, moved[:, None], moved] = graph.weights
    ids = torch.where(graph.chunk_ids < 0, -1, moved[graph.chunk_ids.clamp(min=0)])
    torch.testing.assert_close(read(ChunkGraph(ids, weights), nodes), read(graph, nodes), atol=1e-12, rtol=1e-12)


def test_long_float32_inputs_are_summed_as_well_as_by_their_expansion():
    ids = torch.arange(64).repeat_interleave(128)[None]
    graph = ChunkGraph(ids, torch.rand(1, 64, 64).tril())
    nodes = 5 + torch.randn(1, 8192, 2)
    exact = read(ChunkGraph(ids, graph.weights.double()), nodes.double())
    torch.testing.assert_close(read(graph, nodes).double(), exact, atol=1e-5, rtol=1e-6)


def test_new_tokens_inherit_the_last_chunk_or_open_one():
    ids = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, -1]])
    weights = torch.tensor([[0.5, 0.0], [0.25, 1.0]])[None].double()
    graph = ChunkGraph(ids, weights)
    assert graph.inherit(6).chunk_ids.tolist() == [[-1, 0, 0, 1, 1, 1], [0, 0, 0, -1, 0, 0]]
    assert graph.inherit(3).chunk_ids.tolist() == [[-1, 0, 0], [0, 0, 0]]
    nodes = nodes_of(4, 2, 6)
    torch.testing.assert_close(read(graph, nodes), chunk_loop(graph.inherit(6), nodes))
    opened = graph.append_chunk(torch.tensor([[0.5, 0.75, 1.0]]), tokens=2)
    assert opened.chunk_ids.tolist() == [[-1, 0, 0, 1, 2, 2], [0, 0, 0, -1, 2, 2]]
    assert opened.weights.tolist() == [[[0.5, 0.0, 0.0], [0.25, 1.0, 0.0], [0.5, 0.75, 1.0]]]
    torch.testing.assert_close(read(opened, nodes)[:, :4], read(graph, nodes)[:, :4])
    with pytest.raises(ValueError, match=r"`weights_row` must be \(2 or 1, 3\), got \(1, 2\)"):
        graph.append_chunk(torch.ones(1, 2), tokens=1)
    with pytest.raises(ValueError, match="`weights` must be finite and at least 0, got -1"):
        graph.append_chunk(-torch.ones(1, 3), tokens=1)


IDS, ONE = torch.tensor([[0, 0, 1]]), torch.ones(1)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (IDS, torch.ones(1, 2, 2), r"0 above the diagonal.* got weights\[0, 0, 1\] = 1.0"),
        (IDS, -torch.eye(2)[None], r"finite and at least 0, got -1.0 at \[0, 0, 0\]"),
        (IDS, torch.eye(2)[None] * torch.nan, "finite and at least 0, got nan"),
        (IDS, torch.eye(2)[None] / 0, "finite and at least 0, got"),
        (IDS, torch.eye(2, dtype=torch.long)[None], "must be floating-point numbers, got .*int64"),
        (IDS, torch.eye(2).expand(3, 2, 2), r"`weights` must be \(1 or 1, chunks, chunks\) for chunk_ids \(1, 3\)"),
        (IDS, torch.ones(1, 1, 2), "`weights` must be"),
        (IDS, torch.eye(1)[None], r"`chunk_ids` must be in \[-1, 1\), got 1 at \[0, 2\]"),
        (IDS - 2, torch.eye(2)[None], r"must be in \[-1, 2\), got -2 at \[0, 0\]"),
        (IDS.flip(1), torch.eye(2)[None], r"must not decrease along a row, they do at \[0, 1\]"),
        (torch.tensor([[1, -1, 0]]), torch.eye(2)[None], r"must not decrease along a row, they do at \[0, 2\]"),
        (IDS.float(), torch.eye(2)[None], r"`chunk_ids` must be integers .*float32"),
        (IDS[0], torch.eye(2)[None], r"`chunk_ids` must be integers of shape \(batch, tokens\), got \(3,\)"),
    ],
)
def test_chunk_graphs_that_cannot_be_are_refused(ids, weights, message):
    with pytest.raises(ValueError, match=message):
        ChunkGraph(ids, weights)


@pytest.mark.parametrize(
    ("index", "weight", "message"),
    [
        ([[0, 1, 2]], ONE, r"`index` must have j <= i.* got \(row, i, j\) = \[0, 1, 2\]"),
        ([[1, 2, 2]], ONE, r"row in \[0, 1\).* got \[1, 2, 2\]"),
        ([[0, 2, -1]], ONE, r"j >= 0\), got \[0, 2, -1\]"),
        ([[0.0, 1.0, 1.0]], ONE, "`index` must be integers of shape .*float32"),
        ([[0, 1]], ONE, r"`index` must be integers of shape \(edges, 3\), got \(1, 2\)"),
        ([[0, 1, 1]], torch.ones(2), r"`weight` must be \(1,\)"),
        ([[0, 1, 1]], -ONE, r"`weight` must be finite and at least 0, got -1.0 at \[0\]"),
        ([[0, 1, 1]], ONE * torch.inf, "finite and at least 0, got inf"),
    ],
)
def test_edges_that_cannot_be_are_refused(index, weight, message):
    with pytest.raises(ValueError, match=message):
        TokenEdges(torch.tensor(index), weight)


def test_edges_must_not_touch_padding():
    graph, mask = TokenEdges(torch.tensor([[0, 2, 1]]), ONE), torch.tensor([[1, 0, 1]])
    with pytest.raises(ValueError, match=r"must not touch padding, got the edge \(row, i, j\) = \[0, 2, 1\]"):
        graph.over(shape(1, 0, 3, mask))
