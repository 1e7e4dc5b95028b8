"""A chunk, its document and its neighbours as people read them: plain text, or a page that opens anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graft.pages import heading, page, paragraph, table

from .corpus import Corpus
from .neighbours import open_database

_ABOUT = (
    "Some chunks of {} tokens, each with what follows it, and below it the stored neighbours: the nearest chunks by "
    "what they say. The distance is the squared one of their vectors, so smaller is nearer."
)


@dataclass(frozen=True)
class Passage:
    """A chunk of a corpus as text.

    Args:
        chunk: its number.
        document: the name of its document.
        text: what it says.
        continuation: what follows in the document; "" at its end.
        distance: squared, from the chunk whose neighbour it is; None for that chunk itself.
    """

    chunk: int
    document: str
    text: str
    continuation: str
    distance: float | None = None


def read_passage(corpus: Corpus, chunk: int, distance: float | None = None) -> Passage:
    """Chunk number `chunk` as text; IndexError if there is none."""
    text = corpus.text(chunk)
    document = int(corpus.document_of(np.asarray([chunk]))[0])
    follows = chunk + 1 < corpus.documents[document + 1]
    continuation = corpus.text(chunk + 1) if follows else ""
    return Passage(chunk, str(corpus.document_names[document]), text, continuation, distance)


def read_neighbours(corpus: Corpus, chunk: int) -> list[Passage]:
    """The stored neighbours of a chunk, nearest first; none if the corpus has none yet."""
    if not corpus.manifest.is_complete("neighbours"):
        return []
    database = open_database(corpus)
    ids = corpus.neighbours.between(chunk, chunk + 1)[0]
    distances = corpus.distances.between(chunk, chunk + 1)[0]
    return [read_passage(database, int(i), float(d)) for i, d in zip(ids, distances, strict=True) if i >= 0]


def inspect_text(corpus: Corpus, chunks: Sequence[int]) -> str:
    """Chunks with their neighbours, for a terminal."""
    return "\n\n".join(_as_text(read_passage(corpus, c), read_neighbours(corpus, c)) for c in chunks)


def inspect_page(corpus: Corpus, chunks: Sequence[int], path: str | Path) -> Path:
    """Chunks with their neighbours, as one HTML file at `path`."""
    body = paragraph(_ABOUT.format(corpus.chunk_size)) + table(list(corpus.manifest.counts.items()))
    for chunk in chunks:
        own = read_passage(corpus, chunk)
        follows = f" ... {own.continuation}" if own.continuation else ""
        body += heading(f"Chunk {chunk:,} of {own.document}") + paragraph(own.text + follows)
        rows = [[p.distance, p.chunk, p.document, p.text, p.continuation] for p in read_neighbours(corpus, chunk)]
        body += table(rows, ("distance", "chunk", "document", "neighbour", "what follows it")) if rows else ""
    page(f"{corpus.folder.name}: chunks and their neighbours", body, path)
    return Path(path)


def _as_text(own: Passage, neighbours: Sequence[Passage]) -> str:
    lines = [f"chunk {own.chunk} of {own.document}", f"  {_one_line(own.text)}"]
    for passage in neighbours:
        lines.append(f"distance {passage.distance:.4g}: chunk {passage.chunk} of {passage.document}")
        lines.append(f"  {_one_line(passage.text)}")
        if passage.continuation:
            lines.append(f"  ... {_one_line(passage.continuation)}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
