"""Chunks to read: of a chunked data set, of lines of JSON, of a Parquet file, or of a folder of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from graft.graphs.knowledge_graph.mentions import TextChunk, sentence_spans
from graft.text_files import TEXT_SUFFIXES, read_utf8, text_files


def chunks_of_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[TextChunk]:
    """Rows with `raw_text_chunks`, `document_id`, `chunk_index` (and `chunk_start`), as `chunk_dataset` gives them."""
    for row in rows:
        missing = [name for name in ("raw_text_chunks", "document_id", "chunk_index") if name not in row]
        if missing:
            raise ValueError(
                f"A row of chunks lacks {missing}; chunk with capture_raw_text=True. It has {sorted(row)}."
            )
        start = int(row.get("chunk_start", 0))
        yield TextChunk(str(row["document_id"]), int(row["chunk_index"]), str(row["raw_text_chunks"]), start)


def chunks_of_text(document: str, text: str, length: int = 2000) -> Iterator[TextChunk]:
    """Cut a text at ends of sentences into chunks of at most `length` characters; they tile it.

    A sentence longer than that is cut within.
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}.")
    cuts: list[int] = []
    for start, end in sentence_spans(text):
        cuts.extend(range(start + length, end, length))
        cuts.append(end)
    borders = _filled(cuts, len(text), length)
    for index, (left, right) in enumerate(zip(borders, borders[1:], strict=False)):
        yield TextChunk(document, index, text[left:right], left)


def _filled(cuts: list[int], end: int, length: int) -> list[int]:
    """The fewest of the allowed cuts so that no piece exceeds `length`."""
    borders, previous = [0], 0
    for cut in [*cuts, end]:
        if cut - borders[-1] > length:
            borders.append(previous)
        previous = cut
    return borders + [end] if end > borders[-1] else borders


def read_chunks(source: str | Path, text_field: str = "text", length: int = 2000) -> list[TextChunk]:
    """All chunks of a folder of text, of a .jsonl or .parquet file, or of a data set that was saved to disk.

    Rows with `raw_text_chunks` are chunks already; others are documents in `text_field`, named by `id` or number.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it holds no text, or rows lack the field; names it.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"There is nothing at {source}.")
    if source.is_dir() and not (source / "dataset_info.json").exists():
        chunks = _chunks_of_folder(source, length)
    else:
        chunks = list(_chunks_of_any(_rows(source), text_field, length))
    if not chunks:
        raise ValueError(f"{source} holds no text; a folder is read for {', '.join(TEXT_SUFFIXES)}.")
    return chunks


def _chunks_of_folder(folder: Path, length: int) -> list[TextChunk]:
    return [
        chunk
        for path in text_files(folder)
        for chunk in chunks_of_text(path.relative_to(folder).as_posix(), read_utf8(path), length)
    ]


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    if source.is_dir():
        from datasets import Dataset

        yield from Dataset.load_from_disk(str(source))
    elif source.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(source).to_pylist()
    elif source.suffix == ".jsonl":
        yield from _objects(source)
    elif source.suffix.lower() in TEXT_SUFFIXES:
        yield {"id": source.name, "text": read_utf8(source)}
    else:
        raise ValueError(f"{source} must be a folder, .jsonl, .parquet, or one of {', '.join(TEXT_SUFFIXES)}.")


def _objects(source: Path) -> Iterator[Mapping[str, Any]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # an error of decoding is a ValueError too
            except ValueError as error:
                raise ValueError(f"{source}, line {number}: expected a JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{source}, line {number}: expected a JSON object, got {type(row).__name__}.")
            yield row


def _chunks_of_any(rows: Iterable[Mapping[str, Any]], text_field: str, length: int) -> Iterator[TextChunk]:
    for number, row in enumerate(rows):
        if "raw_text_chunks" in row:
            yield from chunks_of_rows([row])
        elif isinstance(row.get(text_field), str):
            yield from chunks_of_text(str(row.get("id", number)), row[text_field], length)
        else:
            raise ValueError(f"Row {number} has no text in {text_field!r}; it has {sorted(row)}.")
