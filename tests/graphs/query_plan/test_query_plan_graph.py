import math

import pytest
import torch

from graft.configuration.configuration_query_graph import NODE_FEATURES, NODE_TYPES, PLAN_OPERATORS
from graft.graphs.query_plan.catalogue import ColumnFacts, TableFacts, read_duckdb_catalogue
from graft.graphs.query_plan.plan_operator import PlanOperator
from graft.graphs.query_plan.predicate import count_computations
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph, collate_plans

FIELDS = ("node_types", "features", "edges", "slots", "levels")


def alike(one, other):
    return all(getattr(one, name).equal(getattr(other, name)) for name in FIELDS)


def schema(table, key, text):
    """The same small database under other names; its query and its graph."""
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.execute(
            f"CREATE TABLE {table} AS SELECT range {key}, 'v' || (range % 50) AS {text} FROM range(3000)"
        )
        connection.execute("CREATE TABLE other AS SELECT range link, NULL::DATE AS born FROM range(300)")
        sql = (
            f"SELECT {text}, count(*) FROM {table} JOIN other ON {key} = link WHERE {text} > 'v1' AND {key} > 7 "
            f"AND born IS NULL GROUP BY {text} ORDER BY 2"
        )
        plan = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()[1]
        return QueryPlanGraph.from_duckdb(plan, read_duckdb_catalogue(connection))


def test_renaming_tables_and_columns_changes_nothing():
    graph = schema("t", "a", "s")
    assert alike(graph, schema("zebra", '"in and or"', '"a = b"'))
    kinds = {NODE_TYPES[kind] for kind in graph.node_types}
    assert kinds == set(NODE_TYPES)


def test_levels_are_the_longest_paths_and_every_edge_rises():
    graph = schema("t", "a", "s")
    longest = [0] * len(graph.node_types)
    for source, target in graph.edges.T.tolist():  # in the order of targets
        assert source < target
        longest[target] = max(longest[target], longest[source] + 1)
    assert graph.levels.tolist() == longest
    assert set(graph.edges[0].tolist()) == set(range(len(longest) - 1)), "all but the root are read"


def test_features_of_an_operator():
    inputs = (PlanOperator("scan", "s", 99.0), PlanOperator("scan", "s", 9.0))
    join = PlanOperator("hash_join", "j", 999.0, inputs, join_type="semi", predicates=("a = b",))
    graph = QueryPlanGraph.from_operators(join)
    found = dict(zip(NODE_FEATURES["operator"], graph.features[-1].tolist(), strict=True))
    expected = dict.fromkeys(NODE_FEATURES["operator"], 0.0) | {
        "hash_join": 1.0,
        "semi": 1.0,
        "rows": 3.0,
        "children_rows": 2.0374265,
        "largest_child_rows": 2.0,
        "smallest_child_rows": 1.0,
        "predicates": 0.30103,
        "children": 0.47712,
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert graph.slots.tolist() == [0, 1, 2]


def _features(graph, name):
    place = len(graph.names) - 1 - graph.names[::-1].index(name)
    return dict(zip(NODE_FEATURES["operator"], graph.features[place].tolist(), strict=False)), place


def test_groups_and_orders_know_their_columns_through_projections():
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT range id, range % 10 b, 'x' || range % 7 s FROM range(1000)")
        connection.execute("CREATE TABLE u AS SELECT range id, range % 4 c FROM range(100)")
        catalogue = read_duckdb_catalogue(connection)

        def graph(sql):
            plan = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()[1]
            return QueryPlanGraph.from_duckdb(plan, catalogue)

        grouped = graph("SELECT s, b, sum(c * (1 - b)) FROM t JOIN u USING (id) GROUP BY s, b")
        ordered = graph("SELECT b + 1 FROM t ORDER BY s")
        asked = graph("SELECT s FROM t WHERE b > 3")
    features, place = _features(grouped, "HASH_GROUP_BY")
    read = [grouped.names[source] for source, target in grouped.edges.T.tolist() if target == place]
    assert {"s", "b"} <= set(read)
    facts = catalogue["memory.main.t"].columns
    groups = facts["s"].distinct * facts["b"].distinct
    assert features["key_values"] == pytest.approx(math.log10(1 + groups), abs=1e-5)
    features, place = _features(ordered, "ORDER_BY")
    assert "s" in [ordered.names[source] for source, target in ordered.edges.T.tolist() if target == place]
    assert features["key_values"] == pytest.approx(math.log10(1 + facts["s"].distinct), abs=1e-5)
    assert not any(asked.features[:, NODE_FEATURES["operator"].index("key_values")][asked.node_types == 0])


def test_a_join_knows_the_columns_it_compares():
    left = PlanOperator("scan", "a", 9.0, table="t", columns=("id",))
    right = PlanOperator("scan", "b", 9.0, table="u", columns=("other", "id"))
    join = PlanOperator("hash_join", "j", 9.0, (left, right), predicates=("id = other",))
    facts = {
        "t": TableFacts(9.0, {"id": ColumnFacts("integer", 99.0), "other": ColumnFacts("text")}),
        "u": TableFacts(9.0, {"id": ColumnFacts("float", 9.0), "other": ColumnFacts("integer")}),
    }
    graph = QueryPlanGraph.from_operators(join, facts)
    place = graph.names.index("id = other")
    read = [source for source, target in graph.edges.T.tolist() if target == place]
    # Both tables give an id, and the plan does not tell which is meant; t's other is not read, so it is not meant.
    assert [graph.names[node] for node in read] == ["id", "id", "other"]
    kinds = [NODE_FEATURES["column"][int(graph.features[node, :6].argmax())] for node in read]
    assert kinds == ["integer", "float", "integer"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("a", 0), ("sum(a)", 1), ("a * (1 - b)", 2), ("CAST(a AS DOUBLE)", 1), ("'f(x) + 1'", 0), ('"f(x) + 1"', 0)],
)
def test_computations_are_calls_casts_and_arithmetic_but_not_names_or_texts(text, count):
    assert count_computations(text) == count


def test_a_deep_plan_does_not_recurse():
    root = {"name": "SEQ_SCAN", "children": [], "extra_info": {"Estimated Cardinality": "5"}}
    for _ in range(5000):
        root = {"name": "FILTER", "children": [root], "extra_info": {"Estimated Cardinality": "4"}}
    graph = QueryPlanGraph.from_duckdb(root)
    assert graph.levels.tolist() == list(range(5001))


def test_inputs_of_a_union_have_no_order():
    inputs = tuple(PlanOperator("scan", "s", rows) for rows in (1.0, 2.0, 3.0))
    assert QueryPlanGraph.from_operators(PlanOperator("union", "u", 6.0, inputs)).slots.tolist() == [0, 0, 0]


def test_a_batch_is_its_graphs_side_by_side():
    graphs = [QueryPlanGraph.from_operators(PlanOperator(kind, kind, 3.0)) for kind in PLAN_OPERATORS[:2]]
    graphs.insert(1, schema("t", "a", "s"))
    batch = collate_plans(graphs, [1.0, 2.0, 3.0])
    size = len(graphs[1].node_types)
    assert batch["roots"].tolist() == [0, size, size + 1]
    assert batch["edges"].equal(graphs[1].edges + 1)
    assert batch["features"][1 : size + 1].equal(graphs[1].features)
    assert batch["milliseconds"].dtype == torch.float32


@pytest.mark.parametrize(("count", "times"), [(0, None), (1, [1.0, 2.0])])
def test_batches_of_nothing_and_times_of_others_are_refused(count, times):
    graphs = [QueryPlanGraph.from_operators(PlanOperator("scan", "s", 3.0))] * count
    with pytest.raises(ValueError, match="must hold"):
        collate_plans(graphs, times)
