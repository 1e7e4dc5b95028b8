"""What each chunk of each document names, read back from the folder of a knowledge graph: what chunks are weighed by.

`chunks.parquet` says where the chunks stand and which text they had, `mentions.parquet` what they name. So whoever has
the documents can tell whether the graph is of them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graft.atomic_files import new_file
from graft.graphs.knowledge_graph.mentions import TextChunk

CHUNKS, MENTIONS = "chunks.parquet", "mentions.parquet"
Place = tuple[str, int]  # document, chunk
_SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("chunk", pa.int64()),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class DocumentEntities:
    """The chunks of one document, in order, and what they name.

    Args:
        starts, lengths: first character of each chunk in the document, and how many it has.
        digests: SHA-256 of each chunk's text.
        sentences: for each chunk the entities of each sentence that names any, numbered from 0 in order of appearance.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    digests: tuple[str, ...]
    sentences: tuple[tuple[tuple[int, ...], ...], ...]

    def unlike(self, text: str) -> int | None:
        """The first chunk that does not stand in `text` where it should; None if all do."""
        for number, (start, length, digest) in enumerate(zip(self.starts, self.lengths, self.digests, strict=True)):
            if text_digest(text[start : start + length]) != digest:
                return number
        return None

    def chunk_at(self, character: int) -> int:
        """The chunk that has begun last at this character, -1 before the first."""
        return bisect_right(self.starts, character) - 1


def text_digest(text: str) -> str:
    """SHA-256 of a text; half of a pair of surrogates counts as itself."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_chunks(chunks: Sequence[TextChunk], path: str | Path, made_of: str) -> Path:
    """Write where chunks stand and the digests of their texts; `made_of` is kept for `made_of_chunks`."""
    rows = [(each.document, each.index, each.start, len(each.text), text_digest(each.text)) for each in chunks]
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
    table = pa.table(arrays, schema=_SCHEMA).replace_schema_metadata({"made_of": made_of})
    with new_file(path) as temporary:
        pq.write_table(table, temporary)
    return Path(path)


def made_of_chunks(folder: str | Path) -> str:
    """What `write_chunks` was told that the graph in `folder` was made of; "" where there is no whole graph."""
    try:
        return (pq.read_schema(Path(folder) / CHUNKS).metadata or {}).get(b"made_of", b"").decode()
    except (OSError, pa.ArrowInvalid):
        return ""


def read_documents(folder: str | Path) -> dict[str, DocumentEntities]:
    """The documents of the knowledge graph in `folder`, by name.

    Raises:
        FileNotFoundError: `folder` lacks one of the two files: no graph is in it, or an older graft wrote it.
        ValueError: a file cannot be read; a mention stands in no chunk; chunks of a document do not follow each other.
    """
    folder = Path(folder)
    if missing := [name for name in (CHUNKS, MENTIONS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: make it with graft-knowledge-graph.")
    try:
        chunks = pq.read_table(folder / CHUNKS, columns=_SCHEMA.names).to_pylist()
        named = ["document", "chunk", "sentence", "node"]
        mentions = pq.read_table(folder / MENTIONS, columns=named).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The knowledge graph in {folder} cannot be read: {error}.") from error
    sentences = _sentences(mentions)
    documents: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in chunks:
        documents[row["document"]].append(row)
    found = {name: _document(name, rows, sentences) for name, rows in documents.items()}
    if sentences:
        raise ValueError(
            f"{folder / MENTIONS} has mentions in {next(iter(sentences))}, which is no chunk of the graph."
        )
    return found


def _sentences(mentions: Iterable[Mapping[str, Any]]) -> dict[Place, dict[int, list[int]]]:
    """(document, chunk) -> sentence -> its nodes, each once, in order."""
    found: dict[Place, dict[int, list[int]]] = {}
    for row in mentions:
        nodes = found.setdefault((row["document"], row["chunk"]), {}).setdefault(row["sentence"], [])
        if row["node"] not in nodes:
            nodes.append(row["node"])
    return found


def _document(
    name: str, rows: list[Mapping[str, Any]], sentences: dict[Place, dict[int, list[int]]]
) -> DocumentEntities:
    """One document; takes its sentences out of `sentences`."""
    rows = sorted(rows, key=lambda row: row["chunk"])
    starts, lengths, digests = (tuple(row[column] for row in rows) for column in ("start", "length", "sha256"))
    for number in range(len(rows) - 1):
        if (end := starts[number] + lengths[number]) > starts[number + 1]:
            raise ValueError(
                f"Chunk {number + 1} of the document {name!r} begins at character {starts[number + 1]}, before the "
                f"end of the one before, {end}: chunks that read each other must not overlap, and need `chunk_start`."
            )
    numbers: dict[int, int] = {}
    of_chunks = []
    for row in rows:
        found = sentences.pop((name, row["chunk"]), {}).values()
        of_chunks.append(tuple(tuple(numbers.setdefault(n, len(numbers)) for n in nodes) for nodes in found))
    return DocumentEntities(starts, lengths, digests, tuple(of_chunks))
