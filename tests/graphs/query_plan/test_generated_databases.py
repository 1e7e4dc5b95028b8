import html
import re
from collections import Counter

import numpy as np
import pytest

from graft.configuration.configuration_query_graph import JOIN_TYPES, NODE_FEATURES, PLAN_OPERATORS
from graft.graphs.query_plan.cost_baselines import (
    boosted_features,
    flat_features,
    nearest_plans,
    q_errors,
    rows_of_plan,
    scaled_cost,
)
from graft.graphs.query_plan.database_generator import generate_database, generate_queries
from graft.graphs.query_plan.measured_plans import MeasuredPlan, explain_duckdb, measure_duckdb
from graft.graphs.query_plan.plan_operator import PlanOperator
from graft.graphs.query_plan.plan_picture import draw_plan, tree_places
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

duckdb = pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def plans():
    database = generate_database(3, 2000)
    with duckdb.connect() as connection:
        database.create(connection)
        return measure_duckdb(connection, generate_queries(database, 40), repeats=1)


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_has_the_sizes_that_are_promised(seed):
    database = generate_database(seed, 5000)
    assert database == generate_database(seed, 5000)
    assert 3 <= len(database.tables) <= 6
    with duckdb.connect() as connection:
        database.create(connection)
        for place, table in enumerate(database.tables):
            assert 1000 <= table.rows <= 5000
            assert set(table.parents) <= {earlier.name for earlier in database.tables[:place]}
            assert connection.execute(f"SELECT count(*) FROM {table.name}").fetchone() == (table.rows,)
            for parent in table.parents:
                lost = f"SELECT count(*) FROM {table.name} WHERE {parent}_id NOT IN (SELECT id FROM {parent})"
                assert connection.execute(lost).fetchone() == (0,)
            types = dict(connection.execute(f"SELECT name, type FROM pragma_table_info('{table.name}')").fetchall())
            assert tuple(types[f"{parent}_id"] for parent in table.parents) == table.key_types


def test_every_query_runs_and_no_operator_is_unknown(plans):
    assert len({plan.sql for plan in plans}) > 35
    assert all(plan.milliseconds > 0 for plan in plans)
    joins = [plan.sql.count(" JOIN ") for plan in plans]
    assert min(joins) == 0
    assert 1 <= max(joins) <= 3
    kinds = PLAN_OPERATORS.index("other")
    assert not any(plan.graph.features[plan.graph.node_types == 0, kinds].any() for plan in plans)


def test_the_same_seed_gives_the_same_queries():
    database = generate_database(1)
    assert list(generate_queries(database, 5)) == list(generate_queries(database, 5))
    assert list(generate_queries(database, 5)) != list(generate_queries(database, 5, seed=1))


# As DuckDB names joins, and what they are here.
NAMES = {
    **dict.fromkeys(("SEMI", "RIGHT_SEMI"), "semi"),
    **dict.fromkeys(("ANTI", "RIGHT_ANTI"), "anti"),
    **dict.fromkeys(("LEFT", "RIGHT"), "outer"),
    "INNER": "inner",
    "MARK": "other_join",
}


def test_queries_have_semi_and_anti_joins_as_duckdb_names_them():
    names = Counter()
    for seed in range(4):
        database = generate_database(seed, 2000)
        with duckdb.connect() as connection:
            database.create(connection)
            for sql in generate_queries(database, 150):
                plan = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()[1]
                of_plan = Counter(re.findall(r'"Join Type": "(\w+)"', plan))
                if "(SELECT" in sql:  # by itself DuckDB makes one of row ids for a LIMIT
                    names += of_plan
                flat = flat_features(QueryPlanGraph.from_duckdb(plan))
                seen = dict(zip(NODE_FEATURES["operator"], flat, strict=False))  # the sums over operators come first
                told = Counter(kind for name in of_plan.elements() for kind in [NAMES[name]])
                assert {kind: seen[kind] for kind in JOIN_TYPES} == {kind: told[kind] for kind in JOIN_TYPES}, sql
                connection.execute(sql)
    assert min(names["SEMI"], names["RIGHT_SEMI"]) > 30
    assert names["ANTI"] + names["RIGHT_ANTI"] > 0


@pytest.mark.parametrize(("key_type", "join"), [("BIGINT", "SEMI"), ("INTEGER", "MARK")])
def test_a_narrower_foreign_key_costs_exists_its_semi_join(key_type, join):
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE parent AS SELECT range AS id FROM range(2000)")
        connection.execute(f"CREATE TABLE child AS SELECT (range % 999)::{key_type} AS parent_id FROM range(9000)")
        sql = "SELECT count(*) FROM parent WHERE EXISTS (SELECT * FROM child WHERE parent_id = id AND parent_id > 9)"
        assert f'{join}"' in connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()[1]


def test_flat_features_tell_a_semi_join_from_an_inner_one():
    scans = (PlanOperator("scan", "s", 100.0), PlanOperator("scan", "s", 20.0))
    joins = [PlanOperator("hash_join", "j", 7.0, scans, join_type=kind) for kind in ("inner", "semi")]
    inner, semi = (flat_features(QueryPlanGraph.from_operators(join)) for join in joins)
    places = [NODE_FEATURES["operator"].index(kind) for kind in ("inner", "semi")]
    assert (semi - inner)[places].tolist() == [-1, 1]


def test_a_query_that_cannot_be_planned_says_why():
    with duckdb.connect() as connection, pytest.raises(ValueError, match="cannot plan 'SELECT nothing'.*nothing"):
        explain_duckdb(connection, "SELECT nothing")


def test_rows_of_a_plan_are_those_of_its_operators():
    scans = (PlanOperator("scan", "s", 100.0), PlanOperator("scan", "s", 20.0))
    graph = QueryPlanGraph.from_operators(PlanOperator("hash_join", "j", 7.0, scans))
    assert rows_of_plan(graph) == pytest.approx(127.0, rel=1e-5)


def test_a_power_law_is_found_by_the_scaled_cost():
    graphs = [QueryPlanGraph.from_operators(PlanOperator("scan", "s", 10.0**power)) for power in range(1, 6)]
    known = [MeasuredPlan("", graph, 0.3 * (1 + rows_of_plan(graph)) ** 0.7) for graph in graphs]
    predicted = scaled_cost(known[:3], graphs)
    assert q_errors(predicted, [plan.milliseconds for plan in known]).max() == pytest.approx(1.0, abs=1e-3)


def test_the_nearest_plan_of_a_plan_is_itself(plans):
    graphs = [plan.graph for plan in plans]
    distinct = {graph.features.numpy().tobytes(): plan for graph, plan in zip(graphs, plans, strict=True)}
    some = list(distinct.values())
    predicted = nearest_plans(some, [plan.graph for plan in some], neighbours=1)
    assert np.median(q_errors(predicted, [plan.milliseconds for plan in some])) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="`neighbours` must lie in"):
        nearest_plans(plans, graphs, neighbours=41)


def test_boosting_is_better_than_one_number(plans):
    pytest.importorskip("sklearn")
    times = [plan.milliseconds for plan in plans]
    predicted = boosted_features(plans * 3, [plan.graph for plan in plans])
    assert np.log(q_errors(predicted, times)).mean() < np.abs(np.log(times) - np.median(np.log(times))).mean()


def test_q_errors_know_no_direction():
    assert q_errors([1.0, 4.0, 3.0], [2.0, 2.0, 3.0]).tolist() == [2.0, 2.0, 1.0]


def test_boxes_of_a_drawn_plan_are_clear_of_each_other_and_below_their_readers(plans):
    for graph in (plan.graph for plan in plans):
        places = tree_places(graph)
        for source, target in graph.edges.T.tolist():
            assert places[source][1] < places[target][1]
        for level in {y for _, y, _ in places}:
            boxes = sorted((x - width / 2, x + width / 2) for x, y, width in places if y == level)
            assert all(left - right > 3.9 for (_, right), (left, _) in zip(boxes, boxes[1:], strict=False))


def test_a_picture_of_a_plan_names_its_nodes_and_says_what_colours_and_lines_mean(plans, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    graph = max((plan.graph for plan in plans), key=lambda graph: len(graph.names))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = draw_plan(graph, tmp_path / "plan.svg", "1 ms").read_text()
    expected = ("1 ms", "operator, rows expected", "table", "column", "gives its rows to", "is read or compared by")
    for text in (*expected, *(name.split("(")[0][:20] for name in graph.names)):
        assert html.escape(text, quote=False) in drawn
