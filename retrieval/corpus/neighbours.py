"""Stage neighbours: the chunks of other documents that lie nearest to each chunk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..datastore import Datastore
from .corpus import Corpus
from .executors import Executor, executor_and_threads
from .indexing import indexed_neighbours, open_index
from .manifest import CorpusError, fingerprint
from .neighbour_search import exact_neighbours
from .overlap import shared_ngrams, without_near_duplicates
from .stage import run_shards

logger = logging.getLogger(__name__)

SPARE_FACTOR = 4
LARGEST_DISTANCE = float(np.finfo(np.float16).max)


def find_neighbours(
    folder: str | Path,
    num_neighbours: int = 4,
    database: Corpus | None = None,
    index: Literal["exact", "stored"] = "exact",
    max_overlap: float | None = None,
    workers: int | Executor | None = None,
    overwrite: bool = False,
) -> Corpus:
    """Store the nearest chunks of each chunk, nearest first; go on where an interrupted run stopped.

    Args:
        folder: of an embedded corpus.
        num_neighbours: to store; some more than training will use let it change or drop some later.
        database: where to look; by default the corpus itself, without the chunk's own document.
        index: "exact" measures every pair; "stored" asks the index that `build_index` made, which is approximate.
        max_overlap: leave out near-duplicates, neighbours that share more than this of their 8-grams with the chunk;
            four times as many are searched, and rows that still come short end with -1.
        workers: threads, by default the cores; or an executor. Neither changes a byte.
        overwrite: search again.

    Raises:
        ValueError: no other document has chunks, or none has so many to find; the embedders of the two corpora differ,
            or settings differ from the recorded ones.
        CorpusError: the corpus is damaged or not embedded.
    """
    if num_neighbours < 1:
        raise ValueError(f"`num_neighbours` must be at least 1, got {num_neighbours}.")
    corpus = Corpus(folder)
    corpus.manifest.require("embed")
    if index not in ("exact", "stored"):
        raise ValueError(f'`index` must be "exact" or "stored", got {index!r}.')
    if max_overlap is not None and not 0 <= max_overlap <= 1:
        raise ValueError(f"`max_overlap` must lie in 0 ... 1, got {max_overlap}.")
    settings: dict[str, Any] = {"num_neighbours": num_neighbours, "index": index, "database": None}
    settings["max_overlap"] = max_overlap
    store = open_index(database or corpus) if index == "stored" else None
    if database is not None:
        embedded = corpus.manifest.stages["embed"]["settings"]
        check_comparable(database, embedded, corpus.manifest.corpus["tokenizer"]["sha256"], corpus.chunk_size)
        settings["database"] = {"name": str(database.folder), **database_identity(database)}
    check_enough(corpus, database, num_neighbours)
    _warn_of_missing(corpus, database, num_neighbours)
    executor, threads = executor_and_threads(workers)
    search = NeighbourSearch(num_neighbours, database, store, max_overlap, threads)
    compute = partial(neighbours_of_shard, search=search)
    return run_shards(folder, "neighbours", settings, compute, num_neighbours * (4 + 2), executor, overwrite)


@dataclass(frozen=True)
class NeighbourSearch:
    """How the neighbours of a shard are found.

    Args:
        k: neighbours per chunk.
        database: where; None is the corpus itself without the chunk's own document.
        store: an index to ask; None measures every pair.
        max_overlap: neighbours that share more of their 8-grams with the chunk are left out; None keeps all.
        workers: threads.
    """

    k: int
    database: Corpus | None = None
    store: Datastore | None = None
    max_overlap: float | None = None
    workers: int = 1


def neighbours_of_shard(corpus: Corpus, start: int, end: int, search: NeighbourSearch) -> dict[str, np.ndarray]:
    """Ids (end - start, k) and distances of chunks start ... end - 1, under the suffixes of their files."""
    queries = corpus.embeddings.between(start, end)
    source = search.database or corpus
    exclude = None
    if search.database is None:
        own = corpus.document_of(np.arange(start, end))
        exclude = np.stack([corpus.documents[own], corpus.documents[own + 1]], 1)
    k = search.k if search.max_overlap is None else SPARE_FACTOR * search.k
    if search.store is None:
        ids, distances = exact_neighbours(queries, source.embeddings, k, exclude, workers=search.workers)
    else:
        ids, distances = indexed_neighbours(queries, source, search.store, k, exclude)
    if search.max_overlap is not None:
        overlaps = _overlaps(corpus.tokens.between(start, end), source, ids)
        ids, distances = without_near_duplicates(ids, distances, overlaps, search.max_overlap)
        ids, distances = ids[:, : search.k], distances[:, : search.k]
    dtype = np.int32 if source.num_chunks < 2**31 else np.int64
    finite = np.isfinite(distances)
    distances[finite] = distances[finite].clip(max=LARGEST_DISTANCE)
    return {".ids.npy": ids.astype(dtype), ".distances.npy": distances.astype(np.float16)}


def _overlaps(chunks: np.ndarray, source: Corpus, ids: np.ndarray) -> np.ndarray:
    """(count, k) shares of the neighbours' 8-grams that are in the chunk."""
    passages = source.passages(ids.reshape(-1), source.chunk_size)
    repeated = np.repeat(chunks.astype(np.int64), ids.shape[1], axis=0)
    return shared_ngrams(repeated, passages, source.pad_token_id).reshape(ids.shape)


def database_identity(database: Corpus) -> dict[str, str]:
    """What tells one retrieval corpus from another: a hash over the hashes of its tokens and embeddings."""
    files = database.manifest.files
    hashes = {name: file["sha256"] for name, file in files.items() if file["stage"] in ("tokenize", "embed")}
    return {"sha256": fingerprint(hashes)}


def open_database(corpus: Corpus) -> Corpus:
    """The corpus that a corpus's neighbours point into: itself, or the one recorded.

    Raises:
        CorpusError: the recorded one is gone, or is not what it was.
    """
    corpus.manifest.require("neighbours")
    recorded = corpus.manifest.stages["neighbours"]["settings"]["database"]
    if recorded is None:
        return corpus
    try:
        database = Corpus(recorded["name"])
    except FileNotFoundError as error:
        raise CorpusError(f"the neighbours of {corpus.folder} lie in {recorded['name']}, which is gone.") from error
    check_database(corpus, database)
    return database


def check_database(corpus: Corpus, database: Corpus) -> None:
    """Raise CorpusError unless `database` is what the neighbours of `corpus` point into."""
    recorded = corpus.manifest.stages["neighbours"]["settings"]["database"]
    if recorded is None:
        if database.folder.resolve() != corpus.folder.resolve():
            raise CorpusError(f"the neighbours of {corpus.folder} lie in itself, not in {database.folder}.")
    elif database_identity(database)["sha256"] != recorded["sha256"]:
        raise CorpusError(
            f"{database.folder} has changed since the neighbours of {corpus.folder} were found in it; "
            "run stage 'neighbours' again with overwrite=True."
        )


def check_comparable(database: Corpus, embedded: Mapping[str, Any], tokenizer_sha256: str, chunk_size: int) -> None:
    """Refuse a database in which neighbours of such chunks cannot be looked for.

    Args:
        embedded: what `ChunkEmbedder.identity` says of the chunks' vectors.
        tokenizer_sha256, chunk_size: of the chunks.

    Raises:
        ValueError: the vectors, the tokens or the length of the database's chunks are of another kind.
    """
    database.manifest.require("embed")
    theirs = database.manifest.stages["embed"]["settings"]
    if embedded["embedder"]["sha256"] != theirs["embedder"]["sha256"] or embedded["pooling"] != theirs["pooling"]:
        raise ValueError(
            f"`database` {database.folder} was embedded with {theirs['embedder']['name']} ({theirs['pooling']}), the "
            f"documents given with {embedded['embedder']['name']} ({embedded['pooling']}): embed one of them again."
        )
    own = database.manifest.corpus["tokenizer"]
    if tokenizer_sha256 != own["sha256"]:
        raise ValueError(
            f"`database` {database.folder} was cut with the tokenizer {own['name']}, which is another than that of "
            "the documents given: cut both with one."
        )
    if chunk_size != database.chunk_size:
        raise ValueError(
            f"`database` {database.folder} has chunks of {database.chunk_size} tokens, the documents given of "
            f"{chunk_size}."
        )


def check_enough(corpus: Corpus, database: Corpus | None, num_neighbours: int) -> None:
    """Raise ValueError if no chunk of a tokenized corpus could have so many neighbours."""
    source = database or corpus
    most = source.num_chunks - (int(np.diff(corpus.documents).min()) if database is None else 0)
    if database is None and corpus.num_documents < 2:
        raise ValueError(f"{corpus.folder} has one document, so no chunk of another could be found; give `database`.")
    if num_neighbours > most:
        raise ValueError(
            f"`num_neighbours` must be at most {most}, as many as {source.folder} has for any chunk, "
            f"got {num_neighbours}."
        )


def _warn_of_missing(corpus: Corpus, database: Corpus | None, num_neighbours: int) -> None:
    """Warn if some chunks cannot have so many; in another corpus all have those that any has."""
    least = corpus.num_chunks - int(np.diff(corpus.documents).max())
    if database is None and least < num_neighbours:
        warnings.warn(
            f"outside its longest document {corpus.folder} has {least} chunks, fewer than `num_neighbours` "
            f"{num_neighbours}: some rows end with -1.",
            stacklevel=3,
        )
