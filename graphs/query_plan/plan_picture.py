"""A picture of a plan: operators as a tree, what describes them below and beside their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.configuration.configuration_query_graph import EDGE_SLOTS, NODE_FEATURES, NODE_TYPES
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

_COLOURS = ("#dbe9f6", "#fde3c8", "#e3f1dc", "#f6dbe6")  # operator, table, column, predicate
_ROWS = NODE_FEATURES["operator"].index("rows")
_DESCRIPTION = EDGE_SLOTS.index("description")
_GAP = 4.0  # letters between two boxes
_LETTER, _LEVEL = 0.068, 0.62  # inches of a letter of this size, and of a level


def tree_places(graph: QueryPlanGraph) -> list[tuple[float, float, float]]:
    """Each node's (x, y, width of its box): x and widths in letters, y as levels below the root, downwards negative.

    A node stands under that of its readers which lies lowest; an operator over its inputs, another over all below it.
    What stands below a node is pushed together, from left to right, until boxes of one level meet.
    """
    depth, below = _lowest_readers(graph)
    widths = [float(max(map(len, _label(graph, node).splitlines()))) for node in range(len(depth))]
    outlines: list[dict[int, tuple[float, float]]] = []  # of each node and what is below: level -> left, right
    moved = [0.0] * len(depth)  # from the node it stands under
    for node, width in enumerate(widths):  # children come before parents
        outline: dict[int, tuple[float, float]] = {}
        for child, _ in below[node]:
            own = outlines[child]
            moved[child] = max((outline[at][1] + _GAP - own[at][0] for at in own if at in outline), default=0.0)
            for at, (left, right) in own.items():
                outline[at] = outline.get(at, (left + moved[child],))[0], right + moved[child]
        over = [child for child, is_input in below[node] if is_input] or [child for child, _ in below[node]]
        middle = sum(moved[child] for child in over) / max(len(over), 1)
        for child, _ in below[node]:
            moved[child] -= middle
        outlines.append({at: (left - middle, right - middle) for at, (left, right) in outline.items()})
        outlines[node][depth[node]] = -width / 2, width / 2
    across = [0.0] * len(depth)
    for node in reversed(range(len(depth))):
        for child, _ in below[node]:
            across[child] = across[node] + moved[child]
    return [(x, -float(level), width) for x, level, width in zip(across, depth, widths, strict=True)]


def _lowest_readers(graph: QueryPlanGraph) -> tuple[list[int], list[list[tuple[int, bool]]]]:
    """Edges on the longest path of each node to the root; and below each node what it is the lowest reader of, in
    order, with whether that is an input."""
    depth = [0] * len(graph.names)
    readers: list[list[tuple[int, bool]]] = [[] for _ in depth]
    for (source, target), slot in zip(graph.edges.T.tolist(), graph.slots.tolist(), strict=True):
        readers[source].append((target, slot != _DESCRIPTION))
    below: list[list[tuple[int, bool]]] = [[] for _ in depth]
    for node in reversed(range(len(depth))):
        if readers[node]:
            reader, is_input = max(readers[node], key=lambda edge: depth[edge[0]])
            depth[node] = depth[reader] + 1
            below[reader].insert(0, (node, is_input))
    return depth, below


def draw_plan(graph: QueryPlanGraph, path: Path | str, title: str = "") -> Path:
    """Write the plan as a picture; the suffix of `path` chooses the format (png, svg, pdf).

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    places = tree_places(graph)
    left, right = min(x - width / 2 for x, _, width in places) - 2, max(x + width / 2 for x, _, width in places) + 2
    lowest = min(y for _, y, _ in places)
    size = min(40.0, max(5.0, _LETTER * (right - left))), min(40.0, 1.0 + _LEVEL * (1 - lowest))
    figure = Figure(figsize=size, dpi=144, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for (source, target), slot in zip(graph.edges.T.tolist(), graph.slots.tolist(), strict=True):
        ends = zip(places[source][:2], places[target][:2], strict=True)
        axes.plot(*ends, ":" if slot == _DESCRIPTION else "-", color="grey", linewidth=1, zorder=1)
    for node, ((x, y, _), kind) in enumerate(zip(places, graph.node_types.tolist(), strict=True)):
        box = {"boxstyle": "round", "facecolor": _COLOURS[kind], "edgecolor": "grey"}
        axes.text(x, y, _label(graph, node), ha="center", va="center", fontsize=8, bbox=box, parse_math=False)
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.set(xlim=(left, right), ylim=(lowest - 0.5, 0.5))
    axes.axis("off")
    figure.legend(handles=_legend(graph), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    return Path(path)


def _legend(graph: QueryPlanGraph) -> list[Any]:
    """What colours and lines mean, of those there are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [("operator, rows expected", 0), *((name, kind) for kind, name in enumerate(NODE_TYPES) if kind)]
    there = set(graph.node_types.tolist())
    boxes = [Patch(facecolor=_COLOURS[kind], edgecolor="grey", label=name) for name, kind in kinds if kind in there]
    slots = set(graph.slots.tolist())
    lines = []
    if slots - {_DESCRIPTION}:
        lines.append(Line2D([], [], color="grey", linewidth=1, label="gives its rows to"))
    if _DESCRIPTION in slots:
        lines.append(Line2D([], [], color="grey", linewidth=1, linestyle=":", label="is read or compared by"))
    return boxes + lines


def _label(graph: QueryPlanGraph, node: int) -> str:
    name = graph.names[node]
    name = name if len(name) <= 28 else name[:27] + "…"
    if graph.node_types[node] != NODE_TYPES.index("operator"):
        return name
    rows = f"{10 ** float(graph.features[node, _ROWS]) - 1:,.0f}"
    return f"{name}\n{rows} row{'s' * (rows != '1')}"
