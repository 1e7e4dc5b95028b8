"""The whole way from chunks to a folder of files, which goes on after a kill where it was stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from graft.graphs.knowledge_graph import graph_drawing, graph_files, graph_page
from graft.graphs.knowledge_graph.document_entities import CHUNKS, made_of_chunks, text_digest, write_chunks
from graft.graphs.knowledge_graph.graph_building import GraphSettings, KnowledgeGraph, build_graph
from graft.graphs.knowledge_graph.mention_shards import (
    SHARD,
    ExtractorChoice,
    extract_mentions,
    read_mentions,
    shard_path,
)
from graft.graphs.knowledge_graph.mentions import TextChunk
from graft.graphs.knowledge_graph.verb_relations import verb_links

logger = logging.getLogger(__name__)


def build_knowledge_graph(
    chunks: Sequence[TextChunk],
    folder: str | Path,
    choice: ExtractorChoice | None = None,
    settings: GraphSettings | None = None,
    workers: int = 1,
    shard: int = SHARD,
) -> KnowledgeGraph:
    """Write graph.graphml, graph.json, mentions.parquet, merges.json, chunks.parquet and pictures into `folder`.

    Mentions go to `folder`/shards first, `shard` chunks a file; a second call reads those again that still fit the
    texts and the extractor. The same chunks and settings give the same bytes, however often it was stopped.

    Raises:
        ValueError: there are no chunks, two share document and index, or an option is out of range.
        ImportError, OSError: the extractor's library or model is absent.
    """
    folder, choice = Path(folder), choice or ExtractorChoice()
    _check(chunks)
    for done, total in extract_mentions(chunks, folder / "shards", choice, workers, shard):
        logger.info("%d of %d shards have their mentions", done, total)
    shards = [shard_path(folder / "shards", number) for number in range(-(-len(chunks) // shard))]
    mentions = [mention for path in shards for mention in read_mentions(path)]
    found = build_graph(mentions, settings, verb_links(mentions, chunks))
    graph_files.write_graphml(found.graph, folder / "graph.graphml")
    graph_files.write_graph_json(found.graph, folder / "graph.json")
    graph_files.write_mentions(found, folder / "mentions.parquet")
    graph_files.write_merges(found, folder / "merges.json")
    title = page_title(chunks)
    if len(found.graph):
        graph_drawing.write_picture(found, folder / "graph.png", title)
    graph_page.write_page(found, chunks, folder / "graph.html", title)
    write_chunks(chunks, folder / CHUNKS, _made_of(chunks, choice, settings))  # last: it says that the rest is there
    return found


def knowledge_graph_stands(
    chunks: Sequence[TextChunk],
    folder: str | Path,
    choice: ExtractorChoice | None = None,
    settings: GraphSettings | None = None,
) -> bool:
    """Whether `folder` holds what `build_knowledge_graph` makes of these chunks and options."""
    return made_of_chunks(folder) == _made_of(chunks, choice or ExtractorChoice(), settings)


def _made_of(chunks: Sequence[TextChunk], choice: ExtractorChoice, settings: GraphSettings | None) -> str:
    state = hashlib.sha256(json.dumps([choice.identity(), asdict(settings or GraphSettings())]).encode())
    for chunk in chunks:
        state.update(json.dumps([chunk.document, chunk.index, chunk.start, text_digest(chunk.text)]).encode())
    return state.hexdigest()


def page_title(chunks: Sequence[TextChunk]) -> str:
    """The heading of page and picture."""
    documents = len({chunk.document for chunk in chunks})
    return f"What {documents:,} document{'s name' if documents > 1 else ' names'}, and what stands together"


def _check(chunks: Sequence[TextChunk]) -> None:
    if not chunks:
        raise ValueError("`chunks` is empty: there is no text to read.")
    if len({(chunk.document, chunk.index) for chunk in chunks}) < len(chunks):
        raise ValueError("`chunks` has two chunks with the same document and index.")
