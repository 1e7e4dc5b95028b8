"""Where nodes are drawn: each connected part by springs in a field of its own, single nodes in rows; it repeats.

Springs alone pile a large graph up in the middle, because words that stand with everything pull everything together.
So an edge pulls less where its ends have many, coordinates of large parts move towards their ranks, which evens the
density out and keeps what is left of what, and circles that overlap push each other apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import networkx

Places = NDArray[np.float64]
Field = tuple[float, float, float, float]  # left, top, width, height


def layout(
    graph: networkx.MultiDiGraph, radii: Sequence[float] | Places, width: float, height: float, seed: int = 0
) -> Places:
    """Positions (nodes, 2) of circles within [0, width] x [0, height], y downwards, in the order of the nodes.

    Args:
        graph: edges have a `weight`.
        radii: of the nodes' circles. Circles overlap only where they have no room, and then evenly.
        width, height: of the drawing.
        seed: where springs begin.
    """
    import networkx

    simple = _pairs(graph)
    parts = sorted(map(sorted, networkx.connected_components(simple)), key=lambda part: (-len(part), part[0]))
    joined, alone = [part for part in parts if len(part) > 1], [part[0] for part in parts if len(part) == 1]
    below = (0.15 if joined else 1.0) * height if alone else 0.0
    places: dict[int, Places] = {}
    sizes = [len(part) + 1.0 for part in joined]  # a pair needs more room than two of many
    for part, field in zip(joined, _fields(sizes, (0.0, 0.0, width, height - below)), strict=True):
        margin = (0.05 + 0.25 / math.sqrt(len(part))) * min(field[2:])
        inner = (field[0] + margin, field[1] + margin, field[2] - 2 * margin, field[3] - 2 * margin)
        places |= zip(part, inner[:2] + _springs(simple.subgraph(part), part, seed) * inner[2:], strict=True)
    if alone:
        places |= zip(alone, _rows(len(alone), width, below) + (0.0, height - below), strict=True)
    found = np.array([places[node] for node in graph]).reshape(-1, 2)
    movable = ~np.isin(list(graph), alone)
    found[movable] = push_apart(found[movable], np.asarray(radii)[movable], (width, height - below))
    return found


def push_apart(places: Places, radii: NDArray[np.float64], size: tuple[float, float], rounds: int = 40) -> Places:
    """Move circles (nodes, 2) that overlap away from each other, within [0, width] x [0, height]."""
    from scipy.spatial import cKDTree

    low = np.minimum(radii, min(size) / 2)[:, None]
    high = np.maximum(np.array(size) - low, low)
    places = places.clip(low, high)
    for _ in range(rounds if len(places) > 1 else 0):
        first, second = cKDTree(places).query_pairs(2 * radii.max(), output_type="ndarray").T
        apart = places[second] - places[first]
        distance = np.sqrt((apart**2).sum(1))
        lacking = radii[first] + radii[second] + 1.0 - distance
        touch = (lacking > 0) & (distance > 1e-9)
        if not touch.any():
            break
        first, second = first[touch], second[touch]
        step = apart[touch] * (0.5 * lacking[touch] / distance[touch])[:, None]
        share = (radii[second] / (radii[first] + radii[second]))[:, None]  # the smaller one gives way
        np.add.at(places, first, -step * share)
        np.add.at(places, second, step * (1 - share))
        places = places.clip(low, high)
    return places


def places_of_names(boxes: Places, circles: Places, needed: int = 0) -> list[int]:
    """Which of its possible places each name takes, clear of the names before it; -1 where it has none.

    Args:
        boxes: (names, places, 4) of left, top, right, bottom; the most important name first, the best place first.
        circles: (circles, 3) of x, y, radius, which names keep clear of.
        needed: of so many names, the first, the place that covers fewest circles is taken if none is clear.
    """
    x, y, radii = circles.T
    near_x = x.clip(boxes[..., :1], boxes[..., 2:3]) - x  # (names, places, circles)
    near_y = y.clip(boxes[..., 1:2], boxes[..., 3:]) - y
    covered = (near_x**2 + near_y**2 < radii**2).sum(-1)
    chosen: list[int] = []
    taken = np.empty((0, 4))
    for index, (left, top, right, bottom) in enumerate(boxes.transpose(0, 2, 1)[..., None]):
        beside = (taken[:, 2] < left) | (taken[:, 0] > right) | (taken[:, 3] < top) | (taken[:, 1] > bottom)
        fits = beside.all(1) & ((covered[index] == 0) | (index < needed))
        chosen.append(int(np.where(fits, covered[index], len(circles) + 1).argmin()) if fits.any() else -1)
        if fits.any():
            taken = np.concatenate([taken, boxes[index, chosen[-1]][None]])
    return chosen


def _pairs(graph: networkx.MultiDiGraph) -> networkx.Graph:
    """Each pair once, in order; it pulls with the root of its weight, over the root of its ends' numbers of edges."""
    import networkx

    simple = networkx.Graph()
    simple.add_nodes_from(graph)
    for source, target, weight in sorted(graph.edges(data="weight")):
        before = simple.get_edge_data(source, target, {"weight": 0.0})["weight"]
        simple.add_edge(source, target, weight=before + math.sqrt(weight))
    degrees = dict(simple.degree())
    for source, target, data in simple.edges(data=True):
        data["weight"] /= math.sqrt(degrees[source] * degrees[target])
    return simple


def _fields(sizes: Sequence[float], field: Field) -> list[Field]:
    """A field for each size, in their order, that together are the given one: halved again and again across."""
    if len(sizes) < 2:
        return [field] * len(sizes)
    sums = np.cumsum(sizes)
    cut = min(int(np.searchsorted(sums, sums[-1] / 2)) + 1, len(sizes) - 1)
    share = float(sums[cut - 1] / sums[-1])
    left, top, width, height = field
    if width >= height:
        first, second = (left, top, width * share, height), (left + width * share, top, width * (1 - share), height)
    else:
        first, second = (left, top, width, height * share), (left, top + height * share, width, height * (1 - share))
    return _fields(sizes[:cut], first) + _fields(sizes[cut:], second)


def _springs(graph: networkx.Graph, nodes: Sequence[int], seed: int) -> Places:
    """networkx's spring layout (Fruchterman and Reingold 1991) within [0, 1], large ones evened out by rank."""
    import networkx

    copy = networkx.Graph()  # a view has no order of its own
    copy.add_nodes_from(nodes)
    copy.add_weighted_edges_from(sorted((min(a, b), max(a, b), pull) for a, b, pull in graph.edges(data="weight")))
    found = networkx.spring_layout(copy, seed=seed, iterations=60, method="force")
    places = np.array([found[node] for node in nodes])
    low, extent = places.min(0), np.ptp(places, axis=0)
    places = np.where(extent > 1e-9, (places - low) / np.maximum(extent, 1e-9), 0.5)
    ranks = np.argsort(np.argsort(places, axis=0, kind="stable"), axis=0, kind="stable") / (len(nodes) - 1)
    share = 0.95 * len(nodes) / (len(nodes) + 150)
    even: Places = (1 - share) * places + share * ranks
    return even


def _rows(count: int, width: float, height: float) -> Places:
    """Positions (count, 2) in the middles of a grid whose cells are about square."""
    columns = math.ceil(math.sqrt(count * width / height))
    index = np.arange(count)
    across = (index % columns + 0.5) / columns
    return np.stack([across * width, (index // columns + 0.5) / math.ceil(count / columns) * height], axis=1)
