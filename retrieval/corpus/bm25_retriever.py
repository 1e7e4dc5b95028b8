"""Neighbours by shared words instead of vectors: BM25 over the text of the chunks, behind the same calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus


class BM25Retriever:
    """A callable as `CorpusRetriever` is, which needs no embeddings: the chunks that score best by BM25.

    The index is built from the corpus's text when the retriever is made, in memory.

    Args:
        corpus: tokenized. Its ids are the model's.
        num_neighbours: per chunk.
        neighbour_length: tokens of a neighbour; by default two chunks, the neighbour and its continuation.
        exclude_documents: numbers or names of documents never to be found.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: a number is out of range.
        KeyError: a document to exclude does not exist.
    """

    def __init__(
        self,
        corpus: Corpus,
        num_neighbours: int = 2,
        neighbour_length: int | None = None,
        exclude_documents: Iterable[int | str] = (),
    ) -> None:
        for name, value in (("num_neighbours", num_neighbours), ("neighbour_length", neighbour_length)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._bm25s = _import_bm25s()
        self.corpus, self.num_neighbours = corpus, num_neighbours
        self.neighbour_length = neighbour_length if neighbour_length is not None else 2 * corpus.chunk_size
        self._allowed = np.ones(len(corpus), dtype=np.float32)
        for document in exclude_documents:
            self._allowed[slice(*corpus.document_range(document))] = 0
        self._index = self._bm25s.BM25()
        self._index.index(self._words(corpus.texts(np.arange(len(corpus)))), show_progress=False)

    def __repr__(self) -> str:
        left_out = len(self.corpus) - int(self._allowed.sum())
        return f"BM25Retriever({self.corpus}, {self.num_neighbours} neighbours, {left_out} chunks excluded)"

    def __call__(self, chunks: Tensor) -> Tensor:
        """What the neighbours of (rows, chunk_size) ids say: (rows, num_neighbours, neighbour_length) int64."""
        ids, _ = self.search(chunks)
        passages = self.corpus.passages(ids.reshape(-1), self.neighbour_length)
        return torch.from_numpy(passages).view(*ids.shape, self.neighbour_length).to(chunks.device)

    def search(self, chunks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the best chunks (rows, num_neighbours) int64 and scores; -1 and 0 where no word is shared."""
        ids = np.full((len(chunks), self.num_neighbours), -1, dtype=np.int64)
        scores = np.zeros(ids.shape)
        texts = self.corpus.tokenizer.batch_decode(chunks, skip_special_tokens=True)
        for row, words in enumerate(self._words(texts)):
            if words:
                every = self._index.get_scores(words) * self._allowed
                best = np.lexsort((np.arange(len(every)), -every))[: self.num_neighbours]
                best = best[every[best] > 0]
                ids[row, : len(best)], scores[row, : len(best)] = best, every[best]
        return ids, scores

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        words: Any = self._bm25s.tokenize(list(texts), stopwords=None, return_ids=False, show_progress=False)
        return list(words)


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs bm25s: pip install graft-transformers[bm25]") from error
    return bm25s
