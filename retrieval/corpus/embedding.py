"""Stage embed: one vector per chunk, float16 on disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from .corpus import Corpus
from .embedder import ChunkEmbedder
from .executors import Executor, executor_and_threads
from .stage import run_shards


def embed_corpus(
    folder: str | Path, embedder: ChunkEmbedder, workers: int | Executor | None = None, overwrite: bool = False
) -> Corpus:
    """Embed every chunk of a corpus; go on where an interrupted run stopped.

    Args:
        folder: of a tokenized corpus.
        embedder: the same must embed what is looked up later; its weights' hash is recorded.
        workers: threads, by default the cores; or an executor. Neither changes a byte.
        overwrite: begin anew; neighbours found with the old vectors go.

    Raises:
        ValueError: `embedder` differs from the recorded one.
        CorpusError: the corpus is damaged or not tokenized.
    """
    executor, threads = executor_and_threads(workers)
    compute = partial(embed_shard, embedder=embedder, workers=threads)
    return run_shards(folder, "embed", embedder.identity(), compute, 2 * embedder.width, executor, overwrite)


def embed_shard(
    corpus: Corpus, start: int, end: int, embedder: ChunkEmbedder, workers: int = 1
) -> dict[str, np.ndarray]:
    """The vectors of chunks start ... end - 1, (end - start, width) float16, under the suffix of their file."""
    vectors = embed_chunks(corpus, corpus.tokens.between(start, end).astype(np.int64), embedder, workers)
    return {".npy": vectors.astype(np.float16)}


def embed_chunks(corpus: Corpus, chunks: np.ndarray, embedder: ChunkEmbedder, workers: int = 1) -> np.ndarray:
    """Embed chunks of the corpus's ids, stored ones and questions alike.

    The embedder reads the ids themselves if it has the corpus's tokenizer, else the text they stand for.

    Args:
        corpus: whose tokenizer and padding the ids have.
        chunks: (count, length) int64; padding at the end of a row is left out.
        embedder: any.
        workers: threads.

    Returns:
        (count, width) float32; zeros where a chunk has no text for the embedder.
    """
    if embedder.tokenizer_sha256 == corpus.manifest.corpus["tokenizer"]["sha256"]:
        real = (chunks != corpus.pad_token_id)[:, ::-1]
        lengths = np.where(real.any(1), chunks.shape[1] - real.argmax(1), 0)
        ids = [row[:length] for row, length in zip(chunks, lengths, strict=True)]
    else:
        ids = embedder.tokenize(corpus.tokenizer.batch_decode(chunks, skip_special_tokens=True))
    return embedder.embed_ids(ids, workers).numpy()
