"""Vectors in a table of PostgreSQL with the extension pgvector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from .vector_engine import Metric, check_metric, check_rows, check_search, empty_answer

_OPERATORS = {"inner_product": ("<#>", "vector_ip_ops"), "l2": ("<->", "vector_l2_ops")}
QUERIES_AT_ONCE = 256


class PostgresEngine:
    """A table (id, embedding) of a database.

    Args:
        conninfo: of libpq, such as "host=... dbname=..." or "postgresql://...".
        table: its name, letters, digits and _.
        index: "exact" reads every row; "hnsw" and "ivfflat" are pgvector's, built by `flush`, up to 2,000 dimensions.
        index_options: of CREATE INDEX, such as {"m": 16, "ef_construction": 64} or {"lists": 1000}.
        settings: of each session, such as {"hnsw.ef_search": 100} or {"ivfflat.probes": 10}.

    Raises:
        ImportError: psycopg is not installed.
        ValueError: a table's name that would need quotes, or an unknown index.
    """

    def __init__(
        self,
        conninfo: str,
        table: str = "graft_vectors",
        index: Literal["exact", "hnsw", "ivfflat"] = "exact",
        index_options: Mapping[str, int] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", table):
            raise ValueError(f"`table` must be made of small letters, digits and _, got {table!r}.")
        if index not in ("exact", "hnsw", "ivfflat"):
            raise ValueError(f'`index` must be "exact", "hnsw" or "ivfflat", got {index!r}.')
        self.connection = _import_psycopg().connect(conninfo, autocommit=True)
        self.table, self.index, self.index_options = table, index, dict(index_options or {})
        for name, value in (settings or {}).items():
            self.connection.execute("SELECT set_config(%s, %s, false)", (name, str(value)))

    def __repr__(self) -> str:
        return f"PostgresEngine(table {self.table}, {self.index})"

    def create(self, dim: int, metric: Metric = "l2") -> None:
        """Begin an empty table; the metric is kept in its comment."""
        check_metric(metric)
        self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self.drop()
        self.connection.execute(
            f"CREATE TABLE {self.table} (id bigint PRIMARY KEY, embedding vector({int(dim)}) NOT NULL)"
        )
        self.connection.execute(f"COMMENT ON TABLE {self.table} IS '{metric}'")

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Copy in, in one transaction."""
        check_rows(ids, vectors, self._shape()[0])
        copying = f"COPY {self.table} (id, embedding) FROM STDIN"
        with self.connection.transaction(), self.connection.cursor() as cursor, cursor.copy(copying) as copy:
            for number, vector in zip(ids.tolist(), vectors, strict=True):
                copy.write_row((number, _literal(vector)))

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See the protocol; one statement for some hundred queries."""
        dim, metric = self._shape()
        check_search(queries, dim, k, exclude)
        scores, ids = empty_answer(len(queries), k, metric)
        ranges = np.zeros((len(queries), 2), np.int64) if exclude is None else exclude
        operator = _OPERATORS[metric][0]
        # Materialized, or the text of a query would be read again for every row of the table.
        statement = f"""
            WITH asked AS MATERIALIZED (
                SELECT row, text::vector({dim}) AS vector, first, stop
                FROM unnest(%s::int[], %s::text[], %s::bigint[], %s::bigint[]) AS given (row, text, first, stop)
            )
            SELECT asked.row, found.id, found.gap FROM asked CROSS JOIN LATERAL (
                SELECT id, embedding {operator} asked.vector AS gap FROM {self.table}
                WHERE id < asked.first OR id >= asked.stop ORDER BY gap LIMIT %s
            ) AS found ORDER BY asked.row, found.gap, found.id"""
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            rows = range(start, min(start + QUERIES_AT_ONCE, len(queries)))
            texts = [_literal(queries[row]) for row in rows]
            firsts, stops = (ranges[rows.start : rows.stop, side].tolist() for side in (0, 1))
            answer = self.connection.execute(statement, (list(rows), texts, firsts, stops, k)).fetchall()
            _fill(scores, ids, answer, metric)
        return scores, ids

    def count(self) -> int:
        """Vectors stored."""
        return int(self.connection.execute(f"SELECT count(*) FROM {self.table}").fetchone()[0])

    def flush(self) -> None:
        """Build the index if there shall be one and none is there, and let the planner know the table."""
        if self.index != "exact":
            kind = _OPERATORS[self._shape()[1]][1]
            options = ", ".join(f"{name} = {int(value)}" for name, value in self.index_options.items())
            self.connection.execute(
                f"CREATE INDEX IF NOT EXISTS {self.table}_{self.index} ON {self.table} "
                f"USING {self.index} (embedding {kind})" + (f" WITH ({options})" if options else "")
            )
        self.connection.execute(f"ANALYZE {self.table}")

    def drop(self) -> None:
        """Drop the table."""
        self.connection.execute(f"DROP TABLE IF EXISTS {self.table}")

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def _shape(self) -> tuple[int, Metric]:
        """Width and metric, read from the catalogue, so that a second client knows them."""
        dim, metric = self.connection.execute(
            "SELECT atttypmod, obj_description(attrelid, 'pg_class') FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attname = 'embedding'",
            (self.table,),
        ).fetchone()
        return dim, metric


def _fill(scores: np.ndarray, ids: np.ndarray, answer: list[tuple[int, int, float]], metric: str) -> None:
    """Put (row, id, gap), sorted by row, into the table of answers; gaps are -inner products or distances."""
    if not answer:
        return
    rows = np.asarray([row for row, _, _ in answer])
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)
    gaps = np.asarray([gap for _, _, gap in answer])
    ids[rows, places] = [number for _, number, _ in answer]
    scores[rows, places] = -gaps if metric == "inner_product" else gaps**2


def _literal(vector: np.ndarray) -> str:
    """As pgvector reads it; nine digits give every float32 back."""
    return "[" + ",".join(f"{value:.9g}" for value in vector.tolist()) + "]"


def _import_psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise ImportError("this engine needs psycopg: pip install graft-transformers[pgvector]") from error
    return psycopg
