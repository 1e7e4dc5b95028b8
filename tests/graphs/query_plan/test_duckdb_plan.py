import json

import pytest

from graft.graphs.query_plan.duckdb_plan import read_duckdb_plan
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

duckdb = pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def connection():
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT range a, range % 10 b, 'x' || range s FROM range(10000)")
        connection.execute("CREATE TABLE u AS SELECT range a, range % 7 c FROM range(1000)")
        yield connection


def plan(connection, sql):
    return connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()[1]


def test_a_real_plan_is_read(connection):
    sql = "SELECT b, count(*), sum(c) FROM t JOIN u USING (a) WHERE b > 3 GROUP BY b ORDER BY 2 LIMIT 3"
    root = read_duckdb_plan(plan(connection, sql))
    operators = list(root.bottom_up())
    kinds = [operator.kind for operator in operators]
    assert (root.kind, root.rows, root.sort_keys) == ("top_n", 3, 1)
    assert kinds.count("scan") == 2
    assert "other" not in kinds
    [join] = [operator for operator in operators if operator.kind == "hash_join"]
    assert (join.join_type, join.predicates) == ("inner", ("a = a",))
    [group] = [operator for operator in operators if operator.kind == "perfect_aggregate"]
    assert (group.groups, group.aggregates) == (1, 2)
    scans = {operator.table: operator for operator in operators if operator.kind == "scan"}
    assert scans["memory.main.u"].rows == 1000
    assert any("b > 3" in text for text in scans["memory.main.t"].predicates)


@pytest.mark.parametrize(
    ("sql", "kind", "join_type"),
    [
        ("SELECT * FROM t WHERE a IN (SELECT a FROM u WHERE c = 2)", "hash_join", "semi"),
        ("SELECT * FROM u WHERE EXISTS (SELECT * FROM t WHERE t.a = u.a AND b < 9)", "hash_join", "semi"),
        ("SELECT * FROM t WHERE NOT EXISTS (SELECT * FROM u WHERE t.a = u.a)", "hash_join", "anti"),
        ("SELECT * FROM t WHERE a NOT IN (SELECT a FROM u)", "hash_join", "other_join"),
        ("SELECT * FROM t LEFT JOIN u USING (a)", "hash_join", "outer"),
        ("SELECT * FROM t JOIN u ON t.s <> u.c::text OR t.a < u.a", "loop_join", "inner"),
        ("SELECT * FROM t, u", "loop_join", "inner"),
        ("SELECT sum(a) FROM t", "plain_aggregate", None),
        ("SELECT s, sum(a) FROM t GROUP BY s", "hash_aggregate", None),
        ("SELECT * FROM t ORDER BY s", "sort", None),
        ("SELECT a FROM t UNION ALL SELECT a FROM u", "union", None),
        ("SELECT row_number() OVER (PARTITION BY b ORDER BY a) FROM t", "window", None),
        ("SELECT * FROM t LIMIT 5", "limit", None),
        ("SELECT * FROM range(5)", "other_scan", None),
    ],
)
def test_operators_of_real_plans(connection, sql, kind, join_type):
    found = [(each.kind, each.join_type) for each in read_duckdb_plan(plan(connection, sql)).bottom_up()]
    assert (kind, join_type) in found or (kind == "other_scan" and "other" in [each for each, _ in found])


def test_text_and_parsed_plan_are_the_same(connection):
    text = plan(connection, "SELECT sum(a) FROM t WHERE s LIKE 'x%1'")
    assert QueryPlanGraph.from_duckdb(text).features.equal(QueryPlanGraph.from_duckdb(json.loads(text)).features)


def test_an_operator_nobody_knows_is_other():
    root = read_duckdb_plan({"name": "TELEPORT", "children": [], "extra_info": {"Estimated Cardinality": "~1,200"}})
    assert (root.kind, root.rows) == ("other", 1200)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "must be a DuckDB plan in JSON"),
        ("[" * 100_000, "JSON|nested too deeply"),
        ([], "must be one DuckDB plan"),
        ({"Plan": {}}, "a `name` and a list of `children`"),
        ({"name": "FILTER", "children": "x"}, "a `name` and a list of `children`"),
        ({"name": "FILTER", "children": [1]}, "`children` of FILTER must be objects"),
        ({"name": "FILTER", "children": [], "extra_info": 3}, "`extra_info` of FILTER"),
        (
            {"name": "FILTER", "children": [], "extra_info": {"Estimated Cardinality": "many"}},
            "`Estimated Cardinality` of FILTER must be a number, got 'many'",
        ),
    ],
)
def test_json_of_another_shape_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_duckdb_plan(wrong)
