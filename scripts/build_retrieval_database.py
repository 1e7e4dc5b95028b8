"""Cut documents into chunks, embed them, and write each chunk's neighbours; interrupted, the same command goes on.

graft-build-database books/ --output corpus/ --tokenizer path/to/model --embedder path/to/encoder
graft-build-database held_out/ --output held_out_corpus/ --database corpus/
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.scripts.exit_codes import GOES_ON, exit_code

if TYPE_CHECKING:
    from graft.retrieval.corpus.executors import Executor

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", type=Path, help="a folder of text, or a .txt, .md, .jsonl or .parquet file")
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus, new or begun")
    parser.add_argument("--tokenizer", help="folder or name, of the model to train; default: the embedder's")
    parser.add_argument("--embedder", help="folder or name of an encoder; default: all-MiniLM-L6-v2 if installed")
    parser.add_argument("--glob", default="**/*.txt", help="which files of a folder")
    parser.add_argument("--text-field", default="text", help="key or column of the text")
    parser.add_argument(
        "--errors",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="what is done about text that is no UTF-8",
    )
    parser.add_argument("--chunk-size", type=int, default=64, help="tokens of a chunk")
    parser.add_argument("--shard-chunks", type=int, default=2**14, help="chunks per file; a kill costs one at most")
    parser.add_argument("--max-chunks", type=int, help="stop before the document that would exceed it")
    parser.add_argument("--database", type=Path, help="corpus to find neighbours in; default: this one itself")
    parser.add_argument("--neighbours", type=int, default=4, help="stored per chunk")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens of a training row")
    parser.add_argument("--pack", choices=("multi", "document"), default="multi", help="documents per training row")
    parser.add_argument("--index", default="exact", help="exact, auto, ivf_flat, ivf_sq8, opq_ivf_pq or hnsw")
    parser.add_argument("--index-memory", default="16G", help="budget of an index that is not exact, such as 500M")
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="of the embedder")
    parser.add_argument("--device", help="of the embedder, such as cuda; default: the CPU")
    parser.add_argument("--workers", type=int, help="threads, processes or actors; default: the cores")
    parser.add_argument(
        "--executor", choices=("threads", "local", "ray"), default="threads", help="local: processes; ray: actors"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew instead of going on")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, say where the corpus lies; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-build-database", lambda: _build(given), when_interrupted=GOES_ON)


def _build(given: argparse.Namespace) -> None:
    from graft.retrieval.corpus.chunking import ChunkSettings
    from graft.retrieval.corpus.corpus import Corpus
    from graft.retrieval.corpus.document_sources import open_source
    from graft.retrieval.corpus.embedder import ChunkEmbedder, EmbedderSettings, minilm_folder
    from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus

    source = open_source(given.input, given.glob, given.text_field, given.errors)
    chunks = ChunkSettings(given.chunk_size, given.shard_chunks, max_chunks=given.max_chunks)
    sizes = {"num_neighbours": given.neighbours, "sequence_length": given.sequence_length, "pack": given.pack}
    index = {"index": given.index, "index_memory": given.index_memory}
    settings = PreparationSettings(chunks, **sizes, **index, workers=_workers(given))
    encoder = given.embedder or minilm_folder()
    embedder = ChunkEmbedder(encoder, settings=EmbedderSettings(given.pooling), device=given.device)
    tokenizer = given.tokenizer or embedder.tokenizer
    database = Corpus(given.database) if given.database else None
    corpus = prepare_corpus(source, given.output, tokenizer, embedder, settings, given.overwrite, database)
    logger.info("%d chunks and their neighbours are in %s", len(corpus), given.output)


def _workers(given: argparse.Namespace) -> int | Executor | None:
    if given.executor == "local":
        from graft.retrieval.corpus.executors import LocalExecutor

        return LocalExecutor(given.workers)
    if given.executor == "ray":
        from graft.retrieval.corpus.ray_executor import RayExecutor

        return RayExecutor(given.workers or 2)
    workers: int | None = given.workers
    return workers


if __name__ == "__main__":
    raise SystemExit(main())
