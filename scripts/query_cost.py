"""Estimate what queries will cost on a DuckDB database, from their plans; nothing is run.

graft-query-cost MODEL warehouse.duckdb --sql "SELECT count(*) FROM orders" --picture plan.png
graft-query-cost MODEL --train 8 --queries 200
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.atomic_files import new_folder
from graft.scripts.exit_codes import exit_code

if TYPE_CHECKING:
    from graft.modeling.query_graph.modeling_query_graph import QueryGraphForCostEstimation

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="graft-query-cost", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", help="folder or id of a QueryGraphForCostEstimation; a new folder for --train")
    parser.add_argument("database", nargs="?", type=Path, help="a DuckDB file, opened for reading only")
    parser.add_argument("--sql", help="the query")
    parser.add_argument("--picture", type=Path, help="draw the plan here (png, svg or pdf)")
    parser.add_argument("--train", type=int, metavar="DATABASES", help="train a new model on generated databases")
    parser.add_argument("--queries", type=int, default=200, help="of each generated database")
    parser.add_argument("--largest", type=int, default=300_000, help="rows of a generated table at most")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the measured plans")
    given = parser.parse_args(argv)
    if given.train is None and (given.database is None or given.sql is None):
        parser.error("give a database and --sql, or --train")
    if given.train is not None and (given.database is not None or given.sql is not None):
        parser.error("--train makes a model; give no database and no --sql with it")
    if any(value is not None and value < 1 for value in (given.train, given.queries, given.epochs)):
        parser.error("--train, --queries and --epochs must be at least 1")
    return given


def predict_milliseconds(
    model: QueryGraphForCostEstimation, sql: str, connection: Any, picture: Path | None = None
) -> float:
    """The estimated time of a query on an open DuckDB connection, which plans it and does not run it.

    Args:
        picture: where to draw the plan.

    Raises:
        ValueError: DuckDB cannot plan the query.
    """
    from graft.graphs.query_plan.measured_plans import explain_duckdb
    from graft.graphs.query_plan.plan_picture import draw_plan
    from graft.trainer.query_cost_training import estimate_milliseconds

    graph = explain_duckdb(connection, sql)
    [milliseconds] = estimate_milliseconds(model, [graph])
    if picture is not None:
        draw_plan(graph, picture, f"{milliseconds:.3g} ms estimated")
    return milliseconds


def train_on_generated(databases: int, queries: int, largest: int, epochs: int) -> QueryGraphForCostEstimation:
    """A model of generated databases, measured on this machine."""
    import duckdb

    from graft import QueryGraphConfig, QueryGraphForCostEstimation
    from graft.graphs.query_plan.database_generator import generate_database, generate_queries
    from graft.graphs.query_plan.measured_plans import measure_duckdb
    from graft.trainer.query_cost_training import train_query_cost

    plans = []
    for seed in range(databases):
        database = generate_database(seed, largest)
        with duckdb.connect() as connection:
            database.create(connection)
            plans += measure_duckdb(connection, generate_queries(database, queries))
        logger.info("%d of %d databases measured, %d plans", seed + 1, databases, len(plans))
    model = QueryGraphForCostEstimation(QueryGraphConfig())
    losses = train_query_cost(model, plans, epochs)
    logger.info("Mean |log q-error| of the last epoch: %.3f", losses[-1])
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate or train; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-query-cost", lambda: _train(given) if given.train is not None else _tell(given))


def _train(given: argparse.Namespace) -> None:
    with new_folder(given.model) as folder:  # refused before the work where something is there
        train_on_generated(given.train, given.queries, given.largest, given.epochs).save_pretrained(folder)


def _tell(given: argparse.Namespace) -> None:
    print(json.dumps({"milliseconds": _estimate(given)}))


def _estimate(given: argparse.Namespace) -> float:
    import duckdb
    from transformers import AutoConfig

    from graft import QueryGraphConfig, QueryGraphForCostEstimation

    if not given.database.is_file():
        raise ValueError(f"`database` must be a DuckDB file, got {given.database}, which is none.")
    found = AutoConfig.from_pretrained(given.model).model_type
    if found != QueryGraphConfig.model_type:  # other weights would all be left out, and what is left is a guess
        raise ValueError(f"`model` {given.model} must be one that --train made, got a {found}.")
    model = QueryGraphForCostEstimation.from_pretrained(given.model).eval()
    try:
        connection = duckdb.connect(str(given.database), read_only=True)
    except duckdb.Error as error:
        raise ValueError(f"`database` {given.database} cannot be opened: {error}") from error
    with connection:
        return predict_milliseconds(model, given.sql, connection, given.picture)


if __name__ == "__main__":
    raise SystemExit(main())
