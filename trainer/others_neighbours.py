"""Rows with the neighbours of other rows: what a model that reads none of its own would do as well with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class OthersNeighbours(Dataset[Any]):
    """Each row with `retrieved` of the row half the data set away, chunk by chunk.

    Which row that is depends on nothing but the rows, so a loss does not depend on the batch or on processes.

    Args:
        rows: give (chunks, neighbours, neighbour_length) as `retrieved`.

    Raises:
        ValueError: the rows have no length.
    """

    def __init__(self, rows: Any) -> None:
        if not hasattr(rows, "__len__"):
            raise ValueError("The view 'random' needs rows with a length: it takes the neighbours of another row.")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch; a DataLoader asks for them so."""
        count = len(indices)
        others = [(index + len(self) // 2) % len(self) for index in indices]
        rows = _rows_of(self.rows, [*indices, *others])
        alone = len(self) == 1
        return [
            {**row, "retrieved": of_other(other["retrieved"], len(row["retrieved"]), alone)}
            for row, other in zip(rows[:count], rows[count:], strict=True)
        ]


def of_other(retrieved: Tensor, chunks: int, alone: bool) -> Tensor:
    """(chunks, ...) of another row's (its chunks, ...), round and round; of a row that is `alone` the other half's."""
    if not len(retrieved):
        return retrieved
    first = max(1, len(retrieved) // 2) if alone else 0
    return retrieved[(torch.arange(chunks) + first) % len(retrieved)]


def _rows_of(rows: Any, indices: list[int]) -> list[dict[str, Any]]:
    if hasattr(rows, "__getitems__"):
        gathered: list[dict[str, Any]] = rows.__getitems__(indices)
        return gathered
    return [rows[index] for index in indices]
