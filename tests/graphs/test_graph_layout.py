"""Where a graph is drawn: parts side by side, circles apart, names clear of each other, no heap in the middle."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.graphs.knowledge_graph.graph_layout import _fields, layout, places_of_names, push_apart

networkx = pytest.importorskip("networkx")
pytest.importorskip("scipy")

WIDTH, HEIGHT = 1000.0, 760.0


def drawn(edges, alone=0):
    """A graph of weighted edges and single nodes, circles of 4, and their positions by node."""
    graph = networkx.MultiDiGraph()
    graph.add_nodes_from(sorted({node for edge in edges for node in edge[:2]}))
    graph.add_nodes_from(range(10_000, 10_000 + alone))
    graph.add_weighted_edges_from(edges)
    places = layout(graph, [4.0] * len(graph), WIDTH, HEIGHT)
    return dict(zip(graph, places, strict=True))


def hubs(nodes=500, seed=0):
    """What texts give: a few words stand with everything, groups stand among themselves."""
    draw = np.random.default_rng(seed)
    edges = [(node, int(draw.integers(5)), 9.0) for node in range(5, nodes)]
    return edges + [(node, node + 1, 2.0) for node in range(5, nodes - 1) if node % 10]


def test_a_large_graph_is_no_heap_in_the_middle():
    places = np.array(list(drawn(hubs()).values()))
    cells = {(int(8 * x / WIDTH), int(8 * y / HEIGHT)) for x, y in places}
    assert len(cells) > 40  # of 64
    middle = (abs(places - (WIDTH / 2, HEIGHT / 2)) < (WIDTH / 8, HEIGHT / 8)).all(1).mean()
    assert middle < 0.35  # in a sixteenth of the drawing
    gaps = np.linalg.norm(places[:, None] - places, axis=-1) + 1e9 * np.eye(len(places))
    assert gaps.min() > 7.9  # no circle of 4 lies on another


def test_the_same_graph_is_drawn_at_the_same_places():
    first, again = drawn(hubs(60), alone=3), drawn(hubs(60), alone=3)
    assert all((first[node] == again[node]).all() for node in first)


def test_parts_stand_side_by_side_and_single_nodes_below_within_the_drawing():
    parts = [range(start, start + size) for start, size in ((0, 30), (100, 8), (200, 2), (300, 2))]
    edges = [(a, b, 1.0) for part in parts for a, b in zip(part, part[1:], strict=False)]
    places = drawn(edges, alone=7)
    boxes = [np.array([places[node] for node in part]) for part in parts]
    for one, other in combinations(boxes, 2):
        assert (one.max(0) < other.min(0)).any() or (other.max(0) < one.min(0)).any()
    alone = np.array([places[node] for node in range(10_000, 10_007)])
    assert alone[:, 1].min() > max(box[:, 1].max() for box in boxes)
    every = np.array(list(places.values()))
    assert (every >= 0).all()
    assert (every <= (WIDTH, HEIGHT)).all()


@pytest.mark.parametrize("alone", [0, 1, 5])
def test_single_nodes_and_nothing_at_all_have_places(alone):
    places = drawn([], alone)
    assert len(places) == alone
    assert len({tuple(place) for place in places.values()}) == alone


@given(st.lists(st.floats(1, 100), min_size=1, max_size=20))
def test_fields_tile_the_drawing_in_proportion(sizes):
    fields = _fields(sizes, (0.0, 0.0, WIDTH, HEIGHT))
    for size, (_, _, width, height) in zip(sizes, fields, strict=True):
        assert width * height == pytest.approx(WIDTH * HEIGHT * size / sum(sizes))
    for (x, y, width, height), (a, b, w, h) in combinations(fields, 2):
        across, down = min(x + width, a + w) - max(x, a), min(y + height, b + h) - max(y, b)
        assert min(across, down) < 1e-6


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_circles_with_room_end_apart_and_inside_and_those_apart_stay(seed, count):
    draw = np.random.default_rng(seed)
    places, radii = draw.uniform(0, 400, (count, 2)), draw.uniform(2, 12, count)
    moved = push_apart(places, radii, (400.0, 400.0), rounds=400)
    for one, other in combinations(range(count), 2):
        assert np.linalg.norm(moved[one] - moved[other]) > radii[one] + radii[other] - 0.5
    assert (moved >= radii[:, None] - 1e-9).all()
    assert (moved <= 400 - radii[:, None] + 1e-9).all()
    assert (push_apart(moved, radii, (400.0, 400.0), rounds=400) == moved).all()


BOX = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 8)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


CIRCLE = st.tuples(st.integers(0, 28), st.integers(0, 28), st.integers(1, 6))


@given(st.lists(st.lists(BOX, min_size=3, max_size=3), max_size=8), st.lists(CIRCLE, max_size=6), st.integers(0, 8))
def test_names_take_places_in_order_clear_of_names_taken_and_of_circles(names, circles, needed):
    def meet(one, other):
        return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]

    def covers(box, circle):
        x, y, radius = circle
        nearest = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        return (nearest[0] - x) ** 2 + (nearest[1] - y) ** 2 < radius**2

    taken, expected = [], []
    for index, places in enumerate(names):
        costs = {side: sum(covers(box, circle) for circle in circles) for side, box in enumerate(places)}
        free = [side for side, box in enumerate(places) if not any(meet(box, other) for other in taken)]
        free = [side for side in free if index < needed or not costs[side]]
        expected.append(min(free, key=costs.__getitem__) if free else -1)
        taken += [places[expected[-1]]] if free else []
    boxes = np.array(names, dtype=float).reshape(-1, 3, 4)
    assert places_of_names(boxes, np.array(circles, dtype=float).reshape(-1, 3), needed) == expected
