"""A picture of a plan: operators as a tree, what describes them beside."""

from __future__ import annotations

from pathlib import Path

from graft.configuration.configuration_query_graph import EDGE_SLOTS, NODE_FEATURES, NODE_TYPES
from graft.graphs.query_plan.query_plan_graph import QueryPlanGraph

_COLOURS = ("#dbe9f6", "#fde3c8", "#e3f1dc", "#f6dbe6")  # operator, table, column, predicate
_ROWS = NODE_FEATURES["operator"].index("rows")


def tree_places(graph: QueryPlanGraph) -> list[tuple[float, float]]:
    """Where each node stands: leaves side by side in their order, others over the middle of what they read."""
    read: list[list[int]] = [[] for _ in graph.names]
    for source, target in graph.edges.T.tolist():
        read[target].append(source)
    across: list[float] = []
    leaves = 0
    for below in read:  # children come before parents
        if below:
            across.append(sum(across[node] for node in below) / len(below))
        else:
            across.append(float(leaves))
            leaves += 1
    return list(zip(across, map(float, graph.levels.tolist()), strict=True))


def draw_plan(graph: QueryPlanGraph, path: Path | str, title: str = "") -> Path:
    """Write the plan as a picture; the suffix of `path` chooses the format (png, svg, pdf).

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    places = tree_places(graph)
    width, height = (1 + max(place[axis] for place in places) for axis in (0, 1))
    figure = Figure(
        figsize=(min(40.0, max(5.0, 1.7 * width)), min(40.0, max(3.0, 0.9 * height))), layout="constrained"
    )
    axes = figure.add_subplot()
    for (source, target), slot in zip(graph.edges.T.tolist(), graph.slots.tolist(), strict=True):
        (x, y), (to_x, to_y) = places[source], places[target]
        style = ":" if EDGE_SLOTS[slot] == "description" else "-"
        axes.plot([x, to_x], [y, to_y], style, color="grey", linewidth=1, zorder=1)
    for node, ((x, y), kind) in enumerate(zip(places, graph.node_types.tolist(), strict=True)):
        box = {"boxstyle": "round", "facecolor": _COLOURS[kind], "edgecolor": "grey"}
        axes.text(x, y, _label(graph, node), ha="center", va="center", fontsize=7, bbox=box, parse_math=False)
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set(xlim=(-0.7, width - 0.3), ylim=(-0.6, height - 0.4))
    axes.axis("off")
    figure.savefig(path)
    return Path(path)


def _label(graph: QueryPlanGraph, node: int) -> str:
    name = graph.names[node]
    name = name if len(name) <= 28 else name[:27] + "…"
    if graph.node_types[node] != NODE_TYPES.index("operator"):
        return name
    return f"{name}\n{10 ** float(graph.features[node, _ROWS]) - 1:,.0f} rows"
