"""Plans of queries that were run, with the time they took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import process_time
from typing import Any

from graft.graphs.query_plan.catalogue import Catalogue, read_duckdb_catalogue
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph


@dataclass(frozen=True, eq=False)
class MeasuredPlan:
    """A query, its plan as a graph, and the milliseconds of the processor that it took."""

    sql: str
    graph: QueryPlanGraph
    milliseconds: float


def explain_duckdb(connection: Any, sql: str, catalogue: Catalogue | None = None) -> QueryPlanGraph:
    """The plan of a query as a graph; the query is not run.

    Args:
        connection: an open `duckdb.DuckDBPyConnection`.
        catalogue: facts of its tables; None reads them, which scans every table.

    Raises:
        ValueError: DuckDB cannot plan the query; its message is told.
    """
    import duckdb

    facts = read_duckdb_catalogue(connection) if catalogue is None else catalogue
    try:
        rows = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchall()
    except duckdb.Error as error:
        raise ValueError(f"DuckDB cannot plan {sql!r}: {error}") from error
    return QueryPlanGraph.from_duckdb(rows[-1][1], facts)


def measure_duckdb(connection: Any, queries: Iterable[str], repeats: int = 3) -> list[MeasuredPlan]:
    """Plan each query, run it on one thread, and keep the least time, its result fetched.

    It is the processor's time of this process: on an idle machine within 1 % of the clock's for tables in memory, and
    on a busy one still the query's own. Waiting for a disk does not count; other threads of the process do.
    The connection is left with `threads = 1`.

    Raises:
        ValueError: `repeats` is below 1, or DuckDB cannot plan a query.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    connection.execute("SET threads = 1")
    catalogue = read_duckdb_catalogue(connection)
    return [
        MeasuredPlan(
            sql, explain_duckdb(connection, sql, catalogue), min(_run(connection, sql) for _ in range(repeats))
        )
        for sql in queries
    ]


def _run(connection: Any, sql: str) -> float:
    begin = process_time()
    connection.execute(sql).fetchall()
    return 1000 * (process_time() - begin)
