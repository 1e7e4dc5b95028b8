"""The document's functions on texts, chunks and neighbours, over raw files with a graft corpus beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.retrieval.corpus.chunking import ChunkSettings, tokenize_corpus
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import TextFolder
from graft.retrieval.corpus.embedder import ChunkEmbedder, EmbedderSettings
from graft.retrieval.corpus.embedding import embed_corpus
from graft.retrieval.corpus.index_choice import IndexChoice, choose_index
from graft.retrieval.corpus.indexing import build_index, open_index
from graft.retrieval.corpus.neighbours import check_enough, find_neighbours
from graft.retrieval.corpus.original_files import (
    OriginalChunks,
    holds_chunks,
    write_chunks,
    write_document_ids,
    write_neighbours,
    write_sequences,
)
from graft.retrieval.corpus.packing import pack_sequences
from graft.retrieval.datastore import Datastore

ENCODER_VARIABLE = "DIABLOGPT_EMBEDDER"
DEFAULT_ENCODER = "bert-base-cased"
"""Tokenizer and encoder of the document; the environment variable names another folder or model."""


def embedder(use_cls_repr: bool = False) -> ChunkEmbedder:
    """The encoder that the environment names, with vectors of any length, as the document's have."""
    return _load(os.environ.get(ENCODER_VARIABLE, DEFAULT_ENCODER), use_cls_repr)


@lru_cache(maxsize=2)
def _load(name: str, use_cls_repr: bool) -> ChunkEmbedder:
    return ChunkEmbedder(name, settings=EmbedderSettings("cls" if use_cls_repr else "mean", normalize=False))


def wants_reprocessing() -> bool:
    """Whether the environment says REPROCESS=1, or true, or t."""
    return os.environ.get("REPROCESS", "").lower() in ("true", "1", "t")


def tokenize(texts: Sequence[str] | str, add_special_tokens: bool = True) -> Tensor:
    """(count, longest) ids, padded."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = embedder().tokenizer
    ids: Tensor = tokenizer(listed, add_special_tokens=add_special_tokens, padding=True, return_tensors="pt").input_ids
    return ids


def bert_embed(token_ids: Tensor, return_cls_repr: bool = False) -> Tensor:
    """Vectors (count, width): the mean over the tokens behind [CLS], or its own.

    Args:
        token_ids: (count, length) of `tokenize`, with or without special tokens; padding at the end.
        return_cls_repr: the vector of [CLS].
    """
    encoder = embedder(return_cls_repr)
    rows = token_ids.cpu().numpy().astype(np.int64)
    lengths = (rows != encoder.pad_id).sum(1)
    firsts = (rows[:, 0] == encoder.first_id).astype(int)  # put in front of every row anyway
    return encoder.embed_ids([row[first:end] for row, first, end in zip(rows, firsts, lengths, strict=True)])


def corpus_folder(chunks_memmap_path: str | Path) -> Path:
    """Where the corpus of a raw file lies: ./train.chunks.dat has ./train.chunks.corpus beside it."""
    return Path(chunks_memmap_path).with_suffix(".corpus")


def text_folder_to_chunks_(
    *,
    folder: str | Path,
    chunks_memmap_path: str | Path,
    seqs_memmap_path: str | Path,
    doc_ids_memmap_path: str | Path,
    chunk_size: int = 64,
    seq_len: int = 2048,
    glob: str = "**/*.txt",
    max_chunks: int = 1_000_000,
    max_seqs: int = 100_000,
) -> dict[str, int]:
    """Cut a folder of texts into chunks and training rows; the counts of chunks, docs and seqs.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: the corpus beside the files was made of other texts; REPROCESS=1 makes it again.
    """
    place = corpus_folder(chunks_memmap_path)
    settings = ChunkSettings(chunk_size=chunk_size, max_chunks=max_chunks)
    source = TextFolder(folder, glob)
    tokenize_corpus(source, place, embedder().tokenizer, settings, overwrite=wants_reprocessing())
    corpus = pack_sequences(place, seq_len, "document")
    rows = corpus.sequences[:max_seqs]
    write_chunks(corpus, chunks_memmap_path)
    write_sequences(rows, seqs_memmap_path)
    write_document_ids(corpus, doc_ids_memmap_path)
    return {"chunks": len(corpus), "docs": corpus.num_documents, "seqs": len(rows)}


class SearchIndex:
    """Nearest rows of a store, numpy in and out.

    Args:
        store: of a corpus's vectors.
    """

    def __init__(self, store: Datastore) -> None:
        self.store = store

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances and numbers (count, k) of the nearest, nearest first."""
        distances, ids = self.store.search(torch.from_numpy(np.asarray(vectors, np.float32)), k)
        return distances.numpy(), ids.numpy()


def chunks_to_index_and_embed(
    *,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: str | Path,
    use_cls_repr: bool = False,
    max_index_memory_usage: str = "100m",
    current_memory_available: str = "1G",
    **ignored: Any,
) -> tuple[SearchIndex, np.ndarray]:
    """Embed the chunks of a raw file, and index them.

    Args:
        num_chunks: of the file; rows that it lacks are left out.
        chunk_size: m.
        chunk_memmap_path: the file.
        use_cls_repr: see `bert_embed`.
        max_index_memory_usage, current_memory_available: budgets, which choose the index.
        ignored: the document's `embed_dim`, `max_rows_per_file`, `chunks_to_embeddings_batch_size` and `index_file`,
            which follow from the encoder and the corpus.

    Returns:
        the index and the vectors (num_chunks, width) float32.
    """
    _refuse_unknown(ignored)
    corpus, encoder = _chunked(num_chunks, chunk_size, chunk_memmap_path, None, use_cls_repr)
    choice = choose_index(len(corpus), encoder.width, max_index_memory_usage, current_memory_available)
    corpus = embed_corpus(corpus.folder, encoder, overwrite=wants_reprocessing())
    index = _index(corpus, choice)
    return index, corpus.embeddings.between(0, len(corpus)).astype(np.float32)


def chunks_to_precalculated_knn_(
    *,
    num_chunks: int,
    chunk_size: int,
    chunk_memmap_path: str | Path,
    doc_ids_memmap_path: str | Path,
    num_nearest_neighbors: int = 2,
    num_extra_neighbors: int = 10,
    use_cls_repr: bool = False,
    force_reprocess: bool = False,
    max_index_memory_usage: str = "100m",
    current_memory_available: str = "1G",
    **ignored: Any,
) -> tuple[Path, SearchIndex]:
    """Write the nearest chunks of other documents for each chunk, to ./train.chunks.knn.dat for ./train.chunks.dat.

    Args:
        num_chunks, chunk_size, chunk_memmap_path, use_cls_repr: see `chunks_to_index_and_embed`.
        doc_ids_memmap_path: which chunks are of one document.
        num_nearest_neighbors: stored.
        num_extra_neighbors: not needed: the search itself leaves the own document out, so no slot stays empty.
        force_reprocess: search again.
        max_index_memory_usage, current_memory_available: budgets, which choose the index.
        ignored: see `chunks_to_index_and_embed`.

    Returns:
        the path of the file, and the index.
    """
    _refuse_unknown(ignored)
    if num_extra_neighbors < 0:
        raise ValueError(f"`num_extra_neighbors` must be at least 0, got {num_extra_neighbors}.")
    corpus, encoder = _chunked(num_chunks, chunk_size, chunk_memmap_path, doc_ids_memmap_path, use_cls_repr)
    choice = choose_index(len(corpus), encoder.width, max_index_memory_usage, current_memory_available)
    check_enough(corpus, None, num_nearest_neighbors)
    corpus = embed_corpus(corpus.folder, encoder, overwrite=wants_reprocessing())
    index = _index(corpus, choice)
    again = force_reprocess or wants_reprocessing()
    approximate = index.store.kind != "exact"
    corpus = find_neighbours(
        corpus.folder, num_nearest_neighbors, index="stored" if approximate else "exact", overwrite=again
    )
    path = Path(chunk_memmap_path)
    path = path.with_name(f"{path.stem}.knn{path.suffix}")
    write_neighbours(corpus, path, num_nearest_neighbors)
    return path, index


KNOWN_AND_IGNORED = {"embed_dim", "max_rows_per_file", "chunks_to_embeddings_batch_size", "index_file"}


def _refuse_unknown(ignored: dict[str, Any]) -> None:
    if unknown := sorted(set(ignored) - KNOWN_AND_IGNORED):
        raise TypeError(f"unknown arguments {unknown}; those that are taken and not needed: {KNOWN_AND_IGNORED}.")


def _chunked(
    num_chunks: int,
    chunk_size: int,
    chunks_path: str | Path,
    document_ids: str | Path | None,
    use_cls_repr: bool,
) -> tuple[Corpus, ChunkEmbedder]:
    """The corpus beside a raw file, made of it if there is none or one of other chunks; and what will embed it."""
    place, encoder = corpus_folder(chunks_path), embedder(use_cls_repr)
    if not (place / "manifest.json").exists() or not holds_chunks(Corpus(place), chunks_path, num_chunks):
        end = encoder.tokenizer.sep_token_id
        source = OriginalChunks(chunks_path, chunk_size, num_chunks, document_ids, end, encoder.pad_id)
        settings = ChunkSettings(chunk_size=chunk_size, append_eos=False)
        tokenize_corpus(source, place, encoder.tokenizer, settings, overwrite=True)
    return Corpus(place), encoder


def _index(corpus: Corpus, choice: IndexChoice) -> SearchIndex:
    width = corpus.embeddings.shape[1]
    if choice.kind == "exact":
        store = Datastore(width, "exact", "l2")
        store.add(torch.from_numpy(corpus.embeddings.between(0, len(corpus))))
        return SearchIndex(store)
    return SearchIndex(open_index(build_index(corpus.folder, choice, overwrite=wants_reprocessing())))
