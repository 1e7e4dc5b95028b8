"""Where nodes are drawn: springs along edges, all nodes pushing each other away; seeded, so it repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import networkx


def spring_layout(graph: networkx.MultiDiGraph, steps: int = 80, seed: int = 0) -> NDArray[np.float64]:
    """Positions (nodes, 2) within [0, 1], in the order of the nodes (Fruchterman and Reingold, 1991).

    Push k^2 / d between all pairs, pull d^2 / k along edges by the root of their weight, and a pull to the middle that
    keeps parts together. O(nodes^2) a step.
    """
    count = len(graph)
    places = np.random.default_rng(seed).random((count, 2))
    if count < 2:
        return np.full((count, 2), 0.5)
    number = {node: index for index, node in enumerate(graph)}
    ends = [(number[s], number[t], data["weight"]) for s, t, data in graph.edges(data=True)]
    source, target = (np.array([end[side] for end in ends], dtype=np.intp) for side in (0, 1))
    pull = np.sqrt([float(end[2]) for end in ends])
    pull /= pull.max(initial=1.0)
    ideal = 1 / np.sqrt(count)
    for step in range(steps):
        force = _pushes(places, ideal) + (0.5 - places) * 0.3
        along = places[target] - places[source]
        along *= (np.linalg.norm(along, axis=1) * pull / ideal)[:, None]
        for axis in (0, 1):
            force[:, axis] += np.bincount(source, along[:, axis], count) - np.bincount(target, along[:, axis], count)
        length = np.linalg.norm(force, axis=1, keepdims=True)
        reach = 0.1 * (1 - step / steps) + 0.001
        places = places + force / np.maximum(length, 1e-9) * np.minimum(length, reach)
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)


def _pushes(places: NDArray[np.float64], ideal: float) -> NDArray[np.float64]:
    """Sum over other nodes of k^2 / d in their opposite direction, in blocks of rows."""
    pushes = np.empty_like(places)
    for first in range(0, len(places), 512):
        apart = places[first : first + 512, None] - places[None]
        squared = np.maximum((apart**2).sum(-1, keepdims=True), 1e-6)
        pushes[first : first + 512] = (apart / squared).sum(1) * ideal**2
    return pushes
