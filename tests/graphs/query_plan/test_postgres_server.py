"""Plans and facts of a PostgreSQL server that the test starts; skipped where none is installed."""

import csv
import io
import json
import shutil
import subprocess

import pytest
import torch
from postgres_server import DATABASE, USER, postgres_programs, running_postgres

from graft import QueryGraphConfig, QueryGraphForCostEstimation
from graft.graphs.query_plan.catalogue import read_postgres_catalogue
from graft.graphs.query_plan.measured_plans import MeasuredPlan
from graft.graphs.query_plan.plan_picture import draw_plan
from graft.graphs.query_plan.postgres_plan import read_postgres_plan
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph
from graft.trainer.query_cost_training import estimate_milliseconds, train_query_cost

TABLES = """
CREATE TABLE customers AS SELECT i AS id, 'region ' || i % 5 AS region FROM generate_series(1, 200) i;
CREATE TABLE orders AS SELECT i AS id, i % 200 + 1 AS customer, (i % 97)::float8 AS price,
    CASE WHEN i % 4 > 0 THEN DATE '2020-01-01' + i % 50 END AS paid FROM generate_series(1, 20000) i;
CREATE UNIQUE INDEX ON customers (id);
CREATE INDEX ON orders (id);
ANALYZE;
"""
QUERIES = {
    "SELECT count(*) FROM orders WHERE price > 50": ("scan", "plain_aggregate"),
    "SELECT region, sum(price) FROM orders JOIN customers c ON customer = c.id GROUP BY 1 ORDER BY 2 DESC LIMIT 3": (
        *("hash_join", "hash_build", "hash_aggregate", "sort", "limit"),
    ),
    "SELECT * FROM orders WHERE id = 77": ("index_scan",),
    "SELECT * FROM orders WHERE paid IS NULL ORDER BY price": ("scan", "sort"),
    "SELECT * FROM customers a LEFT JOIN customers b ON a.id < b.id": ("loop_join",),
    "SELECT id, rank() OVER (PARTITION BY customer ORDER BY price) FROM orders": ("window", "sort"),
    "SELECT id FROM orders UNION ALL SELECT id FROM customers": ("union",),
}


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def fetchall(self):
        return self.rows


class Psql:
    """As much of a connection as the catalogue needs, by the server's own client; drivers may be absent."""

    def __init__(self, client, socket, user):
        self.command = [str(client), "-X", "-q", "--csv", "-t", "-v", "ON_ERROR_STOP=1", "-h", socket, "-U", user]
        self.command += ["-d", DATABASE, "-f", "-"]

    def execute(self, sql):
        done = subprocess.run(self.command, input=sql, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Rows(list(csv.reader(io.StringIO(done.stdout))))

    def explain(self, sql, analyze=False):
        [[plan]] = self.execute(f"EXPLAIN ({'ANALYZE, ' * analyze}VERBOSE, FORMAT JSON) {sql}").fetchall()
        return plan


@pytest.fixture(scope="module")
def server():
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed here")
    with running_postgres(programs, "-c max_parallel_workers_per_gather=0 -c jit=off") as socket:
        client = shutil.which("psql", path=str(programs)) or shutil.which("psql")
        connection = Psql(client, str(socket), USER)
        connection.execute(TABLES)
        yield connection


@pytest.mark.parametrize("sql", QUERIES)
def test_operators_of_a_living_server_are_known(server, sql):
    operators = list(read_postgres_plan(server.explain(sql)).bottom_up())
    kinds = [operator.kind for operator in operators]
    assert set(QUERIES[sql]) <= set(kinds)
    assert not {"other", "other_scan"} & set(kinds)
    assert operators[-1].row_bytes > 0


def test_facts_of_tables_come_from_what_the_server_analysed(server):
    catalogue = read_postgres_catalogue(server)
    assert set(catalogue) == {"public.customers", "public.orders"}
    orders = catalogue["public.orders"]
    assert orders.rows == 20000
    assert {name: facts.kind for name, facts in orders.columns.items()} == {
        "id": "integer",
        "customer": "integer",
        "price": "float",
        "paid": "date",
    }
    assert orders.columns["id"].distinct == 20000  # told as a share of the rows
    assert orders.columns["customer"].distinct == 200
    assert orders.columns["paid"].null_share == pytest.approx(0.25, abs=0.03)


def test_a_model_of_living_plans_estimates_them_and_draws_one(server, tmp_path):
    catalogue, plans = read_postgres_catalogue(server), []
    for sql in QUERIES:
        for limit in (5, 500):
            text = server.explain(f"SELECT * FROM ({sql}) AS q LIMIT {limit}", analyze=True)
            [whole] = json.loads(text)
            graph = QueryPlanGraph.from_postgres(text, catalogue)
            plans.append(MeasuredPlan(sql, graph, whole["Execution Time"]))
    torch.manual_seed(0)
    model = QueryGraphForCostEstimation(QueryGraphConfig(hidden_size=16))
    losses = train_query_cost(model, plans, epochs=80, learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]
    estimated = estimate_milliseconds(model, [plan.graph for plan in plans])
    slowest, fastest = (pick(range(len(plans)), key=lambda n: plans[n].milliseconds) for pick in (max, min))
    assert estimated[slowest] > estimated[fastest]
    assert draw_plan(plans[slowest].graph, tmp_path / "plan.png").stat().st_size > 1000
