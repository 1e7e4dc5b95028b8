"""Where the knowledge graphs of a run come from: folders that the user names, or the chunks of its own documents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph, knowledge_graph_stands
from graft.graphs.knowledge_graph.document_entities import read_documents
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice
from graft.graphs.knowledge_graph.mentions import TextChunk
from graft.modeling.graph.modeling_llama_gnn import refuse_graph
from graft.trainer.arguments import RunConfiguration
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import standard_rows_of
from graft.trainer.document_chunks import ChunkRules, cut_documents
from graft.trainer.knowledge_graph_arguments import KnowledgeGraphArguments
from graft.trainer.knowledge_graph_data import Documents, KnowledgeGraphs

logger = logging.getLogger(__name__)


def check_reads_graphs(configuration: RunConfiguration, config: PreTrainedConfig) -> None:
    """Refuse a graph that nothing in the model would read, before any text is.

    Raises:
        ConfigurationError: the model has no network that adds up edges, and no adapter that is one.
    """
    if configuration.knowledge_graph is None or configuration.adapter is not None:
        return
    try:
        refuse_graph(config.gnn_config)
    except ValueError as error:
        raise ConfigurationError(
            f"`graph.knowledge_graph` has no reader: {error} Set `graph.attention` 'llama' and `graph.sparse`, or let "
            "an adapter read it (`adapter.type` 'sparse_gin')."
        ) from error


def knowledge_graphs(
    configuration: RunConfiguration, splits: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> KnowledgeGraphs | None:
    """The graphs of all documents of these splits; None where the run is given none.

    Args:
        folder: where graphs that no folder is named for are made, one for each split; those that stand are kept.

    Raises:
        ConfigurationError: a folder that holds no graph, or one of other documents; two documents of one name; a
            library that is not installed.
    """
    options = configuration.knowledge_graph
    if options is None:
        return None
    found: dict[str, Documents] = {}
    for split, rows in splits.items():
        texts = _texts(rows, configuration, split)
        named = options.folder.get(split) if isinstance(options.folder, dict) else options.folder
        if options.folder is None:
            found[split] = _made(texts, tokenizer, options, folder / split)
        elif named is None:
            raise ConfigurationError(
                f"`graph.knowledge_graph.folder` names no folder for the split {split}, which the run needs."
            )
        else:
            found[split] = _read(texts, named, split)
    return KnowledgeGraphs(options, found)


def _texts(rows: Any, configuration: RunConfiguration, split: str) -> dict[str, str]:
    """Name -> text of every document."""
    standard = standard_rows_of(rows, configuration, split)
    texts: dict[str, str] = {}
    for name, text in zip(standard["id"], standard["source"], strict=True):
        if texts.setdefault(name, text) != text:
            raise ConfigurationError(
                f"Two texts of the split {split} are called {name!r} in `data.id_column` "
                f"{configuration.data.id_column!r}: a knowledge graph finds a text by its name."
            )
    return texts


def _read(texts: Mapping[str, str], folder: str, split: str) -> Documents:
    try:
        documents = read_documents(folder)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"`graph.knowledge_graph.folder` {folder!r}: {error}") from error
    for name, text in texts.items():
        where = f"`graph.knowledge_graph.folder` {folder!r} holds the graph of other documents: "
        if name not in documents:
            known = ", ".join(map(repr, list(documents)[:3]))
            raise ConfigurationError(f"{where}it knows no {name!r} of the split {split}, but {known}, ...")
        if (chunk := documents[name].unlike(text)) is not None:
            raise ConfigurationError(
                f"{where}its chunk {chunk} of {name!r} does not stand in the text that the split {split} has under "
                "that name."
            )
    return documents


def _made(
    texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, options: KnowledgeGraphArguments, folder: Path
) -> Documents:
    """The graph of these texts, made in `folder` unless it stands there."""
    choice = ExtractorChoice(options.extractor)
    try:
        chunks = _token_chunks(texts, tokenizer, options.chunk_size)
        if not knowledge_graph_stands(chunks, folder, choice):
            logger.info("Making the knowledge graph of %d documents (%d chunks) ...", len(texts), len(chunks))
            build_knowledge_graph(chunks, folder, choice)
        return read_documents(folder)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigurationError(f"`graph.knowledge_graph`: {' '.join(str(error).split())}") from error


def _token_chunks(texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, chunk_size: int) -> list[TextChunk]:
    """Chunks of so many tokens that tile each text; in order of names, so that the order of rows does not matter."""
    rules = ChunkRules(chunk_size, min_chunk_tokens=0, capture_raw_text=True)
    ordered, chunks = sorted(texts), []
    for names in (ordered[first : first + 64] for first in range(0, len(ordered), 64)):
        cut = cut_documents([texts[name] for name in names], [([], [])] * len(names), tokenizer, rules)
        columns = (cut[name] for name in ("row", "chunk_index", "raw_text_chunks", "chunk_start"))
        chunks += [TextChunk(names[row], index, text, start) for row, index, text, start in zip(*columns, strict=True)]
    return chunks
