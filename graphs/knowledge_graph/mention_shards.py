"""Mentions of a corpus in shards on disk: after a kill, only the shards that are not there yet are read again.

A shard is one Parquet file that is whole or absent. It carries the digest of the extractor's name and of its chunks,
so a changed text or option makes it anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graft.atomic_files import new_file
from graft.graphs.knowledge_graph.entity_extractors import Extractor, extractor_by_name
from graft.graphs.knowledge_graph.mentions import PlacedMention, TextChunk, place

SHARD = 1000  # chunks
_FORMAT = "graft mentions 1"
_TYPES = {"str": pa.string(), "int": pa.int64()}
SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(PlacedMention)])


@dataclass(frozen=True)
class ExtractorChoice:
    """An extractor by name, which other processes can make too."""

    name: str = "keyphrase"
    labels: tuple[str, ...] = ()

    def make(self) -> Extractor:
        return extractor_by_name(self.name, self.labels)

    def identity(self) -> str:
        """What a shard depends on besides its texts; a gazetteer counts by content."""
        kind, _, argument = self.name.partition(":")
        content = hashlib.sha256(Path(argument).read_bytes()).hexdigest() if kind == "gazetteer" else ""
        return json.dumps([_FORMAT, self.name, self.labels, content])


def extract_mentions(
    chunks: Sequence[TextChunk], folder: str | Path, choice: ExtractorChoice, workers: int = 1, shard: int = SHARD
) -> Iterator[tuple[int, int]]:
    """Write the shards that `folder` lacks; yields (shards that stand, shards in all) as they come to stand.

    Raises:
        ValueError: `workers` or `shard` is below 1.
        ImportError, OSError: as `extractor_by_name`, before anything is written.
    """
    for name, value in (("workers", workers), ("shard", shard)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    extractor = choice.make()
    parts = [chunks[first : first + shard] for first in range(0, len(chunks), shard)]
    paths = [shard_path(folder, number) for number in range(len(parts))]
    digests = [_digest(choice.identity(), part) for part in parts]
    missing = [number for number, path in enumerate(paths) if _stored_digest(path) != digests[number]]
    done = len(parts) - len(missing)
    yield done, len(parts)
    if workers == 1 or len(missing) < 2:
        for number in missing:
            _write(paths[number], _extract(extractor, parts[number]), digests[number])
            done += 1
            yield done, len(parts)
        return
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
        found = pool.map(_extract_elsewhere, [choice] * len(missing), [parts[number] for number in missing])
        for number, mentions in zip(missing, found, strict=True):
            _write(paths[number], mentions, digests[number])
            done += 1
            yield done, len(parts)


def shard_path(folder: str | Path, number: int) -> Path:
    """Where a shard stands."""
    return Path(folder) / f"mentions-{number:05d}.parquet"


def read_mentions(path: str | Path) -> list[PlacedMention]:
    """The mentions of one Parquet file, in order."""
    table = pq.read_table(path, columns=SCHEMA.names)
    return [PlacedMention(**row) for row in table.to_pylist()]


def mentions_table(mentions: Sequence[PlacedMention]) -> pa.Table:
    """Mentions as a table of Arrow, one a row."""
    columns = zip(*map(astuple, mentions), strict=True) if mentions else [()] * len(SCHEMA)
    return pa.table([pa.array(column, type=kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], SCHEMA)


def _extract(extractor: Extractor, chunks: Sequence[TextChunk]) -> list[PlacedMention]:
    return [mention for chunk in chunks for mention in place(chunk, extractor.extract(chunk.text))]


def _extract_elsewhere(choice: ExtractorChoice, chunks: Sequence[TextChunk]) -> list[PlacedMention]:
    return _extract(choice.make(), chunks)


def _digest(identity: str, chunks: Sequence[TextChunk]) -> str:
    state = hashlib.sha256(identity.encode())
    for chunk in chunks:
        state.update(json.dumps([chunk.document, chunk.index, chunk.start, chunk.text]).encode())
    return state.hexdigest()


def _stored_digest(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return (pq.read_schema(path).metadata or {}).get(b"digest", b"").decode()
    except (OSError, pa.ArrowInvalid):
        return ""  # not ours or damaged: written anew


def _write(path: Path, mentions: Sequence[PlacedMention], digest: str) -> None:
    table = mentions_table(mentions).replace_schema_metadata({"digest": digest})
    with new_file(path) as temporary:
        pq.write_table(table, temporary)
