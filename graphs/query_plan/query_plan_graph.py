"""A query plan as a graph of operators, tables, columns and predicates, and batches of such graphs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import log10, prod
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
from graft.graphs.query_plan.predicate import count_computations, names_in, predicate_shape, quote_names

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
        self.columns_from: dict[int, dict[str, list[ColumnFacts]]] = {}  # what an operator passes on, by its id

    def add_operator(self, operator: PlanOperator) -> None:
        read = []
        for number, child in enumerate(operator.children):
            first = number == 0 or operator.kind == "union"  # whose inputs have no order
            read.append((self.place[id(child)], EDGE_SLOTS.index("first_input" if first else "other_input")))
        table = find_table(self.catalogue, operator.table) if operator.table is not None else None
        known = self._known_columns(operator, table)
        keys = _key_columns(operator, known)
        read += [(node, EDGE_SLOTS.index("description")) for node in self._describe(operator, table, known, keys)]
        values = prod(max(known[name][0].distinct, 1.0) for name in keys) if keys else 0.0
        computations = sum(count_computations(quote_names(text, self.column_names)) for text in operator.computed)
        features = operator_features(operator, values, computations)
        self.place[id(operator)] = self._add("operator", features, operator.name, read)

    def _known_columns(self, operator: PlanOperator, table: TableFacts | None) -> dict[str, list[ColumnFacts]]:
        """Facts of the columns that an operator can name; of several tables where they share the name."""
        known: dict[str, list[ColumnFacts]] = {}
        for child in operator.children:
            for name, facts in self.columns_from[id(child)].items():
                known[name] = known.get(name, []) + facts
        known |= {name: [facts] for name, facts in table.columns.items()} if table is not None else {}
        # A scan passes on what it reads, and where no engine tells that, all it has.
        passed = [name for name in operator.columns if name in known] if table is not None else []
        self.columns_from[id(operator)] = {name: known[name] for name in passed} if passed else known
        return known

    def _describe(
        self,
        operator: PlanOperator,
        table: TableFacts | None,
        known: dict[str, list[ColumnFacts]],
        keys: list[str],
    ) -> list[int]:
        """Nodes of table, columns and predicates; a column is one node, however many read it."""
        conditions = [quote_names(text, self.column_names) for text in operator.predicates]
        words = [names_in(text) for text in conditions]
        asked = [[name for name in known if name in some] for some in words]
        named = [*(name for name in operator.columns if name in known), *keys]
        columns = {
            name: [self._add("column", column_features(facts), name, []) for facts in known[name]]
            for name in dict.fromkeys([*named, *(name for names in asked for name in names)])
        }
        found = [node for name in dict.fromkeys(named) for node in columns[name]]
        if operator.table is not None:
            found.append(self._add("table", table_features(table), operator.table, []))
        slot = EDGE_SLOTS.index("description")
        for text, names in zip(conditions, asked, strict=True):
            read = [(node, slot) for name in names for node in columns[name]]
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


_ORDER = re.compile(r"(?: ASC| DESC)?(?: NULLS \w+)?$")


def _key_columns(operator: PlanOperator, known: Collection[str]) -> list[str]:
    """The columns that an operator groups or sorts by; what is computed first is none."""
    found = []
    for key in operator.keys:
        text = _ORDER.sub("", key).replace('"', "")
        found += [name for name in known if text == name or re.fullmatch(r"[\w.]+\." + re.escape(name), text)]
    return list(dict.fromkeys(found))


def operator_features(operator: PlanOperator, key_values: float = 0.0, computations: float = 0.0) -> list[float]:
    """NODE_FEATURES["operator"] of an operator.

    Args:
        key_values: how many groups its keys can make, 0 without keys.
        computations: calls, casts and arithmetic in what it computes.
    """
    below = [child.rows for child in operator.children] or [0.0]
    counts = (
        *(operator.rows, sum(below), max(below), min(below), operator.row_bytes),
        *(operator.outputs, operator.groups, operator.aggregates, operator.sort_keys),
        *(len(operator.predicates), len(operator.children), key_values, computations),
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
