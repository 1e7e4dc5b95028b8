"""faiss, where it is installed: which index a kind means, how it is trained, and search that leaves out id ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MINIMUM_POINTS = 39
"""Per centroid, below which k-means does not find what is there."""
TRAINING_POINTS = 64
CODES = 256
"""Centroids of each byte of a product quantizer, which needs as many vectors."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "flat": {},
    "ivf_flat": {"nlist": None, "nprobe": 16},
    "ivf_sq8": {"nlist": None, "nprobe": 16},
    "ivf_pq": {"nlist": None, "nprobe": 16, "code_size": 64},
    "opq_ivf_pq": {"nlist": None, "nprobe": 16, "code_size": 64},
    "hnsw": {"neighbours": 32, "ef_construction": 200, "ef_search": 128},
    "scalar": {},
}
"""Each kind with its parameters; nlist None is chosen from the number of training vectors."""


def import_faiss() -> Any:
    """The module, or an ImportError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this kind of index needs faiss: pip install graft-transformers[faiss]") from error
    return faiss


def choose_nlist(count: int) -> int:
    """Inverted lists for `count` vectors: about 4 sqrt(count), at least 39 vectors for each.

    Raises:
        ValueError: `count` is too small for a single list.
    """
    if count < MINIMUM_POINTS:
        raise ValueError(f"an inverted-list index needs at least {MINIMUM_POINTS} vectors, got {count}; use exact.")
    return max(1, min(int(4 * math.sqrt(count)), count // MINIMUM_POINTS))


def factory_string(kind: str, dim: int, count: int, parameters: Mapping[str, Any]) -> str:
    """What faiss calls the index, for `count` vectors.

    Raises:
        ValueError: too many lists or codes for so few vectors, or a code size that does not fit.
    """
    if kind in ("flat", "scalar", "hnsw"):
        return {"flat": "Flat", "scalar": "SQ8", "hnsw": f"HNSW{parameters.get('neighbours', 32)}"}[kind]
    nlist = parameters["nlist"] or choose_nlist(count)
    if count < MINIMUM_POINTS * nlist:
        raise ValueError(
            f"`nlist` {nlist} needs at least {MINIMUM_POINTS * nlist} training vectors, {MINIMUM_POINTS} for each "
            f"list, got {count}."
        )
    if kind in ("ivf_flat", "ivf_sq8"):
        return f"IVF{nlist},{'Flat' if kind == 'ivf_flat' else 'SQ8'}"
    size = parameters["code_size"]
    if kind == "ivf_pq" and dim % size:
        raise ValueError(f"`code_size` must divide the dimension {dim}, got {size}.")
    if count < CODES:
        raise ValueError(f"codes of {size} bytes need at least {CODES} training vectors, got {count}.")
    if kind == "opq_ivf_pq":
        coarse = f"IVF{nlist}_HNSW32" if nlist >= 256 else f"IVF{nlist}"
        return f"OPQ{size}_{4 * size},{coarse},PQ{size}"
    return f"IVF{nlist},PQ{size}"


def new_index(factory: str, dim: int, metric: str) -> Any:
    """An empty index; ValueError if faiss does not know the string or it does not fit the dimension."""
    faiss = import_faiss()
    try:
        return faiss.index_factory(dim, factory, _metric(metric))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"faiss refuses the index {factory!r} for dimension {dim}: {error}") from error


def read_index(path: Path, mapped: bool) -> Any:
    """The index in a file; with `mapped` its inverted lists stay there, read-only."""
    faiss = import_faiss()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)


def search_index(
    index: Any, queries: np.ndarray, k: int, exclude: np.ndarray | None, options: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """faiss's search with a range of ids left out for each query; queries with the same range are asked together.

    Args:
        index: any.
        queries: (count, dim) float32.
        k: results per query.
        exclude: (count, 2) first id and end, or None.
        options: nprobe, ef_search.

    Returns:
        scores and ids, (count, k); id -1 where too few were found.
    """
    faiss = import_faiss()
    scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start, end in _runs(exclude, len(queries)):
        selector = None
        if exclude is not None and exclude[start, 0] < exclude[start, 1]:
            first, last = map(int, exclude[start])
            selector = faiss.IDSelectorNot(faiss.IDSelectorRange(first, last))
        parameters = _search_parameters(index, selector, options)
        scores[start:end], ids[start:end] = index.search(queries[start:end], k, params=parameters)
    return scores, ids


def _runs(exclude: np.ndarray | None, count: int) -> Iterator[tuple[int, int]]:
    """Rows start ... end - 1 that share a range."""
    if exclude is None:
        yield 0, count
        return
    changes = (np.flatnonzero((np.diff(exclude, axis=0) != 0).any(1)) + 1).tolist()
    yield from zip([0, *changes], [*changes, count], strict=True)


def _search_parameters(index: Any, selector: Any, options: Mapping[str, int]) -> Any:
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(index.index, selector, options)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        kind = faiss.IVFPQSearchParameters if isinstance(index, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(sel=selector, nprobe=options.get("nprobe", 1))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=options.get("ef_search", 16))
    return faiss.SearchParameters(sel=selector)


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """Let faiss train with one thread, so that the same vectors give the same index, bit for bit."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _metric(metric: str) -> int:
    faiss = import_faiss()
    return int(faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2)
