"""Q-errors of the zero-shot cost model and of what it must beat, on databases that were not trained on.

python benchmarks/query_graph.py --databases 8 --queries 300 --repeats 5 --times runs/query_times

Each generated database is left out once; a schema shaped like TPC-H, with queries of its own, is estimated by a model
of all generated ones, and by one of those of their queries that have no subquery. Times are the least of several on
one thread, by the processor's clock, so that a busy machine disturbs them little. `--times` keeps those of each
database in a folder and takes none again that is there. With `--measure 0 1 2` only these databases are measured (8
is the TPC-H shape), and of times that are there the lesser is kept: for several sittings, or while the machine is
quiet. Prints a JSON line per database, then the table, and keeps benchmarks/results/query_graph.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np
import torch
from measuring import keep, machine

from graft import QueryGraphConfig, QueryGraphForCostEstimation
from graft.configuration.configuration_query_graph import NODE_FEATURES
from graft.graphs.query_plan.catalogue import read_duckdb_catalogue
from graft.graphs.query_plan.cost_baselines import boosted_features, nearest_plans, q_errors, scaled_cost
from graft.graphs.query_plan.database_generator import generate_database, generate_queries
from graft.graphs.query_plan.measured_plans import MeasuredPlan, explain_duckdb, measure_duckdb
from graft.trainer.query_cost_training import estimate_milliseconds, train_query_cost

# Shaped like TPC-H: the same tables and links, our own values.
TPCH_TABLES = """
CREATE TABLE customer AS SELECT range AS c_custkey, (hash(range) % 25)::INT AS c_nationkey,
    ['AUTOMOBILE', 'BUILDING', 'FURNITURE', 'HOUSEHOLD', 'MACHINERY'][1 + (hash(range + 7) % 5)::INT] AS c_mktsegment,
    (hash(range + 3) % 1000000) / 100.0 AS c_acctbal FROM range(7500);
CREATE TABLE orders AS SELECT range AS o_orderkey, (hash(range + 11) % 7500)::INT AS o_custkey,
    DATE '1992-01-01' + (hash(range + 5) % 2400)::INT AS o_orderdate,
    (hash(range + 9) % 50000000) / 100.0 AS o_totalprice,
    ['1-URGENT', '2-HIGH', '3-MEDIUM', '4-NOT SPECIFIED', '5-LOW'][1 + (hash(range + 2) % 5)::INT] AS o_orderpriority
    FROM range(75000);
CREATE TABLE part AS SELECT range AS p_partkey, 'Brand#' || (hash(range) % 25) AS p_brand,
    (hash(range + 1) % 50)::INT AS p_size, 'part number ' || range AS p_name FROM range(10000);
CREATE TABLE lineitem AS SELECT (range // 4) AS l_orderkey, (hash(range + 13) % 10000)::INT AS l_partkey,
    (1 + hash(range + 17) % 50)::INT AS l_quantity, (hash(range + 19) % 10000000) / 100.0 AS l_extendedprice,
    (hash(range + 23) % 11) / 100.0 AS l_discount, DATE '1992-01-01' + (hash(range + 29) % 2500)::INT AS l_shipdate,
    ['A', 'N', 'R'][1 + (hash(range + 31) % 3)::INT] AS l_returnflag FROM range(300000);
"""
TPCH_QUERIES = (
    "SELECT l_returnflag, sum(l_quantity), sum(l_extendedprice), avg(l_discount), count(*) FROM lineitem "
    "WHERE l_shipdate < DATE '1998-09-02' - {days} GROUP BY l_returnflag ORDER BY l_returnflag",
    "SELECT l_orderkey, sum(l_extendedprice * (1 - l_discount)) revenue, o_orderdate FROM customer "
    "JOIN orders ON c_custkey = o_custkey JOIN lineitem ON l_orderkey = o_orderkey WHERE c_mktsegment = 'BUILDING' "
    "AND o_orderdate < DATE '1995-03-15' + {days} GROUP BY ALL ORDER BY revenue DESC LIMIT 10",
    "SELECT o_orderpriority, count(*) FROM orders WHERE o_orderdate > DATE '1993-07-01' + {days} "
    "AND EXISTS (SELECT * FROM lineitem WHERE l_orderkey = o_orderkey AND l_quantity > 30) GROUP BY o_orderpriority",
    "SELECT sum(l_extendedprice * l_discount) FROM lineitem WHERE l_shipdate > DATE '1994-01-01' + {days} "
    "AND l_discount BETWEEN 0.05 AND 0.07 AND l_quantity < 24",
    "SELECT sum(l_extendedprice) / 7.0 FROM lineitem JOIN part ON p_partkey = l_partkey "
    "WHERE p_brand = 'Brand#{brand}'",
    "SELECT p_brand, count(*) FROM part WHERE p_name LIKE '%{brand}%' AND p_size < 30 "
    "GROUP BY p_brand ORDER BY 2 DESC",
    "SELECT c_nationkey, sum(o_totalprice) FROM customer LEFT JOIN orders ON c_custkey = o_custkey "
    "WHERE c_acctbal > {days} GROUP BY c_nationkey ORDER BY 2 DESC",
    "SELECT o_orderkey, sum(l_quantity) q FROM orders JOIN lineitem ON o_orderkey = l_orderkey "
    "WHERE o_totalprice > 100000 + {days} GROUP BY o_orderkey HAVING sum(l_quantity) > 150 ORDER BY q DESC LIMIT 100",
)


def measure_generated(seed: int, given: argparse.Namespace) -> list[MeasuredPlan]:
    """Plans and times of one generated database."""
    database = generate_database(seed, given.largest)
    queries = list(generate_queries(database, given.queries))
    return measured_once(seed, database.create, queries, given)


def measure_tpch(given: argparse.Namespace) -> list[MeasuredPlan]:
    """Plans and times of the schema shaped like TPC-H; each query with five values."""
    queries = [text.format(days=100 * turn, brand=3 + 4 * turn) for text in TPCH_QUERIES for turn in range(5)]
    return measured_once(given.databases, lambda connection: connection.execute(TPCH_TABLES), queries, given)


def measured_once(
    number: int, create: Callable[[duckdb.DuckDBPyConnection], object], queries: list[str], given: argparse.Namespace
) -> list[MeasuredPlan]:
    """Plans of the queries with their times; those in the folder are not taken again, unless --measure asks for it."""
    kept = given.times / f"{number}.json" if given.times is not None else None
    known = json.loads(kept.read_text()) if kept is not None and kept.exists() else None
    if known is not None and list(known["milliseconds"]) != list(dict.fromkeys(queries)):
        raise SystemExit(f"{kept} holds times of other queries; name a new folder.")
    with duckdb.connect() as connection:
        create(connection)
        if known is not None and given.measure is None:
            connection.execute("SET threads = 1")
            catalogue = read_duckdb_catalogue(connection)
            graphs = [explain_duckdb(connection, sql, catalogue) for sql in queries]
            return [
                MeasuredPlan(sql, graph, known["milliseconds"][sql])
                for sql, graph in zip(queries, graphs, strict=True)
            ]
        plans = measure_duckdb(connection, queries, given.repeats)
    if kept is not None:
        runs, least = (known["runs"], known["milliseconds"]) if known is not None else (0, {})
        for plan in plans:
            least[plan.sql] = min(plan.milliseconds, least.get(plan.sql, plan.milliseconds))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"runs": runs + given.repeats, "milliseconds": least}))
    return plans


def semi_joins(plans: Sequence[MeasuredPlan]) -> int:
    """How many of the plans have a semi join of a subquery; by itself DuckDB makes one of row ids for a LIMIT."""
    semi = NODE_FEATURES["operator"].index("semi")
    asked = [plan.graph for plan in plans if "(SELECT" in plan.sql]
    return sum(bool(graph.features[graph.node_types == 0, semi].any()) for graph in asked)


def compare(name: str, train: Sequence[MeasuredPlan], test: Sequence[MeasuredPlan], epochs: int) -> dict[str, object]:
    """Median, 95th percentile and largest q-error of every method on one database."""
    torch.manual_seed(0)
    model = QueryGraphForCostEstimation(QueryGraphConfig())
    train_query_cost(model, train, epochs)
    graphs = [plan.graph for plan in test]
    times = [plan.milliseconds for plan in test]
    predicted = {
        "graph": estimate_milliseconds(model, graphs),
        "scaled": scaled_cost(train, graphs),
        "oracle": scaled_cost(test, graphs),
        "boosting": boosted_features(train, graphs),
        "nearest": nearest_plans(train, graphs),
    }
    errors = {method: q_errors(of_method, times) for method, of_method in predicted.items()}
    rows = {method: [round(float(q), 2) for q in np.percentile(e, [50, 95, 100])] for method, e in errors.items()}
    return {"database": name, "queries": len(test), "semi_joins": semi_joins(test), **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--databases", type=int, default=8)
    parser.add_argument("--queries", type=int, default=300, help="of each database")
    parser.add_argument("--repeats", type=int, default=5, help="of each query; the least time counts")
    parser.add_argument("--largest", type=int, default=500_000, help="rows of a table at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--times", type=Path, help="folder that keeps what was measured")
    parser.add_argument("--measure", type=int, nargs="+", metavar="DATABASE", help="only measure these")
    given = parser.parse_args()
    if given.measure is not None and given.times is None:
        parser.error("--measure needs a folder to measure into: give --times")
    torch.set_num_threads(1)
    if given.measure is not None:
        for number in given.measure:
            measure_tpch(given) if number == given.databases else measure_generated(number, given)
        return
    about = machine()
    measured = [measure_generated(seed, given) for seed in range(given.databases)]
    results = []
    for left_out, test in enumerate(measured):
        train = [plan for number, plans in enumerate(measured) if number != left_out for plan in plans]
        results.append(compare(f"generated {left_out}", train, test, given.epochs))
        print(json.dumps(results[-1]), flush=True)
    generated = [plan for plans in measured for plan in plans]
    without = [plan for plan in generated if "(SELECT" not in plan.sql]
    tpch = measure_tpch(given)
    for name, train in (("TPC-H shape", generated), ("TPC-H shape, trained without subqueries", without)):
        results.append(compare(name, train, tpch, given.epochs))
        print(json.dumps(results[-1]), flush=True)
    methods = ("graph", "scaled", "oracle", "boosting", "nearest")
    print("| database | " + " | ".join(methods) + " |\n|---|" + "---|" * len(methods))
    for row in results:
        print(f"| {row['database']} | " + " | ".join("{} / {} / {}".format(*row[method]) for method in methods) + " |")
    settings = {name: value for name, value in vars(given).items() if name not in ("times", "measure")}
    print(keep("query_graph", settings | {"duckdb": duckdb.__version__}, results, about))


if __name__ == "__main__":
    main()
