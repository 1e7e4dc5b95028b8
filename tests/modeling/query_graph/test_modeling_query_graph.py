import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stranger import program_without
from transformers import AutoConfig, AutoModel

from graft import QueryGraphConfig, QueryGraphForCostEstimation, QueryPlanGraph
from graft.configuration.configuration_query_graph import JOIN_TYPES, NODE_FEATURES, NODE_TYPES, PLAN_OPERATORS
from graft.graphs.query_plan.catalogue import ColumnFacts, TableFacts
from graft.graphs.query_plan.plan_operator import PlanOperator
from graft.graphs.query_plan.query_plan_graph import collate_plans

CATALOGUE = {"t": TableFacts(500.0, {"a": ColumnFacts("integer", 30.0), "b": ColumnFacts("text", 4.0, 0.5)})}
PREDICATES = ("a > 3", "b = 'x' AND a < 5", "b LIKE '%x%'")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return QueryGraphForCostEstimation(QueryGraphConfig(hidden_size=8)).double().eval()


def random_plan(draw: random.Random, depth: int) -> PlanOperator:
    kind = draw.choice(PLAN_OPERATORS)
    inputs = 0 if depth == 0 else draw.choice([0, 1, 1, 2, 3] if kind == "union" else [0, 1, 1, 2])
    children = tuple(random_plan(draw, depth - 1) for _ in range(inputs))
    return PlanOperator(
        kind=kind,
        name=kind,
        rows=float(draw.randint(0, 10**6)),
        children=children,
        table=draw.choice(["t", "unknown"]) if not children else None,
        columns=("a", "b")[: draw.randint(0, 2)],
        predicates=tuple(draw.sample(PREDICATES, draw.randint(0, 2))),
        join_type=draw.choice([None, *JOIN_TYPES]),
        outputs=draw.randint(0, 5),
    )


def graph_of(seed: int) -> QueryPlanGraph:
    return QueryPlanGraph.from_operators(random_plan(random.Random(seed), 4), CATALOGUE)


def naive(model: QueryGraphForCostEstimation, graph: QueryPlanGraph) -> float:
    """The equations, node by node, recursively, in float64."""

    def states(node: int) -> torch.Tensor:
        kind = int(graph.node_types[node])
        size = len(NODE_FEATURES[NODE_TYPES[kind]])
        encoded = model.messages.encoders[kind](graph.features[node, :size].double())
        sums = [torch.zeros_like(encoded) for _ in range(3)]
        for (source, target), slot in zip(graph.edges.T.tolist(), graph.slots.tolist(), strict=True):
            if target == node:
                sums[slot] = sums[slot] + states(source)
        return encoded + model.messages.update(torch.cat([encoded, *sums]))

    root = states(len(graph.node_types) - 1)
    return float(model.head(root + model.estimate(root)).detach())


def estimates(model, graphs):
    with torch.no_grad():
        return model(**collate_plans(graphs)).log_milliseconds


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_levels_of_a_batch_equal_a_recursive_loop(model, seeds):
    graphs = [graph_of(seed) for seed in seeds]
    expected = torch.tensor([naive(model, graph) for graph in graphs], dtype=torch.float64)
    torch.testing.assert_close(estimates(model, graphs), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)))
def test_the_order_of_a_batch_changes_nothing(model, order):
    graphs = [graph_of(seed) for seed in range(5)]
    expected = estimates(model, graphs)[list(order)]
    torch.testing.assert_close(estimates(model, [graphs[place] for place in order]), expected, rtol=1e-12, atol=1e-12)


def test_inputs_of_a_union_commute_and_those_of_a_join_do_not(model):
    inputs = [random_plan(random.Random(seed), 2) for seed in range(3)]

    def both_ways(kind, inputs):
        ways = [PlanOperator(kind, kind, 50.0, tuple(way)) for way in (inputs, inputs[::-1])]
        return estimates(model, [QueryPlanGraph.from_operators(way, CATALOGUE) for way in ways])

    one, other = both_ways("union", inputs)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    one, other = both_ways("hash_join", inputs[:2])
    assert abs(one - other) > 1e-6


def test_the_order_of_predicates_changes_nothing(model):
    ways = [PlanOperator("filter", "f", 9.0, predicates=way) for way in (PREDICATES, PREDICATES[::-1])]
    one, other = estimates(model, [QueryPlanGraph.from_operators(way) for way in ways])
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_pass_the_writes_in_place(model):
    batch = collate_plans([graph_of(seed) for seed in (3, 4)])
    batch["features"] = batch["features"].double().requires_grad_()

    def estimate(features):
        return model(**(batch | {"features": features})).log_milliseconds

    assert torch.autograd.gradcheck(estimate, (batch["features"],), fast_mode=True)


def test_the_loss_is_the_mean_logarithm_of_the_q_error(model):
    graphs = [graph_of(seed) for seed in range(4)]
    times = [0.5, 2.0, 30.0, 7.0]
    predicted = estimates(model, graphs).exp().tolist()
    errors = torch.tensor([max(p / t, t / p) for p, t in zip(predicted, times, strict=True)], dtype=torch.float64)
    loss = model(**collate_plans(graphs, times)).loss.detach()
    assert float(loss) == pytest.approx(float(errors.log().mean()), rel=1e-6)


def test_a_plan_of_a_thousand_levels(model):
    operator = PlanOperator("scan", "s", 5.0)
    for _ in range(1000):
        operator = PlanOperator("filter", "f", 5.0, (operator,))
    assert estimates(model, [QueryPlanGraph.from_operators(operator)]).shape == (1,)


@pytest.mark.parametrize("where", ["features", "milliseconds"])
def test_what_does_not_fit_is_refused(model, where):
    batch = collate_plans([graph_of(1)], [1.0])
    batch[where] = batch[where][:, :-1] if where == "features" else batch[where] * 0
    with pytest.raises(ValueError, match=f"`{where}` must"):
        model(**batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"feature_sizes": [1, 2]},
        {"feature_sizes": [1, 2, 0, 4]},
        {"hidden_size": 0},
        {"dropout": 1.0},
        {"initializer_range": 0.0},
        {"hidden_size": 2.5},
    ],
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        QueryGraphConfig(**wrong)


def test_it_is_saved_and_loaded_by_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    graphs = [graph_of(seed) for seed in range(3)]
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(loaded) is QueryGraphForCostEstimation
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 8
    weights = loaded.state_dict()
    assert all(weights[name].equal(weight) for name, weight in model.state_dict().items())
    # Some processors add in another order where mapped weights are aligned otherwise.
    torch.testing.assert_close(estimates(loaded, graphs), estimates(model, graphs), rtol=1e-12, atol=1e-12)


STRANGER = (
    program_without("graft")
    + """
import json
from transformers import AutoModel

folder, batch = sys.argv[1], json.loads(sys.stdin.read())
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
with torch.no_grad():
    output = model(**{name: torch.tensor(value) for name, value in batch.items()})
print(json.dumps(output.log_milliseconds.tolist()))
"""
)


def test_a_saved_folder_runs_where_graft_is_not_installed(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    graphs = [graph_of(seed) for seed in range(3)]
    batch = {name: value.tolist() for name, value in collate_plans(graphs).items()}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "model")],
        input=json.dumps(batch),
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(estimates(model, graphs).tolist(), rel=1e-6)
