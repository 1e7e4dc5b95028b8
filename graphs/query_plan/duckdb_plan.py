"""Plans of DuckDB, as `EXPLAIN (FORMAT json)` gives them."""

from __future__ import annotations

import re
from typing import Any

from graft.graphs.query_plan.plan_operator import PlanOperator, made_bottom_up, parse_plan, texts

_KINDS = {
    **dict.fromkeys(("SEQ_SCAN", "TABLE_SCAN"), "scan"),
    "INDEX_SCAN": "index_scan",
    **dict.fromkeys(("COLUMN_DATA_SCAN", "DELIM_SCAN", "CTE_SCAN", "DUMMY_SCAN", "EMPTY_RESULT"), "other_scan"),
    **dict.fromkeys(("HASH_JOIN", "LEFT_DELIM_JOIN", "RIGHT_DELIM_JOIN"), "hash_join"),
    **dict.fromkeys(("PIECEWISE_MERGE_JOIN", "IE_JOIN", "ASOF_JOIN"), "merge_join"),
    **dict.fromkeys(("NESTED_LOOP_JOIN", "BLOCKWISE_NL_JOIN", "CROSS_PRODUCT"), "loop_join"),
    "HASH_GROUP_BY": "hash_aggregate",
    "PERFECT_HASH_GROUP_BY": "perfect_aggregate",
    "PARTITIONED_AGGREGATE": "sorted_aggregate",
    **dict.fromkeys(("UNGROUPED_AGGREGATE", "SIMPLE_AGGREGATE"), "plain_aggregate"),
    "PROJECTION": "projection",
    "FILTER": "filter",
    "ORDER_BY": "sort",
    "TOP_N": "top_n",
    **dict.fromkeys(("LIMIT", "STREAMING_LIMIT", "LIMIT_PERCENT"), "limit"),
    "UNION": "union",
    **dict.fromkeys(("WINDOW", "STREAMING_WINDOW"), "window"),
    "CTE": "materialise",
}
# What DuckDB puts around a column so that it sorts and groups a shorter one.
_PACKED = re.compile(r"(?:__internal_(?:de)?compress_\w+|CAST)\(([\w.]+)(?: AS \w+)?\)")


def read_duckdb_plan(plan: str | list[Any] | dict[str, Any]) -> PlanOperator:
    """The operators of a plan, from `EXPLAIN (FORMAT json)`.

    Raises:
        ValueError: the JSON is of another shape.
    """
    return made_bottom_up(parse_plan(plan, "DuckDB"), _inputs, _operator)


def _inputs(node: dict[str, Any]) -> list[dict[str, Any]]:
    children = node.get("children", [])
    if not isinstance(node.get("name"), str) or not isinstance(children, list):
        raise ValueError(
            f"each node of a DuckDB plan has a `name` and a list of `children`, got one with {sorted(node)}."
        )
    if any(not isinstance(child, dict) for child in children):
        raise ValueError(f"`children` of {node['name']} must be objects, got {children!r:.80}.")
    return children


def _operator(node: dict[str, Any], children: tuple[PlanOperator, ...]) -> PlanOperator:
    information = node.get("extra_info") or {}
    if not isinstance(information, dict):
        raise ValueError(f"`extra_info` of {node['name']} must be an object, got {information!r:.80}.")
    name = node["name"].strip()
    kind = _KINDS.get(name, "other_scan" if "SCAN" in name or name.startswith("READ_") else "other")
    projections = texts(information.get("Projections"))
    groups, aggregates = texts(information.get("Groups")), texts(information.get("Aggregates"))
    order = texts(information.get("Order By"))
    reads_table = "Table" in information
    return PlanOperator(
        kind=kind,
        name=name,
        rows=_cardinality(name, information.get("Estimated Cardinality"), children),
        children=children,
        table=str(information["Table"]) if reads_table else None,
        columns=projections if reads_table else (),
        predicates=tuple(
            text for field in ("Filters", "Expression", "Conditions") for text in texts(information.get(field))
        ),
        join_type=_join_type(information.get("Join Type")) if kind.endswith("_join") else None,
        outputs=len(projections),
        groups=len(groups),
        aggregates=len(aggregates),
        sort_keys=len(order),
        keys=_resolved(groups + order, children),
        expressions=_resolved(groups + aggregates or projections, children) or _passed_on(kind, children),
        computed=projections + aggregates,
    )


def _resolved(expressions: tuple[str, ...], children: tuple[PlanOperator, ...]) -> tuple[str, ...]:
    """Expressions with places of the only input, such as #0, replaced by what stands there, without what packs it."""
    below = children[0].expressions if len(children) == 1 else ()

    def at_place(found: re.Match[str]) -> str:
        place = int(found[1])
        return below[place] if place < len(below) else found[0]

    return tuple(_PACKED.sub(r"\1", re.sub(r"#(\d+)", at_place, text)) for text in expressions)


def _passed_on(kind: str, children: tuple[PlanOperator, ...]) -> tuple[str, ...]:
    """What comes out of an operator that computes nothing; which columns a join keeps, no plan tells."""
    return children[0].expressions if len(children) == 1 and kind in ("filter", "sort", "top_n", "limit") else ()


def _cardinality(name: str, text: Any, children: tuple[PlanOperator, ...]) -> float:
    """The estimate, or where DuckDB writes none (a limit, a cross product of nothing), the largest child's."""
    if text is None:
        return max((child.rows for child in children), default=0.0)
    digits = re.sub(r"[~,\s]", "", str(text))
    if not re.fullmatch(r"\d+(\.\d+)?", digits):
        raise ValueError(f"`Estimated Cardinality` of {name} must be a number, got {text!r}.")
    return float(digits)


def _join_type(text: Any) -> str:
    word = str(text or "INNER").upper()
    for part, kind in (("ANTI", "anti"), ("SEMI", "semi"), ("INNER", "inner")):
        if part in word:
            return kind
    return "outer" if word in ("LEFT", "RIGHT", "OUTER", "FULL") else "other_join"
