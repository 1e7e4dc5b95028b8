"""Whether a corpus is what its manifest says, and whether what it says can be true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from graft.atomic_files import side_by_side

from .corpus import Corpus
from .embedder import ChunkEmbedder
from .embedding import embed_chunks
from .manifest import CorpusError, Manifest
from .neighbours import open_database

SAMPLE = 100


def verify_corpus(folder: str | Path, fast: bool = False, embedder: ChunkEmbedder | None = None) -> list[str]:
    """Every fault found, one sentence each; an empty list means that the corpus is sound.

    Args:
        folder: of the corpus.
        fast: sizes of files and no more.
        embedder: embed 100 chunks again, spread over the corpus, and compare.

    Raises:
        FileNotFoundError: there is no corpus.
    """
    try:
        manifest = Manifest.read(folder)
    except CorpusError as error:
        return [str(error)]
    found = side_by_side(lambda name: _fault(manifest.check_file, name, not fast), manifest.files)
    faults = [fault for fault in found if fault]
    faults += [fault for stage in manifest.stages if (fault := _fault(manifest.require, stage))]
    if faults or fast:
        return faults
    corpus = Corpus(folder)
    checks: list[Callable[[Corpus], Iterator[str]]] = [_token_faults]
    if manifest.is_complete("neighbours"):
        checks.append(_neighbour_faults)
    faults += [fault for check in checks for fault in check(corpus)]
    if embedder is not None and manifest.is_complete("embed"):
        faults += _embedding_faults(corpus, embedder)
    return faults


def _fault(check: Callable[..., None], *arguments: object) -> str:
    try:
        check(*arguments)
    except CorpusError as error:
        return str(error)
    return ""


def _token_faults(corpus: Corpus) -> Iterator[str]:
    documents, lasts = corpus.documents, corpus.last_lengths
    if documents[0] != 0 or documents[-1] != corpus.num_chunks or (np.diff(documents) < 1).any():
        yield f"documents.npy does not lead from 0 to {corpus.num_chunks} in steps of at least 1."
    if len(lasts) and not 1 <= lasts.min() <= lasts.max() <= corpus.chunk_size:
        yield f"last_lengths.npy holds lengths outside 1 ... {corpus.chunk_size}."
    largest = max(int(block.max()) for _, block in corpus.tokens.blocks(2**16))
    if largest >= corpus.vocab_size:
        yield f"tokens/ holds the id {largest}, the vocabulary has {corpus.vocab_size}."


def _neighbour_faults(corpus: Corpus) -> Iterator[str]:
    database = open_database(corpus)
    for start, end in corpus.shards:
        ids = corpus.neighbours.between(start, end).astype(np.int64)
        distances = corpus.distances.between(start, end)
        where = f"neighbours of chunks {start} ... {end - 1}"
        if ids.min() < -1 or ids.max() >= database.num_chunks:
            yield f"{where}: numbers outside -1 ... {database.num_chunks - 1}."
            continue
        if (distances[:, 1:] < distances[:, :-1]).any():
            yield f"{where}: not in the order of their distances."
        if ((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any():
            yield f"{where}: missing ones stand before found ones."
        own = corpus.document_of(np.arange(start, end))[:, None]
        if database is corpus and ((corpus.document_of(ids.reshape(-1)).reshape(ids.shape) == own) & (ids >= 0)).any():
            yield f"{where}: some lie in the chunk's own document."


def _embedding_faults(corpus: Corpus, embedder: ChunkEmbedder) -> list[str]:
    chunks = np.unique(np.linspace(0, corpus.num_chunks - 1, min(SAMPLE, corpus.num_chunks)).astype(np.int64))
    stored = corpus.embeddings.take(chunks).astype(np.float32)
    again = embed_chunks(corpus, corpus.tokens.take(chunks).astype(np.int64), embedder)
    scale = max(float(np.abs(again).max()), 1e-6)
    wrong = chunks[np.abs(stored - again).max(1) > 4e-3 * scale]
    if not len(wrong):
        return []
    return [
        f"embeddings of {len(wrong)} of {len(chunks)} sampled chunks are not what the embedder gives: {wrong[:5]}."
    ]
