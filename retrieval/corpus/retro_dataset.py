"""Training rows with their neighbours, gathered from the maps of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
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

    def check_model(self, chunk_size: int, vocab_size: int) -> None:
        """Refuse a model that cannot read these rows.

        Args:
            chunk_size, vocab_size: the model's.

        Raises:
            ValueError: its chunks have another size, or the corpus or its database holds ids that it does not know.
        """
        if chunk_size != self.corpus.chunk_size:
            raise ValueError(
                f"`chunk_size` of the model is {chunk_size}, {self.corpus.folder} is cut into chunks of "
                f"{self.corpus.chunk_size} tokens; they must be equal."
            )
        for corpus in (self.corpus, self.database):
            if vocab_size < corpus.vocab_size:
                raise ValueError(
                    f"`vocab_size` of the model is {vocab_size}, the tokenizer of {corpus.folder} has ids up to "
                    f"{corpus.vocab_size - 1}; it must be at least {corpus.vocab_size}."
                )

    def __getitem__(self, index: int) -> Any:
        """A row of t tokens, t / m = chunks.

        Returns:
            int64 tensors input_ids (t,), labels (t,), position_ids (t,), document_offsets (pieces,) and retrieved
            (chunks, neighbours, neighbour_length).
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows of a batch, gathered together; a DataLoader asks for them so."""
        if wrong := [index for index in indices if not -len(self) <= index < len(self)]:
            raise IndexError(f"the data set has {len(self)} rows, got index {wrong[0]}.")
        rows = self.corpus.sequences[np.asarray(indices, dtype=np.int64)]
        return self._legacy_items(rows) if self.legacy else self._items(rows)

    def _items(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        corpus, size = self.corpus, self.corpus.chunk_size
        columns = np.arange(self.sequence_length // size)
        inside = columns < rows[:, 1:]  # (batch, chunks)
        chunks = np.where(inside, rows[:, :1] + columns, 0)
        own = corpus.document_of(chunks)
        ends = chunks + 1 == corpus.documents[own + 1]
        begins = inside & ((chunks == corpus.documents[own]) | (columns == 0))
        ids = self._tokens(chunks, inside)
        lengths = np.where(inside, np.where(ends, corpus.last_lengths[own], size), 0)
        labels, short = ids.copy(), lengths < size  # few are, so the whole is copied, not compared
        labels[short] = np.where(np.arange(size) < lengths[short][:, None], labels[short], NO_LOSS)
        labels[begins, 0] = NO_LOSS
        since = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)  # chunks since the piece began
        arrays = {
            "input_ids": ids.reshape(len(rows), -1),
            "labels": labels.reshape(len(rows), -1),
            "position_ids": (since[:, :, None] * size + np.arange(size)).reshape(len(rows), -1),
            "retrieved": self._retrieved(chunks, inside & ~ends & (columns + 1 < rows[:, 1:])),
        }
        names = [*arrays, "document_offsets"]
        columns_of = [torch.from_numpy(array).unbind() for array in arrays.values()]
        offsets = [torch.from_numpy(np.flatnonzero(row) * size) for row in begins]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns_of, offsets, strict=True)]

    def _tokens(self, chunks: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """(batch, chunks, chunk_size) int64, padding where a row has no chunk."""
        ids = self.corpus.tokens.take(chunks.reshape(-1))
        ids[~inside.reshape(-1)] = self.corpus.pad_token_id
        return ids.astype(np.int64).reshape(*chunks.shape, -1)

    def _retrieved(self, chunks: np.ndarray, read: np.ndarray) -> np.ndarray:
        """(batch, chunks, neighbours, neighbour_length) int64, all padding for chunks that are not `read`."""
        shape = (*chunks.shape, self.num_neighbours, self.neighbour_length)
        found = np.full(shape[:-1], -1, dtype=np.int64)
        found[read] = self.corpus.neighbours.take(chunks[read])[:, : self.num_neighbours]
        return self.database.passages(found.reshape(-1), self.neighbour_length).reshape(shape)

    def _legacy_items(self, rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        columns = np.arange(self.sequence_length // self.corpus.chunk_size)
        inside = columns < rows[:, 1:]
        retrieved = torch.from_numpy(self._retrieved(np.where(inside, rows[:, :1] + columns, 0), inside))
        ids = [torch.from_numpy(self._legacy_ids(int(start), int(count))) for start, count in rows]
        return list(zip(ids, retrieved, strict=True))

    def _legacy_ids(self, start: int, count: int) -> np.ndarray:
        """(t + 1,) ids: the row and the first token after it, if that is of the same document."""
        corpus = self.corpus
        ids = np.full(self.sequence_length + 1, corpus.pad_token_id, dtype=np.int64)
        ids[: count * corpus.chunk_size] = corpus.tokens.between(start, start + count).reshape(-1)
        end = start + count
        if end < corpus.documents[corpus.document_of(np.asarray([end - 1]))[0] + 1]:
            ids[count * corpus.chunk_size] = corpus.tokens.between(end, end + 1)[0, 0]
        return ids
