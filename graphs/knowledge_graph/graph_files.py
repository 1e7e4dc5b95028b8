"""A knowledge graph in files: GraphML and JSON that other tools read, and its mentions in Parquet."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from graft.atomic_files import new_file, write_json
from graft.graphs.knowledge_graph.graph_building import KnowledgeGraph
from graft.graphs.knowledge_graph.mention_shards import mentions_table

if TYPE_CHECKING:
    import networkx

_LISTS = ("aliases", "chunks", "example", "verb")  # GraphML has no lists; these are JSON inside
# XML 1.0 cannot hold other control characters, not even escaped.
_NOT_XML = {code: "\ufffd" for code in [*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)]}


def write_graphml(graph: networkx.MultiDiGraph, path: str | Path) -> Path:
    """Write GraphML; lists and dictionaries become JSON strings, characters that XML lacks become U+FFFD."""
    import networkx

    flat = networkx.MultiDiGraph()
    flat.add_nodes_from((node, _flat(data)) for node, data in graph.nodes(data=True))
    flat.add_edges_from((s, t, key, _flat(data)) for s, t, key, data in graph.edges(keys=True, data=True))
    with new_file(path) as temporary:
        networkx.write_graphml_xml(flat, temporary, encoding="utf-8")
    return Path(path)


def read_graphml(path: str | Path) -> networkx.MultiDiGraph:
    """Read what `write_graphml` wrote, lists and dictionaries included."""
    import networkx

    graph = networkx.read_graphml(path, node_type=int, force_multigraph=True)
    for _, data in graph.nodes(data=True):
        _unfold(data)
    for *_, data in graph.edges(data=True):
        _unfold(data)
    return graph


def write_graph_json(graph: networkx.MultiDiGraph, path: str | Path) -> Path:
    """Write networkx's node-link form."""
    import networkx

    return write_json(path, networkx.node_link_data(graph, edges="edges"))


def read_graph_json(path: str | Path) -> networkx.MultiDiGraph:
    """Read what `write_graph_json` wrote."""
    import networkx

    return networkx.node_link_graph(json.loads(Path(path).read_text(encoding="utf-8")), edges="edges")


def write_mentions(found: KnowledgeGraph, path: str | Path) -> Path:
    """Write every mention with the number of its entity, `node`; those whose node was dropped keep the number."""
    table = mentions_table(found.mentions).append_column("node", pa.array(found.entities, type=pa.int64()))
    with new_file(path) as temporary:
        pq.write_table(table, temporary)
    return Path(path)


def write_merges(found: KnowledgeGraph, path: str | Path) -> Path:
    """Write which names became one, and by which rule."""
    return write_json(path, [asdict(merge) for merge in found.merges])


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    flat = {key: json.dumps(value, ensure_ascii=False) if key in _LISTS else value for key, value in data.items()}
    return {key: value.translate(_NOT_XML) if isinstance(value, str) else value for key, value in flat.items()}


def _unfold(data: dict[str, Any]) -> None:
    for key in _LISTS:
        if key in data:
            data[key] = json.loads(data[key])
