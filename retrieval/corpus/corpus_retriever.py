"""Neighbours of chunks that are not in the corpus: what generation asks, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..engines.vector_engine import VectorEngine
from .corpus import Corpus
from .embedder import ChunkEmbedder, EmbedderSettings
from .embedding import embed_chunks
from .indexing import RESCORED, indexed_neighbours, open_index
from .neighbour_search import exact_distances, exact_neighbours

Propose = Callable[[np.ndarray, int], np.ndarray]
"""Queries and a count to candidates (queries, count), -1 where there are fewer."""


class CorpusRetriever:
    """A callable from chunks (rows, m) to what their neighbours say, (rows, n, r): RETRO's retriever.

    Args:
        corpus: embedded. Its ids are the model's.
        embedder: the one that embedded the corpus; loaded from where the corpus says it was, by default.
        num_neighbours: n.
        neighbour_length: r tokens of a neighbour; by default two chunks, the neighbour and its continuation.
        exclude_documents: numbers or names of documents never to be found, such as the one being continued.
        workers: threads of a search.
        index: what proposes neighbours: "exact" measures every chunk; "stored" asks the index of `build_index`; an
            engine asks where `send_embeddings` put the vectors. What they propose is measured again exactly.

    Raises:
        ValueError: `embedder` is not the corpus's, or a number or `index` is out of range.
        CorpusError: there is no stored index.
        KeyError: a document to exclude does not exist.
    """

    def __init__(
        self,
        corpus: Corpus,
        embedder: ChunkEmbedder | None = None,
        num_neighbours: int = 2,
        neighbour_length: int | None = None,
        exclude_documents: Iterable[int | str] = (),
        workers: int = 1,
        index: Literal["exact", "stored"] | VectorEngine = "exact",
    ) -> None:
        corpus.manifest.require("embed")
        for name, value in (("num_neighbours", num_neighbours), ("neighbour_length", neighbour_length)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.corpus = corpus
        self.embedder = embedder if embedder is not None else embedder_of(corpus)
        _require_same(corpus, self.embedder)
        self.num_neighbours = num_neighbours
        self.neighbour_length = neighbour_length if neighbour_length is not None else 2 * corpus.chunk_size
        self.workers = workers
        self._propose, self._index_name = _proposals(corpus, index)
        self._allowed = np.ones(len(corpus), dtype=bool)
        for document in exclude_documents:
            self._allowed[slice(*corpus.document_range(document))] = False

    def __repr__(self) -> str:
        left_out = len(self.corpus) - int(self._allowed.sum())
        counts = f"{self.num_neighbours} neighbours, {left_out} chunks excluded"
        return f"CorpusRetriever({self.corpus}, {self._index_name}, {counts})"

    def __call__(self, chunks: Tensor) -> Tensor:
        """What the neighbours of each chunk say.

        Args:
            chunks: (rows, chunk_size) ids, padding at the end allowed.

        Returns:
            (rows, num_neighbours, neighbour_length) int64 on the device of `chunks`; all padding where none is left.
        """
        ids, _ = self.search(chunks)
        passages = self.corpus.passages(ids.reshape(-1), self.neighbour_length)
        found = torch.from_numpy(passages).view(*ids.shape, self.neighbour_length)
        return found.to(chunks.device)

    def search(self, chunks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the nearest chunks (rows, num_neighbours) int64, -1 where none is left, and squared distances."""
        if chunks.ndim != 2 or chunks.shape[1] != self.corpus.chunk_size:
            expected = f"(rows, {self.corpus.chunk_size})"
            raise ValueError(f"`chunks` must be {expected}, the corpus's chunk_size, got {tuple(chunks.shape)}.")
        if not len(chunks):
            empty = (0, self.num_neighbours)
            return np.empty(empty, dtype=np.int64), np.empty(empty)
        queries = embed_chunks(self.corpus, chunks.cpu().numpy().astype(np.int64), self.embedder, self.workers)
        if self._propose is not None:
            return self._proposed(queries, self._propose)
        allowed, workers = self._allowed, self.workers
        return exact_neighbours(queries, self.corpus.embeddings, self.num_neighbours, allowed=allowed, workers=workers)

    def _proposed(self, queries: np.ndarray, propose: Propose) -> tuple[np.ndarray, np.ndarray]:
        """The best of what the index proposes; rows that come short are asked again for twice as many."""
        k, wanted = self.num_neighbours, RESCORED * self.num_neighbours
        ids, gaps = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf)
        pending = np.flatnonzero(queries.any(1))
        while len(pending):
            wanted = min(wanted, len(self.corpus))
            found = propose(queries[pending], wanted)
            found = np.where((found >= 0) & self._allowed[found], found, -1)
            distances = exact_distances(queries[pending], self.corpus.embeddings, found)
            order = np.lexsort((np.where(found < 0, len(self.corpus), found), distances))[:, :k]
            width = order.shape[1]
            ids[pending, :width] = np.take_along_axis(found, order, 1)
            gaps[pending, :width] = np.take_along_axis(distances, order, 1)
            if wanted == len(self.corpus):
                break
            pending, wanted = pending[ids[pending, -1] < 0], 2 * wanted
        return ids, gaps


def _proposals(corpus: Corpus, index: Literal["exact", "stored"] | VectorEngine) -> tuple[Propose | None, str]:
    """What proposes candidates, None for all of them; and what it is called."""
    if index == "exact":
        return None, "exact"
    if index == "stored":
        store = open_index(corpus)
        return lambda queries, count: indexed_neighbours(queries, corpus, store, count, None)[0], str(store)
    if isinstance(index, str):
        raise ValueError(f'`index` must be "exact", "stored" or an engine, got {index!r}.')
    engine = index
    if (there := engine.count()) > len(corpus):
        raise ValueError(f"`index` {engine} holds {there} vectors, {corpus.folder} has {len(corpus)} chunks.")
    return lambda queries, count: engine.search(queries.astype(np.float32), count)[1], repr(engine)


def embedder_of(corpus: Corpus, device: str | torch.device | None = None) -> ChunkEmbedder:
    """The embedder that a corpus was embedded with, loaded from where it was then.

    Raises:
        OSError: it is no longer there.
        ValueError: what is there now is another.
    """
    corpus.manifest.require("embed")
    recorded = corpus.manifest.stages["embed"]["settings"]
    settings = EmbedderSettings(recorded["pooling"], recorded["normalize"], recorded["add_sep"])
    dtype = getattr(torch, recorded["dtype"])
    embedder = ChunkEmbedder(recorded["embedder"]["name"], settings=settings, device=device, dtype=dtype)
    _require_same(corpus, embedder)
    return embedder


def _require_same(corpus: Corpus, embedder: ChunkEmbedder) -> None:
    """The same weights, tokenizer and pooling; the dtype may differ, a GPU likes another."""
    recorded, given = corpus.manifest.stages["embed"]["settings"], embedder.identity()
    for name in ("pooling", "normalize", "add_sep"):
        if recorded[name] != given[name]:
            raise ValueError(
                f"`{name}` of `embedder` is {given[name]!r}, {corpus.folder} was made with {recorded[name]!r}."
            )
    ours, theirs = given["embedder"], recorded["embedder"]
    same_weights = ours["sha256"] == theirs["sha256"] or given["dtype"] != recorded["dtype"]
    if not same_weights or ours["tokenizer"] != theirs["tokenizer"]:
        raise ValueError(f"`embedder` is {ours}, but {corpus.folder} was embedded with {theirs}.")
