"""What a query will cost on a database that a model never saw: from its plan alone, then after a few measured queries
of that database. Offline, about two minutes on a CPU; ends in a drawn plan and a picture of the errors.

python examples/query_cost.py --run runs/query_cost

Databases and queries are generated and measured here with DuckDB, on one thread, so the model learns what this machine
takes. A q-error is max(estimated / measured, measured / estimated): 1 is perfect, 2 is wrong by a factor of two.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import torch
from tqdm import tqdm

from graft import QueryGraphConfig, QueryGraphForCostEstimation, pages
from graft.graphs.query_plan.cost_baselines import q_errors, scaled_cost
from graft.graphs.query_plan.database_generator import generate_database, generate_queries
from graft.graphs.query_plan.measured_plans import MeasuredPlan, measure_duckdb
from graft.graphs.query_plan.plan_picture import draw_plan
from graft.trainer.query_cost_training import estimate_milliseconds, train_query_cost


def measure(seed: int, queries: int, largest: int) -> list[MeasuredPlan]:
    """Plans and times of one generated database."""
    database = generate_database(seed, largest)
    with duckdb.connect() as connection:
        database.create(connection)
        return measure_duckdb(connection, generate_queries(database, queries))


def print_table(errors: dict[str, np.ndarray]) -> None:
    """Median, 95th percentile and largest q-error of each method."""
    print(f"\n{'q-errors on the held-out database':46} median    95 %   worst")
    for name, of_method in errors.items():
        print(f"  {name:44} " + "".join(f"{q:8.2f}" for q in np.percentile(of_method, [50, 95, 100])))


def draw_errors(errors: dict[str, np.ndarray], path: Path) -> Path:
    """The q-errors of each method in rising order: lower and flatter is better."""
    series = {
        name: (np.linspace(0, 100, len(of_method)).tolist(), np.sort(of_method).tolist())
        for name, of_method in errors.items()
    }
    title = "Errors on a database that was not trained on"
    return pages.line_plot_png(series, path, title, ("queries, best first (%)", "q-error"), logarithmic=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/query_cost"))
    parser.add_argument("--databases", type=int, default=6, help="to train on; one more is held out")
    parser.add_argument("--queries", type=int, default=200, help="of each database")
    parser.add_argument("--largest", type=int, default=300_000, help="rows of a table at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--few", type=int, default=30, help="queries of the held-out database for the few-shot model")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.few < arguments.queries:
        parser.error(f"--few must lie in [1, {arguments.queries - 1}], got {arguments.few}")
    arguments.run.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # The last seed is the database that is held out.
    seeds = tqdm(range(arguments.databases + 1), desc="databases")
    *known, held_out = (measure(seed, arguments.queries, arguments.largest) for seed in seeds)
    plans = [plan for of_database in known for plan in of_database]
    few, rest = held_out[: arguments.few], held_out[arguments.few :]
    graphs, measured = [plan.graph for plan in rest], [plan.milliseconds for plan in rest]

    torch.manual_seed(0)
    zero_shot = QueryGraphForCostEstimation(QueryGraphConfig())
    losses = train_query_cost(zero_shot, plans, arguments.epochs)
    print(f"{len(plans)} plans of {len(known)} databases; mean |log q-error| {losses[0]:.2f} -> {losses[-1]:.2f}")
    few_shot = copy.deepcopy(zero_shot)
    train_query_cost(few_shot, few, epochs=10, learning_rate=3e-4)  # more would learn the few by heart

    estimated = estimate_milliseconds(zero_shot, graphs)
    errors = {
        "its cost, scaled on the other databases": q_errors(scaled_cost(plans, graphs), measured),
        "graph of its plan, zero-shot": q_errors(estimated, measured),
        f"after {len(few)} queries of the database": q_errors(estimate_milliseconds(few_shot, graphs), measured),
    }
    print_table(errors)

    # A plan to look at: of those with a join and few enough nodes to read, the one whose estimate is as good as usual.
    readable = [place for place, plan in enumerate(rest) if " JOIN " in plan.sql and len(plan.graph.names) <= 24]
    ranked = sorted(readable or range(len(rest)), key=lambda place: errors["graph of its plan, zero-shot"][place])
    shown = ranked[len(ranked) // 2]
    print(f"\n{rest[shown].sql}\n  estimated {estimated[shown]:.2f} ms, measured {measured[shown]:.2f} ms")
    title = f"{estimated[shown]:.2f} ms estimated, {measured[shown]:.2f} ms measured"
    picture = draw_plan(graphs[shown], arguments.run / "plan.png", title)
    zero_shot.save_pretrained(arguments.run / "model")
    print(f"\nThis took {time.monotonic() - started:.0f} s. Open:")
    for what, path in {
        "that plan": picture,
        "errors of all queries": draw_errors(errors, arguments.run / "errors.png"),
        "the model, for graft-query-cost": arguments.run / "model",
    }.items():
        print(f"  {what:34} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
