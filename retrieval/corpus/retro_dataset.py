"""Training rows with their neighbours, gathered from the maps of a corpus."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .corpus import Corpus
from .neighbours import check_database, open_database

NO_LOSS = -100


class RetroDataset(Dataset[Any]):
    """Rows of a packed corpus; each chunk comes with what its neighbours say.

    A row is a run of chunks. Where a document starts in it, positions restart at 0 and nothing is to be predicted from
    the document before; padding goes on counting and has no label. Neighbours nobody reads are all padding: those of a
    document's last chunk, and of the row's last, whose only reader predicts beyond the row.

    Args:
        corpus: packed, with neighbours.
        num_neighbours: per chunk, at most as many as are stored.
        neighbour_length: tokens of a neighbour; by default two chunks, the neighbour and its continuation.
        database: what the neighbours point into; opened from what the corpus recorded by default.
        legacy: items as DIABLOGPT has them: (t + 1,) ids and (chunks, neighbours, neighbour_length), all read.

    Raises:
        ValueError: `num_neighbours` or `neighbour_length` is out of range.
        CorpusError: a stage is not complete, or the database has changed.
    """

    def __init__(
        self,
        corpus: Corpus,
        num_neighbours: int = 2,
        neighbour_length: int | None = None,
        database: Corpus | None = None,
        legacy: bool = False,
    ) -> None:
        corpus.manifest.require("pack")
        stored = corpus.neighbours.shape[1]
        if not 1 <= num_neighbours <= stored:
            raise ValueError(
                f"`num_neighbours` must lie in 1 ... {stored}, which {corpus} stores, got {num_neighbours}."
            )
        if neighbour_length is not None and neighbour_length < 1:
            raise ValueError(f"`neighbour_length` must be at least 1, got {neighbour_length}.")
        if database is not None:
            check_database(corpus, database)
        self.corpus = corpus
        self.database = database if database is not None else open_database(corpus)
        self.num_neighbours = num_neighbours
        self.neighbour_length = neighbour_length if neighbour_length is not None else 2 * corpus.chunk_size
        self.sequence_length: int = corpus.manifest.stages["pack"]["settings"]["sequence_length"]
        self.legacy = legacy

    def __len__(self) -> int:
        return len(self.corpus.sequences)

    def __getitem__(self, index: int) -> Any:
        """A row of t tokens, t / m = chunks.

        Returns:
            int64 tensors input_ids (t,), labels (t,), position_ids (t,), document_offsets (pieces,) and retrieved
            (chunks, neighbours, neighbour_length).
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"the data set has {len(self)} rows, got index {index}.")
        start, count = map(int, self.corpus.sequences[index])
        if self.legacy:
            retrieved = self._retrieved(start, count, np.zeros(count, dtype=bool))
            return torch.from_numpy(self._legacy_ids(start, count)), torch.from_numpy(retrieved)
        ids, real, starts, ends = self._row(start, count)
        labels = np.where(real, ids, NO_LOSS)
        labels[starts * self.corpus.chunk_size] = NO_LOSS
        offsets = starts * self.corpus.chunk_size
        positions = np.arange(self.sequence_length)
        positions -= np.repeat(offsets, np.diff(offsets, append=self.sequence_length))
        retrieved = self._retrieved(start, count, ends)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions, "document_offsets": offsets}
        return {name: torch.from_numpy(array) for name, array in {**arrays, "retrieved": retrieved}.items()}

    def _row(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids and what of them is real, (t,) each; the chunks that begin a piece; which chunks (count,) end one."""
        corpus, size = self.corpus, self.corpus.chunk_size
        ids = np.full(self.sequence_length, corpus.pad_token_id, dtype=np.int64)
        ids[: count * size] = corpus.tokens.between(start, start + count).reshape(-1)
        first, last = corpus.document_of(np.asarray([start, start + count - 1]))
        lengths = np.zeros(self.sequence_length // size, dtype=np.int64)
        lengths[:count] = size
        document_ends = corpus.documents[first + 1 : last + 2] - start  # of the documents in the row
        inside = document_ends <= count
        lengths[document_ends[inside] - 1] = corpus.last_lengths[first : last + 1][inside]
        real = (np.arange(size) < lengths[:, None]).reshape(-1)
        ends = np.zeros(count, dtype=bool)
        ends[document_ends[inside] - 1] = True
        ends[-1] = True
        return ids, real, np.concatenate([[0], document_ends[:-1]]), ends

    def _retrieved(self, start: int, count: int, unread: np.ndarray) -> np.ndarray:
        """(chunks of a whole row, neighbours, neighbour_length) int64."""
        wanted = np.full((self.sequence_length // self.corpus.chunk_size, self.num_neighbours), -1, dtype=np.int64)
        wanted[:count] = self.corpus.neighbours.between(start, start + count)[:, : self.num_neighbours]
        wanted[:count][unread] = -1
        passages = self.database.passages(wanted.reshape(-1), self.neighbour_length)
        return passages.reshape(*wanted.shape, self.neighbour_length)

    def _legacy_ids(self, start: int, count: int) -> np.ndarray:
        """(t + 1,) ids: the row and the first token after it, if that is of the same document."""
        corpus = self.corpus
        ids = np.full(self.sequence_length + 1, corpus.pad_token_id, dtype=np.int64)
        ids[: count * corpus.chunk_size] = corpus.tokens.between(start, start + count).reshape(-1)
        end = start + count
        if end < corpus.documents[corpus.document_of(np.asarray([end - 1]))[0] + 1]:
            ids[count * corpus.chunk_size] = corpus.tokens.between(end, end + 1)[0, 0]
        return ids
