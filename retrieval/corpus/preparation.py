"""All stages in one call: documents in, a corpus for training and generation out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .chunking import ChunkSettings, tokenize_corpus
from .corpus import Corpus
from .corpus_retriever import embedder_of
from .disk_space import corpus_bytes, format_bytes, parse_bytes, require_space
from .document_sources import DocumentSource
from .embedder import ChunkEmbedder
from .embedding import embed_corpus
from .executors import Executor, executor_and_threads
from .index_choice import IndexChoice, choose_index
from .indexing import build_index
from .manifest import Manifest
from .neighbours import check_comparable, check_enough, find_neighbours
from .packing import Pack, chunks_per_row, pack_sequences
from .tokenizers_of_corpora import identify, load_tokenizer

logger = logging.getLogger(__name__)

INDEXES = ("exact", "auto", "ivf_flat", "ivf_sq8", "opq_ivf_pq", "hnsw")


@dataclass(frozen=True)
class PreparationSettings:
    """What a corpus shall be.

    Args:
        chunks: how documents are cut.
        num_neighbours: stored per chunk; a few more than training uses leave a choice.
        sequence_length: tokens of a training row, a multiple of the chunk size.
        pack: "multi" lets documents share a row, "document" does not.
        workers: threads, by default the cores; or an executor, such as `LocalExecutor(4)` or `RayExecutor(16)`.
        index: "exact" measures every pair of chunks; "auto" takes the most exact index that fits the budget, which is
            exact up to 50,000 chunks; or a kind that `choose_index` knows.
        index_memory: budget of the index, such as "500M".
    """

    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    num_neighbours: int = 4
    sequence_length: int = 2048
    pack: Pack = "multi"
    workers: int | Executor | None = None
    index: str = "exact"
    index_memory: str | int = "16G"

    def __post_init__(self) -> None:
        parse_bytes(self.index_memory, "index_memory")
        if self.index not in INDEXES:
            raise ValueError(f"`index` must be one of {', '.join(INDEXES)}, got {self.index!r}.")
        chunks_per_row(self.sequence_length, self.chunks.chunk_size)
        if self.num_neighbours < 1:
            raise ValueError(f"`num_neighbours` must be at least 1, got {self.num_neighbours}.")
        executor_and_threads(self.workers)


def prepare_corpus(
    source: DocumentSource,
    folder: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    embedder: ChunkEmbedder,
    settings: PreparationSettings | None = None,
    overwrite: bool = False,
    database: Corpus | None = None,
) -> Corpus:
    """Tokenize, embed, find neighbours and pack; what is done already is kept, what was interrupted goes on.

    Args:
        source: the documents, such as `open_source(path)`.
        folder: of the corpus.
        tokenizer: of the model that will be trained.
        embedder: finds the neighbours; it may have a tokenizer of its own.
        settings: sizes.
        overwrite: begin anew.
        database: where neighbours are looked for, as held-out documents need it; by default the corpus itself, without
            the chunk's own document. Its index, if it has one, is asked where `settings.index` is "auto".

    Raises:
        OSError: the disk is too small for all of it.
        ValueError: something differs from what was begun, or cannot be.
    """
    settings = settings or PreparationSettings()
    if database is not None and settings.index not in ("exact", "auto"):
        raise ValueError(
            f"`index` must be exact or auto with a `database`, whose own is asked, got {settings.index!r}."
        )
    tokenizer = load_tokenizer(tokenizer)
    if database is not None:  # before the long work, not after
        check_comparable(database, embedder.identity(), identify(tokenizer).sha256, settings.chunks.chunk_size)
    if overwrite or not (Path(folder) / "manifest.json").exists():
        _check_space(source, folder, tokenizer, embedder, settings)
    corpus = tokenize_corpus(source, folder, tokenizer, settings.chunks, overwrite=overwrite)
    check_enough(corpus, database, settings.num_neighbours)  # what cannot be is refused before the long work
    if database is None:
        choice = _choice(len(corpus), embedder.width, settings)
    embed_corpus(folder, embedder, settings.workers)
    if database is not None:
        is_stored = settings.index == "auto" and "index" in database.manifest.stages
    elif is_stored := choice.kind != "exact":
        build_index(folder, choice)
    index: Literal["exact", "stored"] = "stored" if is_stored else "exact"
    find_neighbours(folder, settings.num_neighbours, database, index, workers=settings.workers)
    return pack_sequences(folder, settings.sequence_length, settings.pack)


def append_documents(
    source: DocumentSource,
    folder: str | Path,
    embedder: ChunkEmbedder | None = None,
    workers: int | None = None,
    max_chunks: int | None = None,
) -> Corpus:
    """Add documents to a finished corpus: new shards, their vectors and neighbours; older neighbours stay as they are.

    `refresh_neighbours` lets the older chunks find the new ones. `max_chunks` is for the whole corpus, in the place of
    what it was built with: without it all documents are added.
    """
    corpus = Corpus(folder)
    recorded = corpus.manifest.corpus
    names = ("chunk_size", "shard_chunks", "add_special_tokens", "append_eos")
    settings = ChunkSettings(**{name: recorded[name] for name in names}, max_chunks=max_chunks)
    stages = corpus.manifest.stages
    embedder = embedder if embedder is not None or "embed" not in stages else embedder_of(corpus)
    tokenize_corpus(source, folder, corpus.tokenizer, settings, append=True)
    if embedder is not None:
        embed_corpus(folder, embedder, workers)
    if "neighbours" in stages:
        find_neighbours(folder, **_neighbour_settings(stages["neighbours"]["settings"]), workers=workers)
    if "pack" in stages:
        pack_sequences(folder, **stages["pack"]["settings"])
    return Corpus(folder)


def refresh_neighbours(folder: str | Path, num_neighbours: int | None = None, workers: int | None = None) -> Corpus:
    """Search all neighbours again, as is due after documents were appended."""
    manifest = Manifest.read(folder)
    manifest.require("neighbours")
    settings = _neighbour_settings(manifest.stages["neighbours"]["settings"])
    if num_neighbours is not None:
        settings["num_neighbours"] = num_neighbours
    return find_neighbours(folder, **settings, workers=workers, overwrite=True)


def _neighbour_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `find_neighbours` that a corpus recorded."""
    database = recorded["database"]
    return {**recorded, "database": Corpus(database["name"]) if database is not None else None}


def _choice(count: int, width: int, settings: PreparationSettings) -> IndexChoice:
    if settings.index == "exact":  # read block by block from disk, so no budget applies
        return IndexChoice("exact", 0, 0, "asked for")
    kind = None if settings.index == "auto" else settings.index
    choice = choose_index(count, width, settings.index_memory, settings.index_memory, kind)
    logger.info("index %s: %s, about %s", choice.kind, choice.reason, format_bytes(choice.num_bytes))
    return choice


def _check_space(
    source: DocumentSource,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    embedder: ChunkEmbedder,
    settings: PreparationSettings,
) -> None:
    id_bytes = identify(tokenizer).dtype.itemsize
    sizes = corpus_bytes(
        source.num_bytes(), settings.chunks.chunk_size, id_bytes, embedder.width, settings.num_neighbours
    )
    parts = ", ".join(f"{stage} {format_bytes(count)}" for stage, count in sizes.items())
    logger.info("%s will need at most about %s (%s)", folder, format_bytes(sum(sizes.values())), parts)
    require_space(folder, sum(sizes.values()))
