import pytest

from graft.configuration.configuration_query_graph import NODE_FEATURES
from graft.graphs.query_plan.catalogue import ColumnFacts, TableFacts
from graft.graphs.query_plan.postgres_plan import read_postgres_plan
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

# In the form that PostgreSQL documents for EXPLAIN (VERBOSE, FORMAT JSON).
PLAN = """[{"Plan": {"Node Type": "Limit", "Startup Cost": 40.1, "Total Cost": 40.2, "Plan Rows": 10, "Plan Width": 40,
 "Output": ["o.region", "(count(*))"], "Plans": [
  {"Node Type": "Sort", "Parent Relationship": "Outer", "Plan Rows": 7, "Plan Width": 40,
   "Output": ["o.region", "(count(*))"], "Sort Key": ["(count(*)) DESC", "o.region"], "Plans": [
   {"Node Type": "Aggregate", "Strategy": "Hashed", "Partial Mode": "Simple", "Parent Relationship": "Outer",
    "Plan Rows": 7, "Plan Width": 40, "Output": ["o.region", "count(*)"], "Group Key": ["o.region"], "Plans": [
    {"Node Type": "Hash Join", "Parent Relationship": "Outer", "Join Type": "Left", "Plan Rows": 500,
     "Plan Width": 32, "Output": ["o.region"], "Hash Cond": "(o.customer = c.id)", "Plans": [
      {"Node Type": "Seq Scan", "Parent Relationship": "Outer", "Relation Name": "orders", "Schema": "public",
       "Alias": "o", "Plan Rows": 500, "Plan Width": 36, "Output": ["o.region", "o.customer"],
       "Filter": "((o.region ~~ 'no%'::text) AND (o.customer > 5))"},
      {"Node Type": "Hash", "Parent Relationship": "Inner", "Plan Rows": 100, "Plan Width": 4, "Output": ["c.id"],
       "Plans": [{"Node Type": "Index Only Scan", "Parent Relationship": "Outer", "Scan Direction": "Forward",
        "Index Name": "c_pkey", "Relation Name": "customers", "Schema": "public", "Alias": "c", "Plan Rows": 100,
        "Plan Width": 4, "Output": ["c.id"], "Index Cond": "(c.id < 100)"}]}]}]}]}]}}]"""


def test_a_documented_plan_is_read():
    operators = list(read_postgres_plan(PLAN).bottom_up())
    kinds = [operator.kind for operator in operators]
    assert sorted(kinds) == sorted(
        ["limit", "sort", "hash_aggregate", "hash_join", "scan", "hash_build", "index_scan"]
    )
    by_kind = {operator.kind: operator for operator in operators}
    assert by_kind["sort"].sort_keys == 2
    assert (by_kind["hash_aggregate"].groups, by_kind["hash_aggregate"].aggregates) == (1, 1)
    join = by_kind["hash_join"]
    assert (join.join_type, join.row_bytes, join.predicates) == ("outer", 32, ("(o.customer = c.id)",))
    assert [child.kind for child in join.children] == ["scan", "hash_build"]
    assert (by_kind["scan"].table, by_kind["scan"].columns) == ("public.orders", ("region", "customer"))
    assert by_kind["index_scan"].predicates == ("(c.id < 100)",)


@pytest.mark.parametrize(
    ("word", "join_type"),
    [("Right", "outer"), ("Semi", "semi"), ("Right Semi", "semi"), ("Right Anti", "anti"), ("Sideways", "other_join")],
)
def test_the_side_that_a_join_builds_on_does_not_change_its_kind(word, join_type):
    plan = PLAN.replace('"Join Type": "Left"', f'"Join Type": "{word}"')
    [join] = [each for each in read_postgres_plan(plan).bottom_up() if each.kind == "hash_join"]
    assert join.join_type == join_type


def test_facts_of_the_catalogue_become_features():
    facts = TableFacts(999.0, {"region": ColumnFacts("text", 99.0, 0.25), "customer": ColumnFacts("integer", 9.0)})
    graph = QueryPlanGraph.from_postgres(PLAN, {"public.orders": facts})
    place = graph.names.index("region")
    column = dict(zip(NODE_FEATURES["column"], graph.features[place].tolist(), strict=False))
    assert column == pytest.approx(
        {"text": 1, "distinct": 2, "null_share": 0.25}
        | dict.fromkeys(("integer", "float", "date", "boolean", "other_type"), 0)
    )
    assert graph.features[graph.names.index("public.orders"), :3].tolist() == pytest.approx([1, 3, 0.4771], abs=1e-4)
    assert graph.features[graph.names.index("public.customers"), :3].tolist() == [0, 0, 0]
    readers = [graph.names[target] for source, target in graph.edges.T.tolist() if source == place]
    assert readers == ["((o.region ~~ 'no%'::text) AND (o.customer > 5))", "Seq Scan"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing", "must be a PostgreSQL plan in JSON"),
        ({"name": "SEQ_SCAN"}, "object with a `Plan`"),
        ({"Plan": {"Node Type": "Sort"}}, "`Node Type` and `Plan Rows`"),
        ({"Plan": {"Node Type": "Sort", "Plan Rows": 1, "Plans": 7}}, "`Plans` of Sort"),
    ],
)
def test_json_of_another_shape_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_postgres_plan(wrong)
