"""A query plan as a graph of operators, tables, columns and predicates, and batches of such graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import torch
from torch import Tensor

from graft.configuration.configuration_query_graph import (
    COLUMN_KINDS,
    EDGE_SLOTS,
    JOIN_TYPES,
    NODE_FEATURES,
    NODE_TYPES,
    PLAN_OPERATORS,
)
from graft.graphs.query_plan.catalogue import Catalogue, ColumnFacts, TableFacts, find_table
from graft.graphs.query_plan.duckdb_plan import read_duckdb_plan
from graft.graphs.query_plan.plan_operator import PlanOperator
from graft.graphs.query_plan.postgres_plan import read_postgres_plan
from graft.graphs.query_plan.predicate import names_in, predicate_shape, quote_names

_WIDTH = max(len(names) for names in NODE_FEATURES.values())


@dataclass(frozen=True, eq=False)
class QueryPlanGraph:
    """Nodes and edges of a plan, children before parents, its root last (Hilprecht and Binnig 2022, section 3).

    Features mean the same on every database: kinds, counts and cardinalities, never names of tables or columns.

    Args:
        node_types: (nodes,) places in NODE_TYPES.
        features: (nodes, features) those of NODE_FEATURES, then zeros for kinds of node that have fewer.
        edges: (2, edges) a node, and the node that reads it.
        slots: (edges,) places in EDGE_SLOTS: which input an operator reads it as.
        levels: (nodes,) edges on the longest path from a leaf.
        names: what each node is, for a picture.
    """

    node_types: Tensor
    features: Tensor
    edges: Tensor
    slots: Tensor
    levels: Tensor
    names: tuple[str, ...]

    @classmethod
    def from_duckdb(cls, plan: str | list[Any] | dict[str, Any], catalogue: Catalogue | None = None) -> QueryPlanGraph:
        """From DuckDB's `EXPLAIN (FORMAT json)`; without a catalogue, columns and tables have no facts.

        Raises:
            ValueError: the plan is of another shape.
        """
        return cls.from_operators(read_duckdb_plan(plan), catalogue)

    @classmethod
    def from_postgres(
        cls, plan: str | list[Any] | dict[str, Any], catalogue: Catalogue | None = None
    ) -> QueryPlanGraph:
        """From PostgreSQL's `EXPLAIN (FORMAT JSON)`; VERBOSE adds outputs and schemas.

        Raises:
            ValueError: the plan is of another shape.
        """
        return cls.from_operators(read_postgres_plan(plan), catalogue)

    @classmethod
    def from_operators(cls, root: PlanOperator, catalogue: Catalogue | None = None) -> QueryPlanGraph:
        """From operators that an adapter has read."""
        builder = _Builder(catalogue or {})
        for operator in root.bottom_up():
            builder.add_operator(operator)
        return builder.graph()


class _Builder:
    """Nodes and edges as they are found."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.column_names = {name for table in catalogue.values() for name in table.columns}
        self.nodes: list[tuple[int, list[float], str]] = []
        self.levels: list[int] = []
        self.edges: list[tuple[int, int, int]] = []
        self.place: dict[int, int] = {}  # of an operator, by its id

    def add_operator(self, operator: PlanOperator) -> None:
        read = []
        for number, child in enumerate(operator.children):
            first = number == 0 or operator.kind == "union"  # whose inputs have no order
            read.append((self.place[id(child)], EDGE_SLOTS.index("first_input" if first else "other_input")))
        read += [(node, EDGE_SLOTS.index("description")) for node in self._describe(operator)]
        self.place[id(operator)] = self._add("operator", operator_features(operator), operator.name, read)

    def _describe(self, operator: PlanOperator) -> list[int]:
        """Nodes of table, columns and predicates; a column is one node, however many read it."""
        table = find_table(self.catalogue, operator.table) if operator.table is not None else None
        known = table.columns if table is not None else {}
        conditions = [quote_names(text, self.column_names) for text in operator.predicates]
        words = [names_in(text) for text in conditions]
        asked = [[name for name in known if name in some] for some in words]
        named = [name for name in operator.columns if name in known]
        columns = {
            name: self._add("column", column_features(known[name]), name, [])
            for name in dict.fromkeys([*named, *(name for names in asked for name in names)])
        }
        found = [columns[name] for name in dict.fromkeys(named)]
        if operator.table is not None:
            found.append(self._add("table", table_features(table), operator.table, []))
        slot = EDGE_SLOTS.index("description")
        for text, names in zip(conditions, asked, strict=True):
            read = [(columns[name], slot) for name in names]
            found.append(self._add("predicate", predicate_features(text), text, read))
        return found

    def _add(self, node_type: str, features: list[float], name: str, read: list[tuple[int, int]]) -> int:
        node = len(self.nodes)
        self.nodes.append((NODE_TYPES.index(node_type), features + [0.0] * (_WIDTH - len(features)), name))
        self.levels.append(max((self.levels[source] + 1 for source, _ in read), default=0))
        self.edges += [(source, node, slot) for source, slot in read]
        return node

    def graph(self) -> QueryPlanGraph:
        types, features, names = zip(*self.nodes, strict=True)
        edges = torch.tensor(self.edges, dtype=torch.long).reshape(-1, 3).T
        return QueryPlanGraph(
            torch.tensor(types), torch.tensor(features), edges[:2], edges[2], torch.tensor(self.levels), names
        )


def operator_features(operator: PlanOperator) -> list[float]:
    """NODE_FEATURES["operator"] of an operator."""
    below = [child.rows for child in operator.children] or [0.0]
    counts = (
        *(operator.rows, sum(below), max(below), min(below), operator.row_bytes),
        *(operator.outputs, operator.groups, operator.aggregates, operator.sort_keys),
        *(len(operator.predicates), len(operator.children)),
    )
    kinds = _one_hot(operator.kind, PLAN_OPERATORS) + _one_hot(operator.join_type, JOIN_TYPES)
    return kinds + [_magnitude(count) for count in counts]


def table_features(table: TableFacts | None) -> list[float]:
    """NODE_FEATURES["table"]; None is a table that no catalogue knows."""
    return [0.0, 0.0, 0.0] if table is None else [1.0, _magnitude(table.rows), _magnitude(len(table.columns))]


def column_features(column: ColumnFacts) -> list[float]:
    """NODE_FEATURES["column"] of a column."""
    return [*_one_hot(column.kind, COLUMN_KINDS), _magnitude(column.distinct), column.null_share]


def predicate_features(text: str) -> list[float]:
    """NODE_FEATURES["predicate"] of a condition."""
    return [_magnitude(count) for count in predicate_shape(text)]


def _magnitude(count: float) -> float:
    return log10(1 + max(count, 0.0))


def _one_hot(kind: str | None, kinds: Sequence[str]) -> list[float]:
    return [float(each == kind) for each in kinds]


def collate_plans(graphs: Sequence[QueryPlanGraph], milliseconds: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The arguments of QueryGraphForCostEstimation for several plans: one graph with several roots.

    Args:
        graphs: at least one.
        milliseconds: measured times, one for each graph.

    Raises:
        ValueError: there is no graph, or not one time for each.
    """
    if not graphs:
        raise ValueError("`graphs` must hold at least one graph, got none.")
    if milliseconds is not None and len(milliseconds) != len(graphs):
        raise ValueError(f"`milliseconds` must hold a time for each of {len(graphs)} graphs, got {len(milliseconds)}.")
    ends = torch.tensor([len(graph.node_types) for graph in graphs]).cumsum(0)
    starts = [0, *ends.tolist()[:-1]]
    batch = {
        "node_types": torch.cat([graph.node_types for graph in graphs]),
        "features": torch.cat([graph.features for graph in graphs]),
        "edges": torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=True)], dim=1),
        "slots": torch.cat([graph.slots for graph in graphs]),
        "levels": torch.cat([graph.levels for graph in graphs]),
        "roots": ends - 1,
    }
    if milliseconds is not None:
        batch["milliseconds"] = torch.tensor(milliseconds, dtype=torch.float32)
    return batch
