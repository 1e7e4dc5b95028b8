"""A knowledge graph to look at: one HTML page that asks nothing of any other machine."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import pages
from graft.graphs.knowledge_graph.graph_building import KnowledgeGraph, top_nodes
from graft.graphs.knowledge_graph.graph_drawing import colours_of_labels, in_order, short, sorted_edges, svg
from graft.graphs.knowledge_graph.graph_page_script import SCRIPT, STYLE
from graft.graphs.knowledge_graph.mentions import TextChunk

if TYPE_CHECKING:
    import networkx

AT_MOST = 2000  # nodes on a page
SENTENCES = 12  # shown of a node
CHARACTERS = 600  # shown of a sentence


def write_page(found: KnowledgeGraph, chunks: Sequence[TextChunk], path: str | Path, title: str) -> Path:
    """Write the page: the graph, a search box, and the sentences of the node that is clicked.

    Args:
        found: over `AT_MOST` nodes, those of highest PageRank are shown, and the page says so.
        chunks: where the sentences are read from.
        path: of the HTML file.
        title: its heading.
    """
    nodes = top_nodes(found.graph, AT_MOST)
    ordered = sorted(nodes)
    graph = in_order(found.graph.subgraph(ordered), ordered)
    number = {node: index for index, node in enumerate(ordered)}
    edges, texts = _lines(graph, number), {(chunk.document, chunk.index): chunk.text for chunk in chunks}
    says = _statements(graph, number, texts)
    whole = len(found.graph)
    shown = f"The {len(ordered)} nodes of highest PageRank, of {whole}" if whole > len(ordered) else f"{whole} nodes"
    verbs = f"; verbs say {len(says)} things of them (orange lines)" if says else ""
    words = (
        f"{shown}, {len(edges)} pairs stand together{verbs}. Click a node to read the sentences it stands in; zoom in "
    )
    words += "for more names."
    body = pages.paragraph(words) + STYLE + '<div id="kg"><div>' + _legend(graph) + svg(graph, edges)
    body += '</div><div><input id="search" type="search" placeholder="Search" aria-label="Search">'
    body += '<div id="found"></div><div id="side"></div></div></div>\n'
    data = {"nodes": _node_data(found, graph, ordered, texts), "edges": edges, "says": says}
    data["order"] = [number[node] for node in nodes]
    inlined = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script
    body += f'<script type="application/json" id="data">{inlined}</script>\n<script>{SCRIPT}</script>\n'
    pages.page(title, body, path)
    return Path(path)


def _legend(graph: networkx.MultiDiGraph) -> str:
    """What the colours of circles mean, and the buttons that zoom."""
    colours = colours_of_labels(graph).items()
    labels = "".join(f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in colours)
    buttons = (("closer", "+", "Zoom in"), ("farther", "\u2212", "Zoom out"), ("all", "All", "Show all"))
    zoom = "".join(f'<button id="{name}" title="{says}">{sign}</button>' for name, sign, says in buttons)
    return f'<div id="legend">{labels}<span id="zoom">{zoom}</span></div>'


def _lines(graph: networkx.MultiDiGraph, number: Mapping[int, int]) -> list[tuple[int, int, int, bool]]:
    """Each pair once: its two numbers, how often it stands together or a verb joins it, and whether one does."""
    pairs: dict[tuple[int, int], tuple[int, bool]] = {}
    for source, target, data in sorted_edges(graph):
        pair = (min(number[source], number[target]), max(number[source], number[target]))
        weight, says = pairs.get(pair, (0, False))
        pairs[pair] = (max(weight, data["weight"]), says or "verb" in data)
    return [(*pair, *pairs[pair]) for pair in sorted(pairs)]


def _statements(
    graph: networkx.MultiDiGraph, number: Mapping[int, int], texts: Mapping[tuple[str, int], str]
) -> list[tuple[int, int, str, int, str, str]]:
    """What verbs say: who acts, on what, the relation, how often, and the first sentence with its place."""
    statements = []
    for source, target, data in sorted_edges(graph):
        if "verb" in data:
            document, chunk, start, end = data["example"]
            place, sentence = (
                f"{document}, chunk {chunk}",
                short(texts.get((document, chunk), "")[start:end], CHARACTERS),
            )
            statements.append((number[source], number[target], data["relation"], data["weight"], place, sentence))
    return statements


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
            shown = short(text[mention.sentence_start : mention.sentence_end], CHARACTERS)
            sentences[entity][f"{mention.document}, chunk {mention.chunk}", shown] = None
    return {node: list(sentences[node]) for node in found.graph}
