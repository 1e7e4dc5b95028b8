"""What a cost model must beat: a scaled cost, boosting on flat features, the nearest plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graft.configuration.configuration_query_graph import NODE_FEATURES, NODE_TYPES
from graft.graphs.query_plan.measured_plans import MeasuredPlan
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

_ROWS = NODE_FEATURES["operator"].index("rows")
_TABLE_ROWS = NODE_FEATURES["table"].index("rows")


def q_errors(predicted: Sequence[float], measured: Sequence[float]) -> NDArray[np.float64]:
    """max(p / t, t / p) of each; 1 is perfect."""
    ratio = np.asarray(predicted, dtype=np.float64) / np.asarray(measured, dtype=np.float64)
    return np.maximum(ratio, 1 / ratio)


def rows_of_plan(graph: QueryPlanGraph) -> float:
    """The optimizer's cost, as far as DuckDB tells one: rows that come out of operators and of tables, summed."""
    operators = graph.features[graph.node_types == NODE_TYPES.index("operator"), _ROWS]
    tables = graph.features[graph.node_types == NODE_TYPES.index("table"), _TABLE_ROWS]
    return float((10.0 ** operators.double() - 1).sum() + (10.0 ** tables.double() - 1).sum())


def flat_features(graph: QueryPlanGraph) -> NDArray[np.float64]:
    """Sums and largest values of the features of each kind of node, and `rows_of_plan`: a plan without its shape."""
    parts = []
    for kind, names in enumerate(NODE_FEATURES.values()):
        some = graph.features[graph.node_types == kind, : len(names)].double().numpy()
        parts += [some.sum(axis=0), some.max(axis=0, initial=0.0)]
    return np.concatenate([*parts, [np.log10(1 + rows_of_plan(graph))]])


def scaled_cost(train: Sequence[MeasuredPlan], test: Sequence[QueryPlanGraph]) -> NDArray[np.float64]:
    """Times by a power law of `rows_of_plan`, log t = a + b log cost, fitted by least squares.

    Fitted on the databases of training this is the scaled cost; on the test database itself, the oracle's.
    """

    def log_cost(graphs: Sequence[QueryPlanGraph]) -> NDArray[np.float64]:
        return np.log1p([rows_of_plan(graph) for graph in graphs])

    slope, offset = np.polyfit(log_cost([plan.graph for plan in train]), _log_times(train), 1)
    return np.exp(offset + slope * log_cost(test))


def boosted_features(train: Sequence[MeasuredPlan], test: Sequence[QueryPlanGraph]) -> NDArray[np.float64]:
    """Times by gradient boosting of log t on `flat_features`; needs scikit-learn (the extra query_plan)."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    boosting = HistGradientBoostingRegressor(loss="absolute_error", random_state=0)
    boosting.fit(np.stack([flat_features(plan.graph) for plan in train]), _log_times(train))
    return np.asarray(np.exp(boosting.predict(np.stack([flat_features(graph) for graph in test]))))


def nearest_plans(
    train: Sequence[MeasuredPlan], test: Sequence[QueryPlanGraph], neighbours: int = 5
) -> NDArray[np.float64]:
    """Times by the geometric mean of the plans with the nearest `flat_features`, each scaled to its deviation.

    Raises:
        ValueError: there are fewer plans than neighbours, or `neighbours` is below 1.
    """
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"`neighbours` must lie in [1, {len(train)} plans], got {neighbours}.")
    known = np.stack([flat_features(plan.graph) for plan in train])
    asked = np.stack([flat_features(graph) for graph in test])
    spread = np.where(known.std(axis=0) > 0, known.std(axis=0), 1.0)
    known, asked = known / spread, asked / spread
    distances = (known**2).sum(axis=1) - 2 * asked @ known.T
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
    return np.asarray(np.exp(_log_times(train)[nearest].mean(axis=1)))


def _log_times(plans: Sequence[MeasuredPlan]) -> NDArray[np.float64]:
    return np.log([plan.milliseconds for plan in plans])
