"""Names that become one entity, by which rule, and that nothing later changes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.graphs.knowledge_graph.entity_names import EntityMerger, Merge, normal_form

NAMES = st.sampled_from(
    ["Ann Lee", "Lee", "Bo Lee", "Ann", "NASA", "North Ant Sea Area", "the graph", "graphs", "Graph's", "networks 12"]
    + ["networks 13", "network 12", "Networks"]
)


@pytest.mark.parametrize(
    ("surface", "key"),
    [
        ("The  Graph's", "graph"),
        ("ﬁle", "file"),
        ("its own the", "own the"),
        ("the", "the"),
        ("Straße", "strasse"),
        ("Lee’s", "lee"),
    ],
)
def test_normal_forms(surface, key):
    assert normal_form(surface) == key


@given(st.text(max_size=20))
def test_case_width_and_spacing_do_not_tell_names_apart(surface):
    assert normal_form(f" {surface}\u00a0{surface} ".casefold()) == normal_form(f"{surface}  {surface}")


def test_each_rule_merges_and_is_recorded():
    merger = EntityMerger({"The Big Apple": "New York"})
    first = merger.entity("Vernon Dursley", "d")
    assert merger.entity("Dursley", "d") == first
    assert merger.entity("Dursley", "other document") != first
    agency = merger.entity("World Health Body", "d")
    assert merger.entity("WHB", "d") == agency
    assert merger.entity("the Big Apple", "d") == merger.entity("New York", "d")
    assert merger.entity("attention network", "d") == merger.entity("attention networks", "d")
    assert merger.merges == [
        Merge("dursley", "vernon dursley", "last name"),
        Merge("whb", "world health body", "acronym"),
        Merge("big apple", "new york", "alias"),
        Merge("attention networks", "attention network", "similar"),
    ]


def test_doubt_keeps_names_apart():
    merger = EntityMerger()
    people = {merger.entity("Ann Lee", "d"), merger.entity("Bo Lee", "d")}
    assert merger.entity("Lee", "d") not in people  # whose?
    assert merger.entity("version 3.11", "d") != merger.entity("version 3.12", "d")
    assert merger.entity("neural network", "d") != merger.entity("network", "d")
    assert merger.entity("cats", "d") != merger.entity("cat", "d")


def test_the_most_frequent_surface_is_the_name():
    merger = EntityMerger()
    for surface in ("the Graph", "graph", "graph"):
        number = merger.entity(surface, "d")
    assert merger.name(number) == "graph"
    assert merger.surfaces(number) == {"graph": 2, "the Graph": 1}


@given(st.lists(NAMES, max_size=12), st.lists(NAMES, max_size=6))
def test_what_comes_later_changes_nothing_before(names, later):
    short, long = EntityMerger(), EntityMerger()
    expected = [short.entity(name, "d") for name in names]
    assert [long.entity(name, "d") for name in [*names, *later]][: len(names)] == expected


def test_least_ratio_is_checked():
    with pytest.raises(ValueError, match="`least_ratio` must be within 0 and 100, got 101"):
        EntityMerger(least_ratio=101)
