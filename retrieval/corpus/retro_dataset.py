"""Training rows with their neighbours, gathered from the maps of a corpus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .corpus import Corpus
from .neighbours import check_database, open_database
from .reused_memory import ReusedMemory
from .sharded_rows import ShardedRows

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
        self._memory = ReusedMemory()

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
        places = np.asarray(indices, dtype=np.int64)
        if (wrong := (places < -len(self)) | (places >= len(self))).any():
            raise IndexError(f"the data set has {len(self)} rows, got index {places[wrong][0]}.")
        rows = self.corpus.sequences[places]
        return self._legacy_items(rows) if self.legacy else self._items(rows)

    def _items(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        corpus, size = self.corpus, self.corpus.chunk_size
        columns = np.arange(self.sequence_length // size)
        inside = columns < rows[:, 1:]  # (batch, chunks)
        chunks = np.where(inside, rows[:, :1] + columns, 0)
        own = corpus.document_of(chunks)
        ends = chunks + 1 == corpus.documents[own + 1]
        begins = inside & ((chunks == corpus.documents[own]) | (columns == 0))
        since = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)  # chunks since the piece began
        tokens, retrieved = self._lent((3, *chunks.shape, size), chunks.shape)
        ids, labels, positions = tokens.numpy()
        _put(ids, corpus.tokens, rows, corpus.pad_token_id)
        labels[:] = ids
        lengths = np.where(inside, np.where(ends, corpus.last_lengths[own], size), 0)
        short = lengths < size  # few are, so labels are not compared one by one
        labels[short] = np.where(np.arange(size) < lengths[short][:, None], labels[short], NO_LOSS)
        labels[begins, 0] = NO_LOSS
        np.add(since[:, :, None] * size, np.arange(size), out=positions)
        self._put_retrieved(retrieved.numpy(), rows, inside & ~ends & (columns + 1 < rows[:, 1:]))
        pieces, starts = begins.nonzero()
        counts = np.bincount(pieces, minlength=len(rows)).tolist()
        parts = [part.unbind() for part in (*tokens.view(3, len(rows), -1), retrieved)]
        parts.append(torch.from_numpy(starts * size).split_with_sizes(counts))
        names = ("input_ids", "labels", "position_ids", "retrieved", "document_offsets")
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]

    def _legacy_items(self, rows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        corpus, size = self.corpus, self.corpus.chunk_size
        columns = np.arange(self.sequence_length // size)
        tokens, retrieved = self._lent((len(rows), len(columns) + 1, size), (len(rows), len(columns)))
        ids = tokens.numpy()
        _put(ids, corpus.tokens, rows, corpus.pad_token_id)
        after = rows.sum(1)  # the chunk after the row; its first token belongs to the row if the document goes on
        goes_on = after < corpus.documents[corpus.document_of(after - 1) + 1]
        ids[goes_on, rows[goes_on, 1], 0] = corpus.tokens.take(after[goes_on])[:, 0]
        self._put_retrieved(retrieved.numpy(), rows, columns < rows[:, 1:])
        return list(zip(tokens.view(len(rows), -1)[:, : self.sequence_length + 1], retrieved, strict=True))

    def _lent(self, tokens: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Memory for ids of the shape `tokens`, and for what is retrieved, (*chunks, neighbours, neighbour_length)."""
        retrieved = (*chunks, self.num_neighbours, self.neighbour_length)
        lent = self._memory.lend(math.prod(tokens) + math.prod(retrieved))
        first, second = lent.split_with_sizes([math.prod(tokens), math.prod(retrieved)])
        return first.view(tokens), second.view(retrieved)

    def _put_retrieved(self, out: np.ndarray, rows: np.ndarray, read: np.ndarray) -> None:
        """Write to `out` (batch, chunks, neighbours, neighbour_length); all padding for chunks that are not `read`."""
        found = np.empty((*read.shape, self.num_neighbours), dtype=np.int64)
        _put(found, self.corpus.neighbours, rows, -1)
        found[~read] = -1
        self.database.passages(found.reshape(-1), self.neighbour_length, out.reshape(-1, self.neighbour_length))


def _put(out: np.ndarray, source: ShardedRows, rows: np.ndarray, missing: int) -> None:
    """Copy what belongs to the chunks of each row, cut to the last axis of `out`; `missing` behind a row's last chunk.

    Args:
        out: (batch, chunks, width), written to.
        source: (num_chunks, at least width).
        rows: (batch, 2), first chunk and number of chunks.
    """
    for place, (start, count) in zip(out, rows.tolist(), strict=True):
        place[:count] = source.between(start, start + count)[:, : out.shape[-1]]
        place[count:] = missing
