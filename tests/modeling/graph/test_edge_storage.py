"""Sums, numbers and vectors taken along edges are the same whether all pairs are stored or the edges alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.modeling.graph.edge_storage import DenseEdges, SparseEdges, edges_to_keep, largest_edges


def random_edges(seed, leading, rows, source, kept):
    """A graph with at most `kept` edges in a row, in both forms."""
    rng = torch.Generator().manual_seed(seed)
    graph = torch.rand(*leading, rows, source, generator=rng, dtype=torch.float64)
    least = graph.topk(min(kept, source), dim=-1).values[..., -1:]
    graph = torch.where(graph >= least, graph, 0.0).requires_grad_()
    return graph, DenseEdges(graph), SparseEdges(*largest_edges(graph, kept), source)


@given(st.integers(0, 1000), st.booleans(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_sums_over_edges_and_their_gradients_agree(seed, by_head, rows, source, kept):
    leading = (2, 3) if by_head else (2,)
    graph, dense, sparse = random_edges(seed, leading, rows, source, kept)
    sources = torch.randn(*leading, source, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [(graph[..., i, :, None] * sources).sum(-2) for i in range(rows)], dim=-2
    )  # token i reads column j
    wanted = torch.autograd.grad(expected.square().sum(), [graph, sources])
    for edges in (dense, sparse):
        found = edges.sum(sources)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found.square().sum(), [graph, sources], retain_graph=True)
        exists = graph > 0  # among weights of 0 the sparse form keeps some, whose gradient means nothing
        torch.testing.assert_close(gradients[0] * exists, wanted[0] * exists)
        torch.testing.assert_close(gradients[1], wanted[1])


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_what_is_taken_along_an_edge_comes_from_its_source(seed, rows, source, kept):
    graph, dense, sparse = random_edges(seed, (2,), rows, source, kept)
    values, vectors = torch.randn(2, source, dtype=torch.float64), torch.randn(2, source, 3, dtype=torch.float64)
    for edges in (dense, sparse):
        taken, gathered = edges.take(values).expand_as(edges.weight), edges.gather(vectors)
        gathered = gathered.expand(*edges.weight.shape, 3)
        places = edges.places().expand_as(edges.weight)
        for b in range(2):
            for i in range(rows):
                for e in range(edges.weight.shape[-1]):
                    j = int(places[b, i, e])
                    assert taken[b, i, e] == values[b, j]
                    assert torch.equal(gathered[b, i, e], vectors[b, j])
                    assert edges.weight[b, i, e] in (0, graph[b, i, j])


def test_blocks_of_rows_and_slices_of_nodes_have_the_same_edges():
    _, *forms = random_edges(0, (2,), 5, 6, 3)
    sources = torch.randn(2, 4, 6, 3, dtype=torch.float64)  # four slices
    for edges in forms:
        whole = edges.spread().sum(sources)
        for part in range(4):
            torch.testing.assert_close(whole[:, part], edges.sum(sources[:, part]))
        torch.testing.assert_close(edges.block(range(1, 4)).sum(sources[:, 0]), whole[:, 0, 1:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_wider_than_half_precision_sources(dtype):
    _, dense, sparse = random_edges(0, (2,), 5, 6, 3)
    sources = torch.randn(2, 6, 3).to(dtype)
    for edges in (dense, sparse):
        assert edges.sum(sources).dtype == dtype
        torch.testing.assert_close(edges.sum(sources).double(), dense.sum(sources.double()), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("bound", "source", "storage", "expected"),
    [
        (None, 5000, "auto", None),
        (56, 5000, "dense", None),
        (56, 5000, "auto", 56),
        (56, 1024, "auto", None),
        (3000, 5000, "auto", None),
        (56, 20, "sparse", 20),
        (56, 100, "sparse", 56),
        (0, 100, "sparse", 1),
    ],
)
def test_the_storage_follows_option_bound_and_length(bound, source, storage, expected):
    assert edges_to_keep(bound, source, storage) == expected
