"""Vectors in a folder of this machine: a `Datastore` on disk, mapped by every process that reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datastore import Datastore
from .vector_engine import Metric, check_metric, check_rows, check_search


class FaissEngine:
    """The default engine: no server, many readers, one writer.

    Args:
        folder: where it lies; written by `flush`, whole or not at all.
        kind: of a `Datastore`: "flat" (every vector), "ivf_sq8", "opq_ivf_pq", "hnsw", ... or "exact" without faiss.
        parameters: of that kind.
    """

    def __init__(self, folder: str | Path, kind: str = "flat", **parameters: Any) -> None:
        self.folder, self.kind, self.parameters = Path(folder), kind, parameters
        self._store: Datastore | None = None
        self._mapped = False

    def __repr__(self) -> str:
        return f"FaissEngine({str(self.folder)!r}, {self._store if self._store is not None else self.kind})"

    @property
    def store(self) -> Datastore:
        """What is stored, mapped from the folder if that was not done yet.

        Raises:
            FileNotFoundError: nothing was created or flushed there.
            ValueError: a file is damaged.
        """
        if self._store is None:
            self._store, self._mapped = Datastore.load(self.folder, mapped=True), True
        return self._store

    def create(self, dim: int, metric: Metric = "l2") -> None:
        """Begin an empty store, in memory until `flush`."""
        check_metric(metric)
        self._store, self._mapped = Datastore(dim, self.kind, metric, **self.parameters), False

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Append; kinds that learn train on the first vectors given, so give them many at once."""
        check_rows(ids, vectors, self.store.dim)
        if self._mapped:  # a map cannot grow
            self._store, self._mapped = Datastore.load(self.folder), False
        self.store.add(torch.from_numpy(np.ascontiguousarray(vectors, np.float32)), ids)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See the protocol; approximate for approximate kinds."""
        check_search(queries, self.store.dim, k, exclude)
        rows = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        scores, ids = self.store.search(rows, k, exclude)
        return scores.numpy(), ids.numpy()

    def count(self) -> int:
        """Vectors stored."""
        return len(self.store)

    def flush(self) -> None:
        """Write the folder in one step."""
        self.store.save(self.folder, replace=True)

    def drop(self) -> None:
        """Delete the folder."""
        self._store = None
        shutil.rmtree(self.folder, ignore_errors=True)
