"""One operator of a query plan, in words that every engine shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class PlanOperator:
    """An operator and the operators it reads.

    Args:
        kind: one of PLAN_OPERATORS; what is not known is "other".
        name: as the engine calls it, for a picture; no feature is made of it.
        rows: rows that the engine expects to come out.
        children: inputs in the engine's order.
        table: the table that is read, as the engine names it.
        columns: names of the table's columns that come out.
        predicates: conditions, as the engine writes them.
        join_type: one of JOIN_TYPES for a join.
        row_bytes: width of a row that comes out; 0 where the engine does not tell.
        outputs, groups, aggregates, sort_keys: how many expressions of each.
        keys: what it groups or sorts by, as far as the engine tells.
        expressions: what comes out, as far as the engine tells.
        computed: expressions that it computes.
    """

    kind: str
    name: str
    rows: float
    children: tuple[PlanOperator, ...] = ()
    table: str | None = None
    columns: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()
    join_type: str | None = None
    row_bytes: float = 0.0
    outputs: int = 0
    groups: int = 0
    aggregates: int = 0
    sort_keys: int = 0
    keys: tuple[str, ...] = ()
    expressions: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    def bottom_up(self) -> Iterator[PlanOperator]:
        """Every operator, children before parents and this one last; does not recurse, so that depth is no limit."""
        found, waiting = [], [self]
        while waiting:
            operator = waiting.pop()
            found.append(operator)
            waiting.extend(operator.children)
        return reversed(found)


def parse_plan(plan: str | list[Any] | dict[str, Any], engine: str) -> dict[str, Any]:
    """The one object of a plan in JSON, from its text or what a client already made of it.

    Raises:
        ValueError: it is no JSON, too deeply nested to be read from text, or not one object.
    """
    if isinstance(plan, str):
        try:
            plan = json.loads(plan)
        except json.JSONDecodeError as error:
            raise ValueError(f"`plan` must be a {engine} plan in JSON: {error}.") from error
        except RecursionError as error:
            raise ValueError(
                f"`plan` is nested too deeply to be read from text; give the parsed {engine} plan."
            ) from error
    if isinstance(plan, list) and len(plan) == 1:
        plan = plan[0]
    if not isinstance(plan, dict):
        raise ValueError(f"`plan` must be one {engine} plan (an object, or a list of one), got {type(plan).__name__}.")
    return plan


def made_bottom_up(
    root: dict[str, Any],
    inputs: Callable[[dict[str, Any]], list[dict[str, Any]]],
    make: Callable[[dict[str, Any], tuple[PlanOperator, ...]], PlanOperator],
) -> PlanOperator:
    """The operators of a plan; does not recurse, so that depth is no limit.

    Args:
        root: of the plan in JSON.
        inputs: gives the nodes that a node reads, or an error if its shape is wrong; nodes are asked from the root on.
        make: an operator of a node and of what was made of its inputs.
    """
    found: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        found.append((node, inputs(node)))
        waiting.extend(found[-1][1])
    made: dict[int, PlanOperator] = {}
    for node, children in reversed(found):
        made[id(node)] = make(node, tuple(made[id(child)] for child in children))
    return made[id(root)]


def texts(value: Any) -> tuple[str, ...]:
    """A field that holds nothing, one text or several."""
    if value in (None, "", [], {}):
        return ()
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else (str(value),)
