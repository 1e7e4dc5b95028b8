"""Graphs between the chunks of documents, as columns of a run's rows: which chunk a token is in, what each reads.

A row holds part of a document. Its graph has the chunks of that part, in order: `chunk_ids`, one for each token, and
`chunk_weights`, whose row a says what chunk a reads of chunks 0 to a (see `graphs/knowledge_graph/chunk_weights.py`).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, Features
from numpy.typing import NDArray

from graft.graphs.knowledge_graph.chunk_weights import chunk_weights
from graft.graphs.knowledge_graph.document_entities import DocumentEntities
from graft.trainer.column_types import COLUMN_TYPES
from graft.trainer.knowledge_graph_arguments import KnowledgeGraphArguments
from graft.trainer.row_mapping import RowMapping
from graft.trainer.tokenisation import Batch

logger = logging.getLogger(__name__)

Documents = Mapping[str, DocumentEntities]
_COUNTS = ("graph_chunks", "graph_readers", "graph_edges")


def chunks_of_tokens(token_starts: list[int], document: DocumentEntities) -> NDArray[np.int64]:
    """The chunk of the document that each token is in: (tokens,), never falling, -1 for none.

    A token that is not of the text has none before it; behind it, where an answer stands, it is in the last chunk that
    the row has, as generated tokens are.

    Args:
        token_starts: of each token its first character in the document, -1 for those that are not of its text.
    """
    starts = np.asarray(token_starts, dtype=np.int64)
    chunks = np.searchsorted(np.asarray(document.starts), starts, side="right") - 1
    # A tokenizer that normalises may step back; and what stands behind the text, or in it without a place, goes on.
    return np.maximum.accumulate(np.where(starts >= 0, chunks, -1))


def row_graph(
    name: str, document: DocumentEntities, token_starts: list[int], options: KnowledgeGraphArguments, shuffled: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What one row reads: chunks of its tokens, numbered from 0, and their weights (chunks, chunks).

    Chunks before the row are known, as what has been read is, but out of sight. With `shuffled` each chunk's weights
    are dealt to its earlier chunks anew: as many edges of the same weights, and no entity in them.

    Args:
        name: of the document; with the number of a chunk it seeds what is dealt.
    """
    chunks = chunks_of_tokens(token_starts, document)
    present = chunks[chunks >= 0]
    if not len(present):
        return chunks, np.zeros((0, 0), dtype=np.float32)
    first, end = int(present[0]), int(present[-1]) + 1
    known = document.sentences[:end] if options.causal else document.sentences
    weights = chunk_weights(known, options.chunk_neighbours, options.own, options.causal, first=first)
    weights = weights[first:end, first:end]
    for row in range(1, len(weights)) if shuffled else ():
        dealt = random.Random(f"{name} {first + row}").sample(range(row), row)
        weights[row, :row] = weights[row, dealt]
    return np.where(chunks >= 0, chunks - first, -1), weights


def graph_columns(
    batch: Batch, documents: Documents, options: KnowledgeGraphArguments, shuffled: bool = False
) -> Batch:
    """chunk_ids, chunk_weights (row a has a + 1 of them), and how many chunks, reading chunks and edges there are."""
    columns: Batch = {name: [] for name in ("chunk_ids", "chunk_weights", *_COUNTS)}
    for name, starts in zip(batch["id"], batch["token_starts"], strict=True):
        ids, weights = row_graph(name, documents[name], starts, options, shuffled)
        below = np.tril(weights, -1) > 0
        columns["chunk_ids"].append(ids.tolist())
        columns["chunk_weights"].append([row[: number + 1].tolist() for number, row in enumerate(weights)])
        for count, value in zip(_COUNTS, (len(weights), below.any(1).sum(), below.sum()), strict=True):
            columns[count].append(int(value))
    return columns


@dataclass
class KnowledgeGraphs:
    """The graphs of a run's documents.

    Args:
        options: what of them is read.
        documents: for each split its documents by name.
        report: of what rows were given, for the record of the run; see `with_columns`.
    """

    options: KnowledgeGraphArguments
    documents: Mapping[str, Documents]
    report: dict[str, dict[str, float]] = field(default_factory=dict)

    def with_columns(self, rows: Dataset, split: str, view: str) -> Dataset:
        """Rows with `token_starts` become rows with chunk_ids and chunk_weights; without, they stay what they are.

        `report` then says of these rows how many chunks they have, `coverage`, the share of those with earlier ones in
        their row that read one, and `density`, the share of pairs with weight.
        """
        if "token_starts" not in rows.column_names:
            return rows
        documents = {name: self.documents[split][name] for name in dict.fromkeys(rows["id"])}
        facts = hashlib.sha256(repr((self.options, view)).encode())
        for item in documents.items():
            facts.update(repr(item).encode())
        kept = [name for name in rows.column_names if name != "token_starts"]
        given = {"documents": documents, "options": self.options, "shuffled": view == "shuffled_graph"}
        mapped = RowMapping(None, overwrite_cache=False)(
            rows,
            graph_columns,
            facts.hexdigest(),
            remove_columns=["token_starts"],
            features=Features({name: COLUMN_TYPES[name] for name in (*kept, "chunk_ids", "chunk_weights", *_COUNTS)}),
            fn_kwargs=given,
            desc="Adding graphs",
        )
        chunks, readers, edges = (np.asarray(mapped[name], dtype=np.float64) for name in _COUNTS)
        pairs = (chunks * (chunks - 1) / 2).sum()
        self.report[f"{split}_{view}"] = {
            "documents": float(len(documents)),
            "chunks": float(chunks.sum()),
            "coverage": float(readers.sum() / max((chunks - 1).clip(min=0).sum(), 1)),
            "density": float(edges.sum() / max(pairs, 1)),
        }
        logger.info(
            "%s: %d rows have %d chunks; %.0f %% of those with earlier ones in their row read one (view %r).",
            *(split, len(rows), chunks.sum(), 100 * self.report[f"{split}_{view}"]["coverage"], view),
        )
        return mapped.remove_columns(list(_COUNTS))
