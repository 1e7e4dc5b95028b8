"""What a database knows about its tables, reduced to what means the same on every database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_COLUMN_KINDS = (
    ("boolean", ("BOOL",)),
    ("date", ("DATE", "TIME", "INTERVAL")),
    ("float", ("FLOAT", "DOUBLE", "REAL", "DECIMAL", "NUMERIC")),
    ("text", ("CHAR", "TEXT", "STRING", "BLOB", "BYTEA")),
    ("integer", ("INT", "SERIAL")),
)


@dataclass(frozen=True)
class ColumnFacts:
    """Kind of a column (one of COLUMN_KINDS), number of different values, share of NULLs."""

    kind: str
    distinct: float = 0.0
    null_share: float = 0.0


@dataclass(frozen=True)
class TableFacts:
    """Rows of a table, and its columns by name. Names find columns; no feature is made of them."""

    rows: float
    columns: Mapping[str, ColumnFacts] = field(default_factory=dict)


Catalogue = Mapping[str, TableFacts]


def column_kind(data_type: str) -> str:
    """One of COLUMN_KINDS for a type as SQL writes it; nested types are "other_type"."""
    word = data_type.upper()
    if not any(mark in word for mark in ("[", "STRUCT", "MAP", "UNION")):
        for kind, parts in _COLUMN_KINDS:
            if any(part in word for part in parts):
                return kind
    return "other_type"


def read_duckdb_catalogue(connection: Any) -> dict[str, TableFacts]:
    """Facts of every base table that a DuckDB connection sees, by `database.schema.table`; scans each table once.

    Args:
        connection: an open `duckdb.DuckDBPyConnection`.
    """
    described: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    listing = (
        "SELECT c.database_name, c.schema_name, c.table_name, c.column_name, c.data_type FROM duckdb_columns() c "
        "JOIN duckdb_tables() t USING (database_name, schema_name, table_name) WHERE NOT c.internal "
        "ORDER BY ALL"
    )
    for *table, column, data_type in connection.execute(listing).fetchall():
        described.setdefault((table[0], table[1], table[2]), []).append((column, data_type))
    return {".".join(table): _facts(connection, table, columns) for table, columns in described.items()}


def _facts(connection: Any, table: tuple[str, ...], columns: list[tuple[str, str]]) -> TableFacts:
    measures = ", ".join(f"approx_count_distinct({_quoted(name)}), count({_quoted(name)})" for name, _ in columns)
    source = ".".join(_quoted(part) for part in table)
    rows, *counts = connection.execute(f"SELECT count(*), {measures} FROM {source}").fetchone()
    return TableFacts(
        float(rows),
        {
            name: ColumnFacts(column_kind(data_type), float(distinct), 1 - present / rows if rows else 0.0)
            for (name, data_type), distinct, present in zip(columns, counts[::2], counts[1::2], strict=True)
        },
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def find_table(catalogue: Catalogue, name: str) -> TableFacts | None:
    """The table of that name, or the only one whose name ends as it does; None where there is none."""
    if name in catalogue:
        return catalogue[name]
    last = name.rpartition(".")[2]
    alike = [facts for known, facts in catalogue.items() if known.rpartition(".")[2] == last]
    return alike[0] if len(alike) == 1 else None


_POSTGRES_FACTS = """
SELECT n.nspname, c.relname, c.reltuples, a.attname, format_type(a.atttypid, a.atttypmod),
    coalesce(s.n_distinct, 0), coalesce(s.null_frac, 0)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_stats s ON (s.schemaname, s.tablename, s.attname) = (n.nspname, c.relname, a.attname)
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2, a.attnum
"""


def read_postgres_catalogue(connection: Any) -> dict[str, TableFacts]:
    """Facts of every table of a PostgreSQL database, by `schema.table`, from what ANALYZE left; scans nothing.

    Args:
        connection: an open connection whose `execute(sql).fetchall()` gives rows, such as psycopg's.
    """
    rows_of: dict[str, float] = {}
    columns_of: dict[str, dict[str, ColumnFacts]] = {}
    for schema, table, rows, column, data_type, distinct, null_share in connection.execute(_POSTGRES_FACTS).fetchall():
        name = f"{schema}.{table}"
        rows_of[name] = max(float(rows), 0.0)  # -1: never analysed
        # Below 0 it is a share of the rows.
        count = float(distinct) if float(distinct) >= 0 else -float(distinct) * rows_of[name]
        columns_of.setdefault(name, {})[column] = ColumnFacts(column_kind(data_type), count, float(null_share))
    return {name: TableFacts(rows, columns_of[name]) for name, rows in rows_of.items()}
