"""What a place for vectors must do to serve a corpus: the protocol, and what the engines share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

Metric = Literal["inner_product", "l2"]
METRICS = ("inner_product", "l2")


class VectorEngine(Protocol):
    """Vectors by number, and the nearest of them."""

    def create(self, dim: int, metric: Metric = "l2") -> None:
        """Begin an empty set of `dim`-wide vectors; what was there under the name goes."""
        ...

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Store (count, dim) float32 vectors under (count,) numbers that ascend beyond those stored."""
        ...

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best of each query.

        Args:
            queries: (count, dim) float32.
            k: at least 1.
            exclude: (count, 2) first number and end of what a query must not find, such as its own document.

        Returns:
            scores (count, k) float32, inner products or squared distances, best first, and ids (count, k) int64;
            where fewer are found, -1 and the worst score there is.
        """
        ...

    def count(self) -> int:
        """Vectors stored."""
        ...

    def flush(self) -> None:
        """Make what was added findable by others, also after a restart, and build the index if there is one."""
        ...

    def drop(self) -> None:
        """Delete all of it."""
        ...


def check_metric(metric: str) -> None:
    """Raise ValueError for an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f'`metric` must be "inner_product" or "l2", got {metric!r}.')


def check_search(queries: np.ndarray, dim: int, k: int, exclude: np.ndarray | None) -> None:
    """Raise ValueError for a shape that does not fit."""
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"`queries` must be (count, {dim}), got {queries.shape}.")
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if exclude is not None and exclude.shape != (len(queries), 2):
        raise ValueError(f"`exclude` must be ({len(queries)}, 2), got {exclude.shape}.")


def check_rows(ids: np.ndarray, vectors: np.ndarray, dim: int) -> None:
    """Raise ValueError unless there is one number for each `dim`-wide vector."""
    if vectors.ndim != 2 or vectors.shape[1] != dim or ids.shape != (len(vectors),):
        raise ValueError(f"`ids` and `vectors` must be (count,) and (count, {dim}), got {ids.shape}, {vectors.shape}.")


def empty_answer(count: int, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of a search that found nothing."""
    worst = -np.inf if metric == "inner_product" else np.inf
    return np.full((count, k), worst, np.float32), np.full((count, k), -1, np.int64)


def runs_of(exclude: np.ndarray | None, count: int) -> Iterator[tuple[int, int]]:
    """First row and end of the neighbouring queries that share a range; a filter can serve them in one call."""
    if exclude is None or not count:
        yield 0, count
        return
    changes = (np.flatnonzero((np.diff(exclude, axis=0) != 0).any(1)) + 1).tolist()
    yield from zip([0, *changes], [*changes, count], strict=True)
