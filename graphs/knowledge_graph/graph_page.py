"""A knowledge graph to look at: one HTML page that asks nothing of any other machine, and a PNG."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import pages
from graft.atomic_files import new_file
from graft.graphs.knowledge_graph.graph_building import KnowledgeGraph, top_nodes
from graft.graphs.knowledge_graph.graph_layout import layout
from graft.graphs.knowledge_graph.mentions import TextChunk

if TYPE_CHECKING:
    import networkx

AT_MOST = 2000  # nodes on a page
SENTENCES = 12  # shown of a node
CHARACTERS = 600  # shown of a sentence
COLOURS = ("#2f6db3", "#d9742b", "#3a8f5c", "#a4508b", "#6b7280", "#b59a2a")

_STYLE = """<style>
body { max-width: 84rem; } #kg { display: grid; grid-template-columns: minmax(0, 1fr) 24rem; gap: 1.5rem; }
#kg svg { width: 100%; background: #fff; border: 1px solid #e4e4e0; border-radius: 6px; }
#kg circle { cursor: pointer; stroke: #fff; stroke-width: 1; } #kg line { stroke: #7d848e; }
#kg line.says { stroke: #d9742b; }
#kg text { font: 11px system-ui, sans-serif; fill: #22252a; pointer-events: none; paint-order: stroke;
           stroke: #fff; stroke-width: 3px; }
#kg .faint { opacity: .12; } #kg .chosen { stroke: #22252a; stroke-width: 3; }
#kg input { font: inherit; width: 100%; box-sizing: border-box; padding: .45rem .7rem; border: 1px solid #c9cbc6;
            border-radius: 6px; } #side { max-height: 46rem; overflow-y: auto; overflow-wrap: anywhere; }
#found button, #side button { font: inherit; color: #2f6db3; background: none; border: 0; padding: .1rem 0;
                             cursor: pointer; text-align: left; display: block; }
#side blockquote { margin: .7rem 0; padding-left: .8rem; border-left: 3px solid #e4e4e0; }
#side h3 { margin: 1rem 0 .2rem; } #side small { color: #5a6069; }
@media (max-width: 60rem) { #kg { display: block; } }
</style>
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const circles = [...document.querySelectorAll("#kg circle")], lines = [...document.querySelectorAll("#kg line")];
const words = [...document.querySelectorAll("#kg text")], side = document.getElementById("side");
const found = document.getElementById("found"), search = document.getElementById("search");
const near = data.nodes.map(() => new Map());
data.edges.forEach(([a, b, weight]) => { near[a].set(b, weight); near[b].set(a, weight); });
function add(parent, tag, text) {
  const element = document.createElement(tag); element.textContent = text; parent.append(element); return element;
}
function button(parent, index, text) { add(parent, "button", text).onclick = () => choose(index); }
function choose(index) {
  const node = data.nodes[index];
  circles.forEach((c, i) => {
    c.classList.toggle("faint", i !== index && !near[index].has(i)); c.classList.toggle("chosen", i === index);
  });
  lines.forEach((l, i) => l.classList.toggle("faint", data.edges[i][0] !== index && data.edges[i][1] !== index));
  words.forEach(w => w.classList.toggle("faint", +w.dataset.node !== index && !near[index].has(+w.dataset.node)));
  side.replaceChildren(); add(side, "h2", node.name);
  add(side, "small", node.label + ", " + node.count + " mentions. " + node.aliases.join(" | "));
  const others = [...near[index]].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 12);
  const list = add(side, "div", ""); list.id = "found";
  others.forEach(([other, weight]) => button(list, other, data.nodes[other].name + " (" + weight + ")"));
  const said = data.says.filter(([a, b]) => a === index || b === index).slice(0, 12);
  if (said.length) add(side, "h3", "What verbs say");
  said.forEach(([a, b, relation, weight, place, sentence]) => {
    const times = weight > 1 ? " (" + weight + ")" : "";
    const words = data.nodes[a].name + " \u2013 " + relation + " \u2192 " + data.nodes[b].name + times;
    button(side, a === index ? b : a, words); add(side, "blockquote", sentence); add(side, "small", place);
  });
  if (said.length) add(side, "h3", "Sentences");
  node.sentences.forEach(([place, sentence]) => {
    add(side, "blockquote", sentence); add(side, "small", place);
  });
}
circles.forEach((circle, index) => { circle.onclick = () => choose(index); });
search.oninput = () => {
  const asked = search.value.trim().toLowerCase(); found.replaceChildren();
  if (!asked) return;
  data.nodes.map((node, index) => [node, index])
    .filter(([node]) => [node.name, ...node.aliases].some(name => name.toLowerCase().includes(asked)))
    .slice(0, 20).forEach(([node, index]) => button(found, index, node.name));
};
search.onkeydown = event => { if (event.key === "Enter" && found.firstChild) found.firstChild.onclick(); };
"""


def write_page(found: KnowledgeGraph, chunks: Sequence[TextChunk], path: str | Path, title: str) -> Path:
    """Write the page: the graph, a search box, and the sentences of the node that is clicked.

    Args:
        found: over `AT_MOST` nodes, those of highest PageRank are shown, and the page says so.
        chunks: where the sentences are read from.
        path: of the HTML file.
        title: its heading.
    """
    nodes = top_nodes(found.graph, AT_MOST)
    graph = found.graph.subgraph(sorted(nodes))
    ordered = sorted(graph)
    number = {node: index for index, node in enumerate(ordered)}
    edges, texts = _lines(graph, number), {(chunk.document, chunk.index): chunk.text for chunk in chunks}
    says = _statements(graph, number, texts)
    whole = len(found.graph)
    shown = f"The {len(ordered)} nodes of highest PageRank, of {whole}" if whole > len(ordered) else f"{whole} nodes"
    verbs = f"; verbs say {len(says)} things of them (orange)" if says else ""
    words = f"{shown}, {len(edges)} pairs stand together{verbs}. Click a node to read the sentences it stands in."
    body = pages.paragraph(words) + _STYLE
    body += '<div id="kg"><div>' + _picture(graph, ordered, edges, [number[node] for node in nodes[:40]])
    body += '</div><div><input id="search" type="search" placeholder="Search" aria-label="Search">'
    body += '<div id="found"></div><div id="side"></div></div></div>\n'
    data = {"nodes": _node_data(found, graph, ordered, texts), "edges": edges, "says": says}
    inlined = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script
    body += f'<script type="application/json" id="data">{inlined}</script>\n<script>{_SCRIPT}</script>\n'
    pages.page(title, body, path)
    return Path(path)


def _edges(graph: networkx.MultiDiGraph) -> list[tuple[int, int, dict[str, Any]]]:
    return sorted(graph.edges(data=True), key=lambda edge: (edge[0], edge[1], edge[2]["relation"]))


def _lines(graph: networkx.MultiDiGraph, number: Mapping[int, int]) -> list[tuple[int, int, int, bool]]:
    """Each pair once: its two numbers, how often it stands together or a verb joins it, and whether one does."""
    pairs: dict[tuple[int, int], tuple[int, bool]] = {}
    for source, target, data in _edges(graph):
        pair = (min(number[source], number[target]), max(number[source], number[target]))
        weight, says = pairs.get(pair, (0, False))
        pairs[pair] = (max(weight, data["weight"]), says or "verb" in data)
    return [(*pair, *pairs[pair]) for pair in sorted(pairs)]


def _statements(
    graph: networkx.MultiDiGraph, number: Mapping[int, int], texts: Mapping[tuple[str, int], str]
) -> list[tuple[int, int, str, int, str, str]]:
    """What verbs say: who acts, on what, the relation, how often, and the first sentence with its place."""
    statements = []
    for source, target, data in _edges(graph):
        if "verb" in data:
            document, chunk, start, end = data["example"]
            place, sentence = (
                f"{document}, chunk {chunk}",
                _short(texts.get((document, chunk), "")[start:end], CHARACTERS),
            )
            statements.append((number[source], number[target], data["relation"], data["weight"], place, sentence))
    return statements


def _ordered_copy(graph: networkx.MultiDiGraph, ordered: Sequence[int]) -> networkx.MultiDiGraph:
    """The same graph with nodes and edges in one order, whatever order a view has."""
    copy = graph.__class__()
    copy.add_nodes_from((node, graph.nodes[node]) for node in ordered)
    copy.add_edges_from(_edges(graph))
    return copy


def _radius(graph: networkx.MultiDiGraph, node: int) -> float:
    return float(3.5 + 1.6 * graph.degree(node) ** 0.5)


def _colours(graph: networkx.MultiDiGraph, ordered: Sequence[int]) -> list[str]:
    labels = sorted({graph.nodes[node]["label"] for node in ordered})
    return [COLOURS[labels.index(graph.nodes[node]["label"]) % len(COLOURS)] for node in ordered]


def _picture(
    graph: networkx.MultiDiGraph,
    ordered: Sequence[int],
    edges: Sequence[tuple[int, int, int, bool]],
    named: Sequence[int],
) -> str:
    """An SVG of 1000 x 800; the nodes `named` carry their names."""
    places = [(30 + 900 * x, 25 + 750 * y) for x, y in layout(_ordered_copy(graph, ordered)).tolist()]
    parts = ['<svg viewBox="0 0 1000 800" role="img" aria-label="Knowledge graph">']
    for source, target, weight, says in edges:
        (x1, y1), (x2, y2) = places[source], places[target]
        width, kind = min(0.4 + 0.25 * weight**0.5, 4), ' class="says"' if says else ""
        parts.append(
            f'<line{kind} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke-opacity="0.6" stroke-width="{width:.2f}"/>'
        )
    for node, (x, y), colour in zip(ordered, places, _colours(graph, ordered), strict=True):
        name = escape(graph.nodes[node]["name"])
        radius = _radius(graph, node)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}"><title>{name}</title></circle>'
        )
    for index in sorted(named):
        (x, y), node = places[index], ordered[index]
        name = escape(_short(graph.nodes[node]["name"]))
        parts.append(f'<text x="{x + _radius(graph, node) + 2:.1f}" y="{y + 4:.1f}" data-node="{index}">{name}</text>')
    return "".join([*parts, "</svg>"])


def _node_data(
    found: KnowledgeGraph,
    graph: networkx.MultiDiGraph,
    ordered: Sequence[int],
    texts: Mapping[tuple[str, int], str],
) -> list[dict[str, Any]]:
    sentences = _sentences(found, texts)
    return [
        {
            "name": graph.nodes[node]["name"],
            "label": graph.nodes[node]["label"],
            "count": graph.nodes[node]["count"],
            "aliases": [alias for alias in graph.nodes[node]["aliases"] if alias != graph.nodes[node]["name"]][:8],
            "sentences": sentences[node],
        }
        for node in ordered
    ]


def _sentences(found: KnowledgeGraph, texts: Mapping[tuple[str, int], str]) -> dict[int, list[tuple[str, str]]]:
    """The first sentences of each node, each with its place."""
    sentences: dict[int, dict[tuple[str, str], None]] = defaultdict(dict)  # a dict keeps order and drops repetitions
    for mention, entity in zip(found.mentions, found.entities, strict=True):
        text = texts.get((mention.document, mention.chunk))
        if text is not None and entity in found.graph and len(sentences[entity]) < SENTENCES:
            shown = _short(text[mention.sentence_start : mention.sentence_end], CHARACTERS)
            sentences[entity][f"{mention.document}, chunk {mention.chunk}", shown] = None
    return {node: list(sentences[node]) for node in found.graph}


def _short(text: str, length: int = 28) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def write_picture(found: KnowledgeGraph, path: str | Path, title: str, at_most: int = 120, named: int = 45) -> Path:
    """Draw the largest connected part as a PNG; of more than `at_most` nodes, those of highest PageRank.

    Args:
        found: a graph with at least one node.
        path: of the file.
        title: a line above.
        at_most: nodes drawn.
        named: nodes whose names are written.

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
    graph = _ordered_copy(found.graph.subgraph(largest), largest)
    places = layout(graph)
    figure = Figure(figsize=(11, 8), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=13, color="#22252a")
    number = {node: index for index, node in enumerate(largest)}
    for source, target, data in _edges(graph):
        ends = places[[number[source], number[target]]]
        width = min(0.4 + 0.25 * data["weight"] ** 0.5, 4)
        colour, height = ("#d9742b", 1.5) if "verb" in data else ("#7d848e", 1)
        axes.plot(ends[:, 0], ends[:, 1], color=colour, alpha=0.6, linewidth=width, zorder=height)
    sizes = [_radius(graph, node) ** 2 * 2 for node in largest]
    axes.scatter(places[:, 0], places[:, 1], s=sizes, c=_colours(graph, largest), edgecolors="white", zorder=2)
    for node in top_nodes(graph, named):
        x, y = places[number[node]]
        name = _short(graph.nodes[node]["name"]).replace("$", r"\$")
        axes.annotate(
            name,
            (x, y),
            (0, -_radius(graph, node) - 3),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7.5,
        )
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return Path(path)
