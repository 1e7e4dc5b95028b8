"""Indexes over the keys of a memory, which offer candidates to each query without reading every key.

One store for each document and key head of a layer, or for each document of a memory of hidden states. The stores are
those of graft.retrieval, which a saved folder does not bring along: where it runs, graft is needed for an index.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configuration.configuration_unlimiformer import INDEX_WIDTHS, UnlimiformerConfig
from .keys_rule import keys_per_query

KeyRange = tuple[int, int]
"""First key of a document that may be found, and the end of them."""

CODED = {"ivf_pq": 4, "scalar": 4}
"""Kinds that rank by codes, not by keys: candidates that they offer for each key that is kept."""
DEFAULT_RECALL = 0.95


def datastore_class(kind: str) -> Any:
    """graft's Datastore.

    Raises:
        ImportError: graft is not installed here.
    """
    try:
        from graft.retrieval.datastore import Datastore
    except ImportError as error:
        raise ImportError(
            f"`index` {kind!r} needs graft and faiss where the model runs: pip install graft-transformers[faiss]"
        ) from error
    return Datastore


def new_store(config: UnlimiformerConfig, dim: int) -> Any:
    """An empty store for keys of `dim` dimensions.

    Raises:
        ImportError: faiss is missing.
        ValueError: `index_parameters` has a name that the kind does not know.
    """
    made = datastore_class(config.index)
    try:
        return made(dim, config.index, **(config.index_parameters or {}))
    except ImportError as error:
        raise ImportError(f"`index` {config.index!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"`index_parameters`: {error}") from error


def key_ranges(config: UnlimiformerConfig, window: int, lengths: Sequence[int]) -> list[KeyRange]:
    """Which keys of documents of these lengths may be found."""
    return [(window if config.exclude_window and length > window else 0, length) for length in lengths]


def needs_index(config: UnlimiformerConfig, window: int, longest: int) -> bool:
    """Whether there is anything to search: an index is asked for, and not all keys are kept anyway."""
    kept = keys_per_query(config, window)
    return config.index != "exact" and kept is not None and kept < longest


def check_index(config: UnlimiformerConfig, window: int, lengths: Sequence[int], dim: int) -> None:
    """Refuse, before anything is read, what cannot be built over keys of `dim` dimensions of such documents.

    Raises:
        ImportError: faiss is missing.
        ValueError: a parameter does not fit, or a document is too short for the lists of an inverted file.
    """
    if not needs_index(config, window, max(lengths)):
        return
    for document, (first, end) in enumerate(key_ranges(config, window, lengths)):
        if end - first <= (keys_per_query(config, window) or 0):
            continue
        try:
            new_store(config, dim).check_trainable(end - first)
        except ValueError as error:
            raise ValueError(
                f"`index` {config.index!r} does not fit the {end - first} keys of document {document}: {error}"
            ) from error


def index_bytes(config: UnlimiformerConfig, window: int, lengths: Sequence[int], dim: int) -> int:
    """What the index of one key head of one layer will take over documents of these lengths.

    Raises:
        ImportError, ValueError: as `check_index`.
    """
    check_index(config, window, lengths, dim)
    if not needs_index(config, window, max(lengths)):
        return 0
    counts = [end - first for first, end in key_ranges(config, window, lengths)]
    kept = keys_per_query(config, window) or 0
    return sum(int(new_store(config, dim).estimate(count)) for count in counts if count > kept)


def wanted_recall(config: UnlimiformerConfig) -> float:
    """The share of the exact best keys that an index is widened to find; 0 if its width is given or it has none."""
    width = INDEX_WIDTHS.get(config.index)
    if width is None or width in (config.index_parameters or {}):
        return 0.0
    return DEFAULT_RECALL if config.index_recall is None else config.index_recall


def candidates_per_query(config: UnlimiformerConfig, window: int) -> int:
    """How many keys an index offers to each query."""
    each = CODED.get(config.index, 1) if config.index_refine is None else config.index_refine
    return each * (keys_per_query(config, window) or 0)


class KeyIndex:
    """Stores over the keys of one layer.

    Args:
        stores: of each document one for each key head; empty where every key is offered, since all are kept.
        ranges: the keys of each document that may be found.
    """

    def __init__(self, stores: Sequence[Sequence[Any]], ranges: Sequence[KeyRange]) -> None:
        self.stores = [list(of_document) for of_document in stores]
        self.ranges = list(ranges)

    @classmethod
    def build(cls, keys: Tensor, ranges: Sequence[KeyRange], config: UnlimiformerConfig, kept: int) -> "KeyIndex":
        """Index keys (documents, key heads, source, dim), of which a query keeps `kept`."""
        stores = []
        for of_document, (first, end) in zip(keys.detach(), ranges, strict=True):
            made = [new_store(config, keys.shape[-1]) for _ in of_document] if end - first > kept else []
            for store, of_head in zip(made, of_document, strict=False):
                store.add(of_head[first:end], np.arange(first, end))
            stores.append(made)
        return cls(stores, ranges)

    def widen(self) -> bool:
        """Let every search from now on read twice as much of each store that it does not read whole; False if none."""
        return any([store.widen() for of_document in self.stores for store in of_document])

    def search_as(self, other: "KeyIndex") -> None:
        """Search as much of the stores as another index over the same documents and heads does."""
        for mine, theirs in zip(self.stores, other.stores, strict=True):
            for store, like in zip(mine, theirs, strict=True):
                store.parameters.update(like.search_options)

    @property
    def nbytes(self) -> int:
        """Bytes of what the stores hold."""
        return sum(store.nbytes for of_document in self.stores for store in of_document)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Keys that score best, as far as the index finds them.

        Args:
            queries: (documents, key heads, queries, dim), on any device.
            count: how many for each.

        Returns:
            ids (documents, key heads, queries, count) int64, -1 where fewer were found.
        """
        asked = queries.detach().to("cpu", torch.float32)
        ids = torch.full((*asked.shape[:3], count), -1)
        for document, (stores, (first, end)) in enumerate(zip(self.stores, self.ranges, strict=True)):
            if not stores:
                shown = min(end - first, count)
                ids[document, ..., :shown] = torch.arange(first, first + shown)
            for head, store in enumerate(stores):
                ids[document, head] = store.search(asked[document, head], count)[1]
        return ids.to(queries.device)

    def select(self, first: int, last: int) -> "KeyIndex":
        """The index of documents [first, last)."""
        return KeyIndex(self.stores[first:last], self.ranges[first:last])

    def save(self, folder: Path) -> None:
        """Write each store to a folder of its own."""
        for document, stores in enumerate(self.stores):
            for head, store in enumerate(stores):
                store.save(folder / f"{document}-{head}")

    @classmethod
    def load(
        cls, folder: Path, ranges: Sequence[KeyRange], shape: Sequence[int], config: UnlimiformerConfig, kept: int
    ) -> "KeyIndex":
        """Read what `save` wrote, for keys of `shape`.

        Raises:
            ImportError: faiss is missing.
            ValueError: a store is missing, damaged, or of other keys; names it.
        """
        made = datastore_class(config.index)
        stores: list[list[Any]] = []
        for document, (first, end) in enumerate(ranges):
            stores.append([])
            for head in range(shape[1] if end - first > kept else 0):
                try:
                    store = made.load(folder / f"{document}-{head}")
                except ImportError as error:
                    raise ImportError(f"`index` {config.index!r}: {error}") from error
                except (OSError, ValueError) as error:
                    raise ValueError(f"{folder / f'{document}-{head}'} holds no whole index: {error}") from error
                found, expected = (store.kind, store.dim, len(store)), (config.index, shape[3], end - first)
                if found != expected:
                    raise ValueError(
                        f"{folder / f'{document}-{head}'} is an index of (kind, dimensions, keys) {found}, and the "
                        f"memory needs {expected}."
                    )
                stores[-1].append(store)
        return cls(stores, ranges)
