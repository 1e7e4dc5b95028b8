"""Plans of PostgreSQL, as `EXPLAIN (FORMAT JSON)` gives them, with or without VERBOSE and ANALYZE."""

from __future__ import annotations

import re
from typing import Any

from graft.graphs.query_plan.plan_operator import PlanOperator, made_bottom_up, parse_plan, texts

_KINDS = {
    **dict.fromkeys(("Seq Scan", "Sample Scan", "Tid Scan", "Bitmap Heap Scan"), "scan"),
    **dict.fromkeys(("Index Scan", "Index Only Scan", "Bitmap Index Scan"), "index_scan"),
    "Hash Join": "hash_join",
    "Merge Join": "merge_join",
    "Nested Loop": "loop_join",
    "Hash": "hash_build",
    "Result": "projection",
    **dict.fromkeys(("Sort", "Incremental Sort"), "sort"),
    "Limit": "limit",
    **dict.fromkeys(("Append", "Merge Append"), "union"),
    "WindowAgg": "window",
    **dict.fromkeys(("Materialize", "Memoize"), "materialise"),
    **dict.fromkeys(("Unique", "Group"), "sorted_aggregate"),
}
_STRATEGIES = {
    "Plain": "plain_aggregate",
    "Sorted": "sorted_aggregate",
    "Hashed": "hash_aggregate",
    "Mixed": "hash_aggregate",
}
_CONDITIONS = ("Filter", "Index Cond", "Recheck Cond", "Hash Cond", "Merge Cond", "Join Filter")
_JOINS = {
    "Inner": "inner",
    **dict.fromkeys(("Left", "Right", "Full"), "outer"),
    **dict.fromkeys(("Semi", "Right Semi"), "semi"),
    **dict.fromkeys(("Anti", "Right Anti"), "anti"),
}


def read_postgres_plan(plan: str | list[Any] | dict[str, Any]) -> PlanOperator:
    """The operators of a plan, from `EXPLAIN (FORMAT JSON)`.

    Raises:
        ValueError: the JSON is of another shape.
    """
    root = parse_plan(plan, "PostgreSQL").get("Plan")
    if not isinstance(root, dict):
        raise ValueError("a PostgreSQL plan is an object with a `Plan`, as EXPLAIN (FORMAT JSON) gives it.")
    return made_bottom_up(root, _inputs, _operator)


def _inputs(node: dict[str, Any]) -> list[dict[str, Any]]:
    children = node.get("Plans", [])
    if not isinstance(node.get("Node Type"), str) or not isinstance(node.get("Plan Rows"), int | float):
        raise ValueError(
            f"each node of a PostgreSQL plan has a `Node Type` and `Plan Rows`, got one with {sorted(node)}."
        )
    if not isinstance(children, list) or any(not isinstance(child, dict) for child in children):
        raise ValueError(f"`Plans` of {node['Node Type']} must be a list of objects, got {children!r:.80}.")
    return children


def _operator(node: dict[str, Any], children: tuple[PlanOperator, ...]) -> PlanOperator:
    name = node["Node Type"]
    kind = _KINDS.get(name, "other_scan" if name.endswith("Scan") else "other")
    if name == "Aggregate":
        kind = _STRATEGIES.get(str(node.get("Strategy", "Plain")), "other")
    elif name == "SetOp":
        kind = "hash_aggregate" if node.get("Strategy") == "Hashed" else "sorted_aggregate"
    output, groups, order = (texts(node.get(field)) for field in ("Output", "Group Key", "Sort Key"))
    table = ".".join(str(node[key]) for key in ("Schema", "Relation Name") if key in node) or None
    return PlanOperator(
        kind=kind,
        name=name,
        rows=float(node["Plan Rows"]),
        children=children,
        table=table if "Relation Name" in node else None,
        columns=tuple(_column(text) for text in output) if "Relation Name" in node else (),
        predicates=tuple(text for field in _CONDITIONS for text in texts(node.get(field))),
        join_type=_JOINS.get(str(node.get("Join Type")), "other_join") if kind.endswith("_join") else None,
        row_bytes=float(node.get("Plan Width", 0)),
        outputs=len(output),
        groups=len(groups),
        aggregates=sum(_is_aggregate(text) for text in output) if kind.endswith("_aggregate") else 0,
        sort_keys=len(order),
        keys=groups + order,
        expressions=output,
        computed=output if kind.endswith("_aggregate") or kind == "projection" else (),
    )


def _column(text: str) -> str:
    """The column of `alias.column`, without quotes."""
    return text.rpartition(".")[2].strip('"')


def _is_aggregate(text: str) -> bool:
    """Whether an output of an aggregate is computed by it and not a key of the group."""
    return re.match(r"(PARTIAL )?\w+\(", text) is not None
