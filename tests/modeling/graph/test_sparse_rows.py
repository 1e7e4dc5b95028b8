"""A sparse matrix times nodes, and back, is what the written-out matrix gives."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.modeling.graph.sparse_rows import SparseRows


def matrix_of(seed, rows, columns, weighed):
    """Entries at random places, some rows and columns empty, and the same written out."""
    rng = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    dense = dense * (torch.rand(rows, columns, generator=rng) < 0.4)
    row, column = dense.nonzero(as_tuple=True)
    if not weighed:
        dense = (dense != 0).double()
    return SparseRows.of((row, column, dense[row, column] if weighed else None), rows, columns), dense


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_products_gradients_and_the_transpose_are_those_of_the_matrix(seed, rows, columns, weighed):
    matrix, dense = matrix_of(seed, rows, columns, weighed)
    nodes = torch.randn(columns, 3, dtype=torch.float64, requires_grad=True)
    arriving = torch.randn(rows, 3, dtype=torch.float64)
    product = matrix.times(nodes)
    product.backward(arriving)
    torch.testing.assert_close(product, dense @ nodes, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nodes.grad, dense.T @ arriving, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.transposed.times(arriving), dense.T @ arriving, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.transposed.transposed.times(nodes), dense @ nodes, rtol=1e-12, atol=1e-12)


def test_weights_that_are_trained_have_the_gradient_of_the_matrix():
    matrix, dense = matrix_of(3, 6, 5, weighed=True)
    nodes = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    matrix.weight.requires_grad_()
    matrix.times(nodes).square().sum().backward()
    found = matrix.weight.grad, nodes.grad
    nodes.grad = None
    dense.requires_grad_()
    (dense @ nodes).square().sum().backward()
    torch.testing.assert_close(found, (dense.grad[dense != 0], nodes.grad))


def test_half_precision_nodes_give_products_of_their_dtype():
    matrix, dense = matrix_of(4, 6, 5, weighed=True)
    nodes = torch.randn(5, 3).bfloat16().requires_grad_()
    product = matrix.times(nodes)
    product.sum().backward()
    assert product.dtype == nodes.grad.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), dense @ nodes.double(), rtol=0.02, atol=0.05)
