"""Raw int32 files as RETRO-pytorch lays them out: read without touching them, written from a corpus, made into one.

`chunks`: (N, m + 1), a chunk and the first id that follows it; `sequences`: (S,) first chunk of each training row;
`document ids`: (N,); `neighbours`: (N, n), -1 where there is none. The files do not tell their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from graft.atomic_files import new_file, sha256

from .corpus import Corpus
from .document_sources import Document

RAW = np.dtype("<i4")
BLOCK = 2**16


def read_raw(path: str | Path, width: int | None = None) -> np.ndarray:
    """Map a raw file read-only: (rows,), or (rows, width); a last row that is not whole is left out.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds not even one row.
    """
    count = Path(path).stat().st_size // (RAW.itemsize * (width or 1))
    if not count:
        raise ValueError(f"{path} must hold at least one row of {width or 1} int32 numbers.")
    shape = (count,) if width is None else (count, width)
    return np.memmap(path, RAW, "r", shape=shape).view(np.ndarray)


def rows_or_padding(rows: np.ndarray, wanted: np.ndarray, fill: int) -> np.ndarray:
    """Copy rows out as int64; those that the file does not have, and negative ones, are all `fill`."""
    absent = (wanted < 0) | (wanted >= len(rows))
    taken = rows[np.where(absent, 0, wanted)].astype(np.int64)
    taken[absent] = fill
    return taken


@dataclass(frozen=True)
class OriginalPaths:
    """The raw files of a data set.

    Args:
        chunks, neighbours, sequences: see the module.
    """

    chunks: Path
    neighbours: Path
    sequences: Path


class OriginalDataset(Dataset[tuple[Tensor, Tensor]]):
    """Training rows straight from raw files, as RETRO-pytorch reads them, but without growing the files.

    What follows the first `eos_id` of a row is padding, as is a chunk that the files do not have. A neighbour goes on
    with the chunk behind it unless `eos_id` stands in it.

    Args:
        paths: of the files.
        chunk_size: m.
        sequence_length: t, a multiple of m.
        num_neighbours: stored per chunk.
        num_sequences: rows of the data set; by default all that the file has.
        num_chunks: chunks beyond are not continued into; by default all that the file has.
        continues: whether a neighbour comes with its continuation.
        eos_id, pad_id: of the tokenizer that made the files.

    Raises:
        ValueError: a length does not fit, or more rows are asked for than there are.
    """

    def __init__(
        self,
        paths: OriginalPaths,
        chunk_size: int,
        sequence_length: int,
        num_neighbours: int = 2,
        num_sequences: int | None = None,
        num_chunks: int | None = None,
        continues: bool = True,
        eos_id: int = 102,
        pad_id: int = 0,
    ) -> None:
        if chunk_size < 1 or sequence_length < chunk_size or sequence_length % chunk_size:
            raise ValueError(f"`seq_len` must be a multiple of `chunk_size` {chunk_size}, got {sequence_length}.")
        self.chunks = read_raw(paths.chunks, chunk_size + 1)
        self.neighbours = read_raw(paths.neighbours, num_neighbours)
        self.sequences = read_raw(paths.sequences)
        self.num_sequences = len(self.sequences) if num_sequences is None else num_sequences
        if self.num_sequences > len(self.sequences):
            raise ValueError(
                f"`num_sequences` must be at most {len(self.sequences)}, which {paths.sequences} holds, got "
                f"{self.num_sequences}."
            )
        self.num_chunks = min(len(self.chunks), num_chunks or len(self.chunks))
        self.per_row = sequence_length // chunk_size
        self.continues, self.eos_id, self.pad_id = continues, eos_id, pad_id

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(t + 1,) ids and (t / m, neighbours, m or 2 m) ids, int64."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the data set has {len(self)} rows, got index {index}.")
        wanted = int(self.sequences[index]) + np.arange(self.per_row)
        own = rows_or_padding(self.chunks, wanted, self.pad_id)
        ids = np.append(own[:, :-1].reshape(-1), own[-1, -1])
        ended = np.cumsum(ids == self.eos_id)
        ids[np.append(False, ended[:-1] > 0)] = self.pad_id
        return torch.from_numpy(ids), torch.from_numpy(self._passages(rows_or_padding(self.neighbours, wanted, -1)))

    def _passages(self, found: np.ndarray) -> np.ndarray:
        texts = rows_or_padding(self.chunks, found, self.pad_id)[..., :-1]
        if not self.continues:
            return texts
        ends = (texts == self.eos_id).any(-1) | (found < 0) | (found + 1 >= self.num_chunks)
        after = rows_or_padding(self.chunks, np.where(ends, -1, found + 1), self.pad_id)[..., :-1]
        return np.concatenate([texts, after], -1)


class OriginalChunks:
    """A source of documents that are tokens already: the chunks of a raw file, so that a corpus can be made of them.

    Args:
        path: of the chunks.
        chunk_size: m.
        num_chunks: read at most so many.
        document_ids: raw file that tells documents apart; without it a chunk with `eos_id` ends one.
        eos_id, pad_id: of the tokenizer that made the file.
    """

    def __init__(
        self,
        path: str | Path,
        chunk_size: int,
        num_chunks: int | None = None,
        document_ids: str | Path | None = None,
        eos_id: int = 102,
        pad_id: int = 0,
    ) -> None:
        self.path, self.pad_id = Path(path), pad_id
        self.rows = read_raw(path, chunk_size + 1)[:num_chunks, :-1]
        if document_ids is not None:
            ids = read_raw(document_ids)[: len(self.rows)]
            firsts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        else:
            ends = (self.rows == eos_id).any(1)
            firsts = np.flatnonzero(np.append(True, ends[:-1]))
        self.documents_at = np.append(firsts, len(self.rows))

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on, by their ids; each keeps as many chunks as it has in the file."""
        for number in range(start, len(self.documents_at) - 1):
            rows = self.rows[self.documents_at[number] : self.documents_at[number + 1]]
            ids = rows.reshape(-1).astype(np.int64)
            real = np.flatnonzero(ids != self.pad_id)
            least = len(ids) - rows.shape[1] + 1
            yield Document(f"document:{number}", None, ids[: max(least, real[-1] + 1 if len(real) else 0)])

    def fingerprint(self) -> dict[str, Any]:
        """Kind, number of chunks and documents, and the hash of the file."""
        counts = {"count": len(self.documents_at) - 1, "chunks": len(self.rows)}
        return {"kind": "chunks", **counts, "sha256": sha256(self.path)}

    def num_bytes(self) -> int:
        """Of the ids as they lie there."""
        return self.rows.nbytes


def holds_chunks(corpus: Corpus, path: str | Path, num_chunks: int | None = None) -> bool:
    """Whether a corpus's chunks are those of a raw file."""
    rows = read_raw(path, corpus.chunk_size + 1)[:num_chunks, :-1]
    if len(rows) != len(corpus):
        return False
    return all((rows[at : at + len(block)] == block).all() for at, block in corpus.tokens.blocks(BLOCK))


def write_chunks(corpus: Corpus, path: str | Path) -> None:
    """(N, m + 1) int32: each chunk and the id that follows it in its document, padding at the document's end."""
    last_of_document = np.zeros(len(corpus), dtype=bool)
    last_of_document[corpus.documents[1:] - 1] = True

    def blocks() -> Iterator[np.ndarray]:
        for start, end in corpus.shards:
            ids = corpus.tokens.between(start, min(end + 1, len(corpus))).astype(RAW)
            after = np.full((end - start, 1), corpus.pad_token_id, RAW)
            after[: len(ids) - 1] = ids[1:, :1]
            after[last_of_document[start:end]] = corpus.pad_token_id
            yield np.concatenate([ids[: end - start], after], 1)

    _write(path, blocks())


def write_document_ids(corpus: Corpus, path: str | Path) -> None:
    """(N,) int32: the number of each chunk's document."""
    _write(path, (corpus.document_of(np.arange(start, end)) for start, end in corpus.shards))


def write_sequences(rows: np.ndarray, path: str | Path) -> None:
    """(S,) int32: the first chunk of each training row, (S, 2) as a corpus stores them."""
    _write(path, [rows[:, 0]])


def write_neighbours(corpus: Corpus, path: str | Path, num_neighbours: int) -> None:
    """(N, num_neighbours) int32, -1 where there is none."""
    _write(path, (corpus.neighbours.between(start, end)[:, :num_neighbours] for start, end in corpus.shards))


def _write(path: str | Path, blocks: Iterator[np.ndarray] | Sequence[np.ndarray]) -> None:
    with new_file(path) as temporary, temporary.open("wb") as file:
        for block in blocks:
            np.ascontiguousarray(block, RAW).tofile(file)
