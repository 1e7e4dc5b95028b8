"""What verbs between two entities say, and what is left out because they do not say it plainly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.graphs.knowledge_graph.entity_extractors import CapitalisedExtractor
from graft.graphs.knowledge_graph.graph_building import GraphSettings, build_graph
from graft.graphs.knowledge_graph.mentions import TextChunk, place
from graft.graphs.knowledge_graph.verb_relations import VerbLexicon, between_entities, verb_links

LEXICON = VerbLexicon(["peel peels peeled a node, nodes, noded"])


@pytest.mark.parametrize(
    ("text", "relation", "turned", "verb"),
    [
        (" wrote to ", "write to", False, "wrote"),
        (" was written by ", "write", True, "written"),
        (" written by the ", "write", True, "written"),
        (" returns a ", "return", False, "returns"),
        ("` always returns the `", "return", False, "returns"),
        (" has been replaced with ", "replace with", False, "replaced"),
        (" stopped ", "stop", False, "stopped"),
        (" carries ", None, False, None),  # no verb that it knows
        (" peels ", None, False, None),  # one of the texts, which may be a noun here
        (" peels the ", "peel", False, "peels"),
        (" can contain ", "contain", False, "contain"),
        (" is using an ", "use", False, "using"),
        (" is a ", "be", False, "is"),
        (" must be the ", "be", False, "be"),
        (" has the ", "have", False, "has"),
        (" has become the ", "become", False, "become"),
        (", who met ", "meet", False, "met"),
        (" which is based on ", "base on", False, "based"),
        (" is set to ", "set to", False, "set"),
    ],
)
def test_a_verb_and_its_preposition_are_found(text, relation, turned, verb):
    found = between_entities(text, LEXICON)
    if relation is None:
        assert found is None
    else:
        assert found[:2] == (relation, turned)
        assert text[slice(*found[2])] == verb


@pytest.mark.parametrize(
    "text",
    [
        "",
        " and ",
        " does not return ",
        " doesn't return ",
        " cannot contain ",
        ", returns ",
        ". Returns ",
        " (returns ",
        " returns a very large ",
        " returns that the ",
        " sets of ",
        " base ",
        " given a ",
        " containing ",
        " used to ",
        " noded nodes the ",
        " is ",
        " to be a ",
        " of the ",
        " returns what people who know of it would never want as ",
    ],
)
def test_what_is_not_plain_or_is_denied_is_left_out(text):
    assert between_entities(text, LEXICON) is None


def test_the_base_form_stands_behind_a_plural():
    assert between_entities(" contain the ", LEXICON, "Graphs")[0] == "contain"
    assert between_entities(" contain the ", LEXICON, "Graph") is None


@pytest.mark.parametrize(
    ("text", "relations"),
    [
        ("They saw that London saw Ada Lovelace.", ["see"]),
        ("They saw that in London lived Ada Lovelace.", []),
        ("They saw that a friend of the London Society met Ada Lovelace.", []),
        ("They saw the map of London, which showed Hyde Park.", ["show"]),
        ("They saw the map of London drawn by Ada Lovelace.", ["draw"]),
    ],
)
def test_what_stands_behind_a_preposition_does_not_act(text, relations):
    mentions = place(TextChunk("d", 0, text), CapitalisedExtractor().extract(text))
    assert len(mentions) == 2
    assert [link.relation for link in verb_links(mentions, [TextChunk("d", 0, text)])] == relations


def test_verbs_are_learnt_from_three_of_their_forms():
    assert VerbLexicon(["prune pruned pruning"]).base("prunes") == ("prune", "s")
    assert VerbLexicon(["tally tallies tallied"]).base("tallied") == ("tally", "past")
    assert VerbLexicon(["prune prunes"]).base("pruned") is None
    assert VerbLexicon([]).base("stopping") == ("stop", "ing")
    assert VerbLexicon([]).base("written") == ("write", "participle")


SENTENCE = "wrote was by the written is a returns, not Ada Boole London to of can which . `"
WORDS = st.sampled_from(SENTENCE.split())


@given(st.lists(WORDS, max_size=14))
def test_links_join_neighbours_of_a_sentence_and_their_spans_hold_a_verb(words):
    text = " ".join(words)
    chunk = TextChunk("d", 0, text)
    mentions = place(chunk, CapitalisedExtractor().extract(text))
    for link in verb_links(mentions, [chunk]):
        left, right = sorted((link.source, link.target))
        assert right == left + 1
        assert mentions[left].sentence == mentions[right].sentence
        assert mentions[left].end < link.start < link.end < mentions[right].start
        assert text[link.start : link.end] in ("wrote", "written", "is", "was", "returns")


def test_relations_count_sentences_name_chunks_and_keep_the_first_as_example():
    texts = ["Then George Boole wrote to Ada Lovelace.", "Of old, Ada Lovelace was known to George Boole."]
    texts.append("Then George Boole wrote to Ada Lovelace. So Ada Lovelace wrote to Ada Lovelace.")
    chunks = [TextChunk("d", number, text) for number, text in enumerate(texts)]
    mentions = [found for chunk in chunks for found in place(chunk, CapitalisedExtractor().extract(chunk.text))]
    links = verb_links(mentions, chunks)
    graph = build_graph(mentions, GraphSettings(min_npmi=-1), links).graph
    names = {data["name"]: node for node, data in graph.nodes(data=True)}
    ada, boole = names["Ada Lovelace"], names["George Boole"]
    verbs = {(s, t, key): data for s, t, key, data in graph.edges(keys=True, data=True) if key != "co_occurs"}
    assert set(verbs) == {(boole, ada, "write to"), (ada, boole, "know to")}
    written = verbs[boole, ada, "write to"]
    assert (written["weight"], written["chunks"]) == (2, [["d", 0], ["d", 2]])
    document, number, start, end = written["example"]
    assert (document, texts[number][start:end]) == ("d", texts[0])
    assert texts[number][slice(*written["verb"])] == "wrote"
    few = build_graph(mentions, GraphSettings(min_npmi=-1, min_verb_weight=2), links).graph
    assert [key for *_, key in few.edges(keys=True) if key != "co_occurs"] == ["write to"]
    with pytest.raises(ValueError, match="`min_verb_weight` must be at least 1, got 0"):
        GraphSettings(min_verb_weight=0)
