"""Where nodes are drawn: those with edges by springs, the others in rows below; seeded, so it repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import networkx


def layout(graph: networkx.MultiDiGraph, seed: int = 0) -> NDArray[np.float64]:
    """Positions (nodes, 2) within [0, 1], y downwards, in the order of the nodes."""
    joined = [node for node in graph if graph.degree(node)]
    alone = [node for node in graph if not graph.degree(node)]
    below = (0.15 if joined else 1.0) if alone else 0.0  # of the height
    places: dict[int, NDArray[np.float64]] = {}
    if joined:
        above = (1.0, 1.0 - below - (0.03 if alone else 0.0))
        places |= zip(joined, _springs(graph, joined, seed) * above, strict=True)
    if alone:
        places |= zip(alone, _rows(len(alone), below) * (1.0, below) + (0.0, 1.0 - below), strict=True)
    return np.array([places[node] for node in graph]).reshape(-1, 2)


def _springs(graph: networkx.MultiDiGraph, nodes: Sequence[int], seed: int) -> NDArray[np.float64]:
    """networkx's spring layout (Fruchterman and Reingold 1991) of a copy: a view has no order of its own."""
    import networkx

    simple = networkx.Graph()
    simple.add_nodes_from(nodes)
    for source, target, weight in graph.edges(data="weight"):
        before = simple.get_edge_data(source, target, {"weight": 0.0})["weight"]
        simple.add_edge(source, target, weight=before + math.sqrt(weight))
    found = networkx.spring_layout(simple, seed=seed, iterations=80, k=2.0 / math.sqrt(len(simple)))
    places = np.array([found[node] for node in nodes])
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)


def _rows(count: int, height: float) -> NDArray[np.float64]:
    """Positions (count, 2) within [0, 1] of a grid whose cells are about square in a strip of this height."""
    columns = math.ceil(math.sqrt(count / height))
    index = np.arange(count)
    return np.stack([(index % columns + 0.5) / columns, (index // columns + 0.5) / math.ceil(count / columns)], axis=1)
