"""Products of a sparse matrix with nodes; their gradient too is added up row by row, along the transposed matrix."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix (rows, columns) by its entries, those of each row together.

    Args:
        column: (entries,), where in its row each entry stands.
        starts: (rows,), the first entry of each row; an empty row begins where the next one does.
        weight: (entries,), or None where all are 1.
        columns: how many there are.
    """

    column: Tensor
    starts: Tensor
    weight: Tensor | None
    columns: int

    @classmethod
    def of(cls, entries: tuple[Tensor, Tensor, Tensor | None], rows: int, columns: int) -> Self:
        """From the row, column and weight, if any, of each entry (entries,), in the order of rows."""
        row, column, weight = entries
        return cls(column, torch.searchsorted(row, torch.arange(rows, device=row.device)), weight, columns)

    @cached_property
    def transposed(self) -> "SparseRows":
        """The matrix (columns, rows)."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([self.column.shape[0]])])
        rows = torch.arange(self.starts.shape[0], device=self.starts.device)
        row = rows.repeat_interleave(ends - self.starts, output_size=self.column.shape[0])
        column, order = self.column.sort(stable=True)
        starts = torch.searchsorted(column, torch.arange(self.columns, device=column.device))
        return SparseRows(row[order], starts, None if self.weight is None else self.weight[order], rows.shape[0])

    def times(self, nodes: Tensor) -> Tensor:
        """The product with nodes (columns, width): (rows, width). O(entries x width), forwards and backwards."""
        if self.weight is not None and self.weight.requires_grad:
            return self._added_up(nodes)
        product: Tensor = _Product.apply(nodes, self)
        return product

    def _added_up(self, nodes: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(nodes.dtype)
        return embedding_bag(self.column, nodes, self.starts, mode="sum", per_sample_weights=weight)


class _Product(torch.autograd.Function):
    """M z, whose gradient is M^T g: torch's own scatters into a row at a time, on one thread."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, matrix: SparseRows) -> Tensor:
        ctx.matrix = matrix
        return matrix._added_up(nodes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.transposed._added_up(gradient.contiguous()), None
