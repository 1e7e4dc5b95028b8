import json

import pytest
import torch
from transformers import BertConfig

from graft import QueryGraphConfig, QueryGraphForCostEstimation
from graft.graphs.query_plan.measured_plans import MeasuredPlan
from graft.graphs.query_plan.plan_operator import PlanOperator
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph
from graft.scripts.query_cost import main
from graft.trainer.query_cost_training import estimate_milliseconds, train_query_cost


def scans(powers):
    """Scans whose time is a hundredth of their rows."""
    operators = [PlanOperator("scan", "s", 10.0**power) for power in powers]
    return [MeasuredPlan("", QueryPlanGraph.from_operators(each), each.rows / 100) for each in operators]


def test_training_learns_what_rows_cost_and_a_few_plans_adapt_it():
    torch.manual_seed(0)
    model = QueryGraphForCostEstimation(QueryGraphConfig(hidden_size=16))
    known = scans([1 + place / 30 for place in range(120)])
    losses = train_query_cost(model, known, epochs=25, batch_size=16, learning_rate=5e-3)
    assert losses[-1] < 0.2 * losses[0]
    [between] = scans([2.517])
    assert estimate_milliseconds(model, [between.graph])[0] == pytest.approx(between.milliseconds, rel=0.35)

    slower = [MeasuredPlan("", plan.graph, 5 * plan.milliseconds) for plan in known[::12]]
    train_query_cost(model, slower, epochs=60, learning_rate=2e-3)
    assert estimate_milliseconds(model, [between.graph])[0] == pytest.approx(5 * between.milliseconds, rel=0.5)


def test_plans_are_needed_and_options_are_positive():
    model = QueryGraphForCostEstimation(QueryGraphConfig(hidden_size=4))
    with pytest.raises(ValueError, match="`plans` must hold"):
        train_query_cost(model, [])
    with pytest.raises(ValueError, match="`epochs` must be above 0"):
        train_query_cost(model, scans([1]), epochs=0)


def test_the_command_trains_estimates_and_draws(tmp_path, capsys):
    duckdb = pytest.importorskip("duckdb")
    model, database, picture = tmp_path / "model", tmp_path / "shop.duckdb", tmp_path / "plan.png"
    training = [str(model), "--train", "2", "--queries", "4", "--largest", "1000", "--epochs", "2"]
    assert main(training) == 0
    assert main(training) == 2
    assert "exists and is not an empty folder; choose another" in capsys.readouterr().err
    with duckdb.connect(str(database)) as connection:
        connection.execute("CREATE TABLE orders AS SELECT range id, range % 7 AS kind FROM range(1000)")
    capsys.readouterr()
    sql = "SELECT kind, count(*) FROM orders GROUP BY kind"
    assert main([str(model), str(database), "--sql", sql, "--picture", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out)["milliseconds"] > 0
    assert picture.stat().st_size > 1000

    assert main([str(model), str(database), "--sql", "SELECT nothing"]) == 2
    assert "cannot plan" in capsys.readouterr().err
    assert main([str(model), str(tmp_path / "absent"), "--sql", sql]) == 2
    assert "must be a DuckDB file" in capsys.readouterr().err
    BertConfig().save_pretrained(tmp_path / "other")
    assert main([str(tmp_path / "other"), str(database), "--sql", sql]) == 2
    assert "must be one that --train made, got a bert" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["m"], ["m", "d"], ["m", "d", "--sql", "s", "--train", "2"], ["m", "--train", "0"]])
def test_what_does_not_go_together_is_refused(wrong):
    with pytest.raises(SystemExit):
        main(wrong)
