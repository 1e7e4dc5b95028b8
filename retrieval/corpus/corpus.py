"""A corpus opened for reading: its chunks, documents, embeddings and neighbours, mapped from the files of its folder.

Opening reads the manifest and the size of every file, and maps what is asked for; nothing is written, so the folder
may be read-only. Sent to another process, a corpus travels as the name of its folder and is opened there again.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .joined_maps import joined_maps
from .manifest import CorpusError, Manifest
from .sharded_rows import ShardedRows

SMALL_FILES = ("documents.npy", "last_lengths.npy", "document_names.arrow", "sequences.npy")
"""Checked byte for byte whenever a corpus is opened; `verify=True` checks all."""


class Corpus:
    """Chunks of `chunk_size` ids, numbered from 0 through all documents; a document begins with a chunk of its own.

    Args:
        folder: what `tokenize_corpus` made.
        verify: compare the SHA-256 of every file, which reads them all; otherwise of the small ones, and all sizes.

    Raises:
        FileNotFoundError: there is no corpus.
        CorpusError: it is damaged, foreign, newer, or its tokens are not complete.
    """

    def __init__(self, folder: str | Path, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(folder)
        self.manifest.require("tokenize")
        for name in self.manifest.files:
            self.manifest.check_file(name, checksum=verify or name in SMALL_FILES)
        settings = self.manifest.corpus
        self.chunk_size: int = settings["chunk_size"]
        self.pad_token_id: int = settings["pad_token_id"]
        self.vocab_size: int = settings["vocab_size"]
        self.num_chunks: int = self.manifest.counts["chunks"]
        self.num_documents: int = self.manifest.counts["documents"]

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.folder,)

    def __len__(self) -> int:
        return self.num_chunks

    def __repr__(self) -> str:
        sizes = f"{self.num_chunks} chunks of {self.chunk_size}, {self.num_documents} documents"
        return f"Corpus({str(self.folder)!r}: {sizes})"

    @cached_property
    def tokens(self) -> ShardedRows:
        """(num_chunks, chunk_size) ids, uint16 or uint32; a document's last chunk ends in padding."""
        dtype = np.dtype(self.manifest.corpus["dtype"]).newbyteorder("<")
        names = self.manifest.files_of("tokenize", ".bin")
        shapes = [tuple(self.manifest.files[name]["shape"]) for name in names]
        return ShardedRows(joined_maps([self.folder / name for name in names], dtype, shapes))

    @cached_property
    def documents(self) -> np.ndarray:
        """(num_documents + 1,) int64: the first chunk of each document, and the number of chunks at the end."""
        return np.load(self.folder / "documents.npy", mmap_mode="r").view(np.ndarray)

    @cached_property
    def last_lengths(self) -> np.ndarray:
        """(num_documents,) uint16: real tokens in the last chunk of each document."""
        return np.load(self.folder / "last_lengths.npy", mmap_mode="r").view(np.ndarray)

    @cached_property
    def document_names(self) -> pa.ChunkedArray:
        """What each document is called: its path below the folder, or its file and row."""
        with pa.memory_map(str(self.folder / "document_names.arrow")) as source:
            return pa.ipc.open_file(source).read_all()["name"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the chunks, from the corpus's own copy."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    @cached_property
    def embeddings(self) -> ShardedRows:
        """(num_chunks, width) float16, one row per chunk; zeros where a chunk has no text for the embedder."""
        self.manifest.require("embed")
        return self._arrays("embed")

    @cached_property
    def neighbours(self) -> ShardedRows:
        """(num_chunks, stored) ids of the nearest chunks, nearest first, -1 where there is none."""
        self.manifest.require("neighbours")
        return self._arrays("neighbours", ".ids.npy")

    @cached_property
    def distances(self) -> ShardedRows:
        """(num_chunks, stored) float16, squared distances of `neighbours`, infinite where there is none."""
        self.manifest.require("neighbours")
        return self._arrays("neighbours", ".distances.npy")

    @cached_property
    def sequences(self) -> np.ndarray:
        """(rows, 2) int64: first chunk and number of chunks of each training row."""
        self.manifest.require("pack")
        return np.load(self.folder / "sequences.npy", mmap_mode="r").view(np.ndarray)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """First chunk and end of each shard, the unit of work of embed and neighbours."""
        names = self.manifest.files_of("tokenize", ".bin")
        ends = list(accumulate(self.manifest.files[name]["shape"][0] for name in names))
        return list(zip([0, *ends], ends, strict=False))

    def document_of(self, chunks: np.ndarray) -> np.ndarray:
        """(count,) chunk numbers to the numbers of their documents."""
        return np.searchsorted(self.documents, chunks, side="right") - 1

    def document_range(self, document: int | str) -> tuple[int, int]:
        """First chunk and end of a document, given by number or by name.

        Raises:
            KeyError: there is no such document, or several have this name.
        """
        if isinstance(document, str):
            found = [index for index, name in enumerate(self.document_names.to_pylist()) if name == document]
            if len(found) != 1:
                raise KeyError(f"{len(found)} documents of {self.folder} are called {document!r}, expected one.")
            document = found[0]
        if not 0 <= document < self.num_documents:
            raise KeyError(f"{self.folder} has documents 0 ... {self.num_documents - 1}, got {document}.")
        return int(self.documents[document]), int(self.documents[document + 1])

    def passages(self, chunks: np.ndarray, length: int, out: np.ndarray | None = None) -> np.ndarray:
        """Chunks and what follows them in their documents.

        Args:
            chunks: (count,) chunk numbers; negative means missing.
            length: tokens of a passage; `2 * chunk_size` is a chunk and its continuation.
            out: (count, length) int64, written to and returned; a new array by default.

        Returns:
            (count, length) int64; all padding for what is missing, and from the document's end on.
        """
        count, pieces = len(chunks), -(-length // self.chunk_size)
        wanted = chunks + np.arange(pieces)[:, None]  # (pieces, count): numpy is slow along axes as short as `pieces`
        missing = wanted >= self.documents[self.document_of(chunks) + 1]
        missing |= chunks < 0
        wanted[missing] = 0
        rows = self.tokens.take(wanted.reshape(-1)).reshape(pieces, count, self.chunk_size)
        rows[missing] = self.pad_token_id  # in the small dtype; widened in one pass
        said = np.empty((count, length), dtype=np.int64) if out is None else out
        for start, piece in zip(range(0, length, self.chunk_size), rows, strict=True):
            said[:, start : start + self.chunk_size] = piece[:, : length - start]
        return said

    def text(self, chunk: int) -> str:
        """What a chunk says, without special tokens."""
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"{self.folder} has chunks 0 ... {self.num_chunks - 1}, got {chunk}.")
        return self.texts(np.asarray([chunk]))[0]

    def texts(self, chunks: np.ndarray) -> list[str]:
        """What each chunk says, without special tokens."""
        return self.tokenizer.batch_decode(self.tokens.take(chunks).astype(np.int64), skip_special_tokens=True)

    def _arrays(self, stage: str, suffix: str = ".npy") -> ShardedRows:
        names = self.manifest.files_of(stage, suffix)
        # Private maps: torch takes no arrays that cannot be written to, and what is written here reaches no file.
        rows = ShardedRows([np.load(self.folder / name, mmap_mode="c").view(np.ndarray) for name in names])
        if len(rows) != self.num_chunks:
            raise CorpusError(f"{self.folder}: stage {stage!r} has {len(rows)} rows for {self.num_chunks} chunks.")
        return rows
