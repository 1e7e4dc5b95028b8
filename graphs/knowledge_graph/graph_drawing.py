"""A knowledge graph drawn: as the SVG of its page, and as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graft.atomic_files import new_file
from graft.graphs.knowledge_graph.graph_building import KnowledgeGraph, top_nodes
from graft.graphs.knowledge_graph.graph_layout import layout, places_of_names

if TYPE_CHECKING:
    import networkx

COLOURS = ("#2f6db3", "#c2527a", "#3a8f5c", "#8458b3", "#6b7280", "#b59a2a")  # of circles; none is a line's
_LINE, _VERB = "#7d848e", "#d9742b"
_SVG = (1000, 760)  # width, height
_INCHES, _DOTS = (11, 8), 144  # of the PNG, and dots an inch


def sorted_edges(graph: networkx.MultiDiGraph) -> list[tuple[int, int, dict[str, Any]]]:
    """Edges in one order, whatever order a view has."""
    return sorted(graph.edges(data=True), key=lambda edge: (edge[0], edge[1], edge[2]["relation"]))


def in_order(graph: networkx.MultiDiGraph, ordered: Sequence[int]) -> networkx.MultiDiGraph:
    """The same graph with nodes and edges in one order."""
    copy = graph.__class__()
    copy.add_nodes_from((node, graph.nodes[node]) for node in ordered)
    copy.add_edges_from(sorted_edges(graph))
    return copy


def short(text: str, length: int = 28) -> str:
    """A text on one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def colours_of_labels(graph: networkx.MultiDiGraph) -> dict[str, str]:
    """A colour for each label there is."""
    labels = sorted({label for _, label in graph.nodes(data="label")})
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def svg(graph: networkx.MultiDiGraph, edges: Sequence[tuple[int, int, int, bool]]) -> str:
    """The graph's nodes in their order, with names that the page's script shows, over its pairs.

    Args:
        graph: nodes and edges in order.
        edges: numbers of two nodes, weight, and whether a verb joins them.
    """
    radii, colours = _radii(graph), colours_of_labels(graph)
    places = layout(graph, radii, *_SVG).tolist()
    parts = [f'<svg viewBox="0 0 {_SVG[0]} {_SVG[1]}" role="img" aria-label="Knowledge graph">']
    opacity = _opacity(len(edges))
    for source, target, weight, says in edges:
        (x1, y1), (x2, y2) = places[source], places[target]
        kind = ' class="says"' if says else ""
        parts.append(
            f'<line{kind} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke-opacity="{opacity:.2f}" stroke-width="{_thickness(weight):.2f}"/>'
        )
    nodes = list(zip(places, radii.tolist(), graph.nodes.values(), strict=True))
    for (x, y), radius, node in nodes:
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colours[node["label"]]}">'
        parts.append(f"{circle}<title>{escape(node['name'])}</title></circle>")
    parts += [f'<text class="later">{escape(short(node["name"]))}</text>' for *_, node in nodes]
    return "".join([*parts, "</svg>"])


def _radii(graph: networkx.MultiDiGraph) -> NDArray[np.float64]:
    """Of each node's circle: grows with its edges, and is smaller where there are many nodes."""
    scale = max(min((300 / max(len(graph), 1)) ** 0.5, 1.0), 0.5)
    return np.array([scale * (3.5 + 1.6 * degree**0.5) for _, degree in graph.degree()])


def _thickness(weight: float) -> float:
    return float(min(0.4 + 0.25 * weight**0.5, 4))


def _opacity(edges: int) -> float:
    """Of a line: many are fainter, so that what lies below stays visible."""
    return float(max(0.6 * min((150 / max(edges, 1)) ** 0.5, 1.0), 0.15))


def write_picture(found: KnowledgeGraph, path: str | Path, title: str, at_most: int = 120, named: int = 60) -> Path:
    """Draw the largest connected part as a PNG; of more than `at_most` nodes, those of highest PageRank.

    Args:
        found: a graph with at least one node.
        path: of the file.
        title: a line above.
        at_most: nodes drawn.
        named: nodes whose names may cover circles where there is no better place; the others' are then left out.

    Raises:
        ValueError: the graph is empty.
    """
    import networkx
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not len(found.graph):
        raise ValueError("The graph is empty: no text named anything.")
    parts = networkx.weakly_connected_components(found.graph.subgraph(top_nodes(found.graph, at_most)))
    largest = max(map(sorted, parts), key=lambda part: (len(part), -part[0]))
    graph = in_order(found.graph.subgraph(largest), largest)
    figure = Figure(figsize=_INCHES, dpi=_DOTS, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.03, 0.96, 0.9))
    width, height = (72 * inches * share for inches, share in zip(_INCHES, (0.96, 0.9), strict=True))
    axes.set(xlim=(0, width), ylim=(height, 0))  # the unit is a point, as of radii and names
    axes.set_axis_off()
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=13, color="#22252a")
    radii = _radii(graph)
    places = layout(graph, radii, width, height)
    _draw_lines(axes, graph, places)
    colours = colours_of_labels(graph)
    shown = [colours[label] for _, label in graph.nodes(data="label")]
    axes.scatter(places[:, 0], places[:, 1], s=(2 * radii) ** 2, c=shown, edgecolors="white", zorder=2)
    _write_names(axes, graph, places, radii, named)
    _write_legend(axes, colours, graph)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return Path(path)


def _draw_lines(axes: Any, graph: networkx.MultiDiGraph, places: NDArray[np.float64]) -> None:
    from matplotlib.collections import LineCollection

    number = {node: index for index, node in enumerate(graph)}
    edges = sorted_edges(graph)
    for verbs, colour in ((False, _LINE), (True, _VERB)):
        chosen = [edge for edge in edges if ("verb" in edge[2]) == verbs]
        ends = [places[[number[source], number[target]]] for source, target, _ in chosen]
        widths = [_thickness(data["weight"]) for *_, data in chosen]
        look: dict[str, Any] = {
            "linewidths": widths,
            "colors": colour,
            "alpha": _opacity(len(edges)),
            "zorder": 1 + verbs / 2,
        }
        axes.add_collection(LineCollection(ends, **look), autolim=False)


def _write_names(
    axes: Any,
    graph: networkx.MultiDiGraph,
    places: NDArray[np.float64],
    radii: NDArray[np.float64],
    named: int,
) -> None:
    """Names below, above or beside their circles, those of highest PageRank first, where there is room."""
    from matplotlib.patheffects import withStroke

    number = {node: index for index, node in enumerate(graph)}
    ranked = top_nodes(graph, len(graph))
    names = [short(graph.nodes[node]["name"]) for node in ranked]
    indices = [number[node] for node in ranked]
    (x, y), away = places[indices].T, radii[indices] + 2
    width = np.array([4.4 * len(name) + 2 for name in names])  # a letter of this size is about so many points wide
    lefts = np.stack([x - width / 2, x - width / 2, x + away, x - away - width], axis=1)
    lefts = lefts.clip(0, axes.get_xlim()[1] - width[:, None])
    tops = np.stack([y + away, y - away - 9, y - 4.5, y - 4.5], axis=1)
    boxes = np.stack([lefts, tops, lefts + width[:, None], tops + 9], axis=2)
    sides = places_of_names(boxes, np.column_stack([places, radii]), named)
    for name, box, side in zip(names, boxes, sides, strict=True):
        if side >= 0:
            axes.text(
                box[side, [0, 2]].mean(),
                box[side, [1, 3]].mean(),
                name.replace("$", r"\$"),
                ha="center",
                va="center",
                fontsize=7.5,
                color="#22252a",
                zorder=3,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )


def _write_legend(axes: Any, colours: Mapping[str, str], graph: networkx.MultiDiGraph) -> None:
    """What the colours mean."""
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], color=colour, marker="o", linestyle="", markersize=5, label=label)
        for label, colour in colours.items()
    ]
    if any("verb" in data for *_, data in graph.edges(data=True)):
        dots.append(Line2D([], [], color=_VERB, label="joined by a verb"))
    axes.legend(handles=dots, loc="upper right", bbox_to_anchor=(1, 1.075), ncols=len(dots), frameon=False, fontsize=8)
