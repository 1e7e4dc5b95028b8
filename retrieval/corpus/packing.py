"""Stage pack: which chunks stand together in a training row."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np

from .corpus import Corpus
from .corpus_lock import corpus_lock
from .manifest import Manifest

logger = logging.getLogger(__name__)

Pack = Literal["multi", "document"]


def packed_rows(documents: np.ndarray, chunks_per_row: int, pack: Pack = "multi") -> np.ndarray:
    """First chunk and number of chunks of each row; the rows hold every chunk once, in order.

    "multi" lets documents share a row: since each begins with a chunk of its own, a row is any run of chunks, and what
    does not fit goes on in the next. "document" begins a new row with each document, the rest of its last is padding.

    Args:
        documents: (count + 1,) the first chunk of each document, and the number of chunks.
        chunks_per_row: at least 1.
        pack: see above.

    Returns:
        (rows, 2) int64.
    """
    if pack not in ("multi", "document"):
        raise ValueError(f'`pack` must be "multi" or "document", got {pack!r}.')
    end = int(documents[-1])
    if pack == "multi":
        starts = np.arange(0, end, chunks_per_row)
        return np.stack([starts, np.minimum(chunks_per_row, end - starts)], 1).astype(np.int64)
    lengths = np.diff(documents)
    rows = -(-lengths // chunks_per_row)  # of each document
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    starts = np.repeat(documents[:-1], rows) + within * chunks_per_row
    left = np.repeat(documents[1:], rows) - starts
    return np.stack([starts, np.minimum(chunks_per_row, left)], 1).astype(np.int64)


def pack_sequences(folder: str | Path, sequence_length: int, pack: Pack = "multi") -> Corpus:
    """Store which chunks make up each row of `sequence_length` tokens; other settings replace the rows there were.

    Raises:
        ValueError: `sequence_length` is no multiple of the chunk size, or `pack` is unknown.
    """
    with corpus_lock(folder):
        corpus = Corpus(folder)
        rows = packed_rows(corpus.documents, chunks_per_row(sequence_length, corpus.chunk_size), pack)
        manifest = Manifest.read(folder)
        settings = {"sequence_length": sequence_length, "pack": pack}
        manifest.remove_leftovers()
        if manifest.is_complete("pack") and manifest.stages["pack"]["settings"] == settings:
            logger.info("%s: stage pack is complete already", folder)
            return corpus
        manifest.drop("pack")
        manifest.stages["pack"] = {"status": "running", "settings": settings}
        manifest.write()
        manifest.store("pack", "sequences.npy", rows)
        manifest.stages["pack"]["status"] = "complete"
        manifest.write()
    real = corpus.manifest.counts["tokens"] / (len(rows) * sequence_length)
    logger.info("%s: %d rows of %d tokens, %.1f %% of them real", folder, len(rows), sequence_length, 100 * real)
    return Corpus(folder)


def chunks_per_row(sequence_length: int, chunk_size: int) -> int:
    """How many chunks a row holds; ValueError unless that is a whole number, at least 1."""
    if sequence_length < chunk_size or sequence_length % chunk_size:
        raise ValueError(
            f"`sequence_length` must be a multiple of the corpus's chunk_size {chunk_size}, got {sequence_length}."
        )
    return sequence_length // chunk_size
