"""From texts to files: what the graph holds, that files read back, repeat, and survive a kill."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.graphs.knowledge_graph import mention_shards
from graft.graphs.knowledge_graph.chunk_sources import chunks_of_text, read_chunks
from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph
from graft.graphs.knowledge_graph.entity_relations import EntitySentence, co_occurrences
from graft.graphs.knowledge_graph.graph_building import GraphSettings, build_graph, page_rank, top_nodes
from graft.graphs.knowledge_graph.graph_files import read_graph_json, read_graphml, write_graphml
from graft.graphs.knowledge_graph.graph_page import write_page
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice, extract_mentions, read_mentions, shard_path
from graft.graphs.knowledge_graph.mentions import PlacedMention, TextChunk
from graft.scripts.build_knowledge_graph import main

networkx = pytest.importorskip("networkx")

CHOICE = ExtractorChoice("capitalised")
SETTINGS = GraphSettings(min_npmi=-1)  # in a few sentences nothing stands together more than by chance
TEXTS = (
    "They saw Ada Lovelace with Charles Babbage. Then </script><b> Ada Lovelace & Charles Babbage left London. ",
    "In London lived Charles Babbage. Of Lovelace one knew that she met Charles Babbage and George Boole. ",
    "It is said that George Boole liked Ada Lovelace. And George Boole wrote to Ada Lovelace. ",
)
CHUNKS = [TextChunk(f"book {number // 2}", number % 2, text) for number, text in enumerate(TEXTS)]
FILES = ("graph.graphml", "graph.json", "mentions.parquet", "merges.json", "graph.png", "graph.html", "chunks.parquet")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    return build_knowledge_graph(CHUNKS, folder, CHOICE, SETTINGS), folder


def test_nodes_and_edges_say_what_the_texts_say(built):
    graph = built[0].graph
    names = {data["name"]: node for node, data in graph.nodes(data=True)}
    assert set(names) == {"Ada Lovelace", "Charles Babbage", "London", "George Boole"}
    ada = graph.nodes[names["Ada Lovelace"]]
    assert (ada["count"], ada["label"]) == (5, "name")
    edge = graph.edges[names["Ada Lovelace"], names["Charles Babbage"], "co_occurs"]
    assert edge["weight"] == 3  # twice by name, once as "Lovelace"
    assert edge["chunks"] == [["book 0", 0], ["book 0", 1]]
    _, _, start, end = edge["example"]
    assert TEXTS[0][start:end].strip() == "They saw Ada Lovelace with Charles Babbage."


def test_verbs_name_edges_with_a_direction_and_the_place_they_stand_in(built):
    graph = built[0].graph
    texts = {(chunk.document, chunk.index): chunk.text for chunk in CHUNKS}
    found = {}
    for source, target, data in graph.edges(data=True):
        if "verb" in data:
            document, chunk, start, end = data["example"]
            assert start <= data["verb"][0] < data["verb"][1] <= end
            verb = texts[document, chunk][slice(*data["verb"])]
            found[graph.nodes[source]["name"], data["relation"], graph.nodes[target]["name"]] = verb
    assert found == {
        ("George Boole", "like", "Ada Lovelace"): "liked",
        ("George Boole", "write to", "Ada Lovelace"): "wrote",
        ("Charles Babbage", "leave", "London"): "left",
    }


def test_every_mention_reproduces_its_text(built):
    texts = {(chunk.document, chunk.index): chunk.text for chunk in CHUNKS}
    rows = pq.read_table(built[1] / "mentions.parquet").to_pylist()
    assert rows
    for row in rows:
        assert texts[row["document"], row["chunk"]][row["start"] : row["end"]] == row["surface"]
        assert row["surface"] in built[0].graph.nodes[row["node"]]["aliases"]


def test_graphml_and_json_read_back(built):
    graph, folder = built[0].graph, built[1]
    for read in (read_graphml(folder / "graph.graphml"), read_graph_json(folder / "graph.json")):
        assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
        assert list(read.edges(keys=True, data=True)) == list(graph.edges(keys=True, data=True))


def test_graphml_takes_characters_that_xml_has_not(tmp_path):
    graph = networkx.MultiDiGraph()
    graph.add_node(0, name="a\x00b\x1bc<&\ud800", aliases={"x\x01": 1}, chunks=[["d\ufffe", 0]])
    write_graphml(graph, tmp_path / "g.graphml")
    assert read_graphml(tmp_path / "g.graphml").nodes[0]["name"] == "a\ufffdb\ufffdc<&\ufffd"


def test_repetition_gives_the_same_bytes(built, tmp_path):
    build_knowledge_graph(CHUNKS, tmp_path / "again", CHOICE, SETTINGS)
    program = "from test_corpus_graph import *; build_knowledge_graph(CHUNKS, sys.argv[1], CHOICE, SETTINGS)"
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": f"{Path(__file__).parent}:{_path()}"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "other")], check=True, env=environment)
    expected = contents(built[1])
    assert set(FILES) <= set(expected)
    assert contents(tmp_path / "again") == expected
    assert contents(tmp_path / "other") == expected


def _path():
    return os.environ.get("PYTHONPATH", "")


SENTENCES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.frozensets(st.integers(0, 4), min_size=1)))


@given(SENTENCES, st.integers(1, 3))
def test_relations_equal_a_loop_over_pairs_of_sentences(drawn, window):
    unique = {(chunk, number): entities for chunk, number, entities in drawn}
    sentences = [EntitySentence("d", *place, 0, 1, entities) for place, entities in unique.items()]
    weights, nearness = {}, {}
    for x, y in combinations(range(5), 2):
        for first in sentences:
            for second in sentences:
                far = second.number - first.number
                close = first.chunk == second.chunk and 0 <= far < window
                if close and (
                    (x in first.entities and y in second.entities) or (y in first.entities and x in second.entities)
                ):
                    weights[x, y] = weights.get((x, y), 0) + 1
                    nearness[x, y] = nearness.get((x, y), 0) + 1 / (1 + far)
    found = co_occurrences(sentences, window)
    assert {(r.source, r.target): r.weight for r in found} == weights
    for relation in found:
        pair = (relation.source, relation.target)
        assert relation.nearness == pytest.approx(nearness[pair])
        n, both = len(sentences), weights[pair]
        x, y = (sum(entity in s.entities for s in sentences) for entity in pair)
        exact = 1.0 if both >= n else max(-1, min(1, math.log(both / n / (x / n * y / n)) / -math.log(both / n)))
        assert relation.npmi == pytest.approx(exact, abs=1e-12)


def test_page_rank_solves_its_equation(built):
    graph = built[0].graph
    graph = graph.copy()
    graph.add_node(99, name="alone")
    ranks, count = page_rank(graph, steps=300), len(graph)
    strength = {
        n: sum(d["weight"] for *_, d in (*graph.in_edges(n, data=True), *graph.out_edges(n, data=True))) for n in graph
    }
    for node in graph:
        given_here = sum(d["weight"] * ranks[s] / strength[s] for s, _, d in graph.in_edges(node, data=True))
        given_here += sum(d["weight"] * ranks[t] / strength[t] for _, t, d in graph.out_edges(node, data=True))
        assert ranks[node] == pytest.approx((0.15 + 0.85 * ranks[99]) / count + 0.85 * given_here)
    assert top_nodes(graph, 5)[-1] == 99


def test_settings_drop_edges_and_nodes(built):
    mentions = built[0].mentions
    together = [data for *_, data in built[0].graph.edges(data=True) if data["relation"] == "co_occurs"]
    assert build_graph(mentions, GraphSettings(min_weight=1, min_npmi=-1)).graph.number_of_edges() > len(together)
    assert build_graph(mentions, GraphSettings(min_weight=9)).graph.number_of_edges() == 0
    small = build_graph(mentions, GraphSettings(max_nodes=2, min_npmi=-1)).graph
    assert sorted(small) == sorted(top_nodes(built[0].graph, 2))
    with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
        GraphSettings(window=0)


def test_a_shard_that_stands_is_not_read_again_and_a_changed_text_is(tmp_path, monkeypatch):
    read = []
    original = mention_shards._extract
    monkeypatch.setattr(mention_shards, "_extract", lambda e, c: read.append(len(c)) or original(e, c))

    def run(chunks, choice=CHOICE):
        read.clear()
        list(extract_mentions(chunks, tmp_path, choice, shard=1))
        return len(read)

    assert run(CHUNKS) == 3
    assert run(CHUNKS) == 0
    assert run([CHUNKS[0], replace(CHUNKS[1], text="Now Paris."), CHUNKS[2]]) == 1
    assert [m.surface for m in read_mentions(shard_path(tmp_path, 1))] == ["Now Paris"]
    shard_path(tmp_path, 2).write_bytes(b"PAR1 half")
    assert run([CHUNKS[0], replace(CHUNKS[1], text="Now Paris."), CHUNKS[2]]) == 1
    assert run(CHUNKS, ExtractorChoice("keyphrase")) == 3


def test_processes_write_what_one_writes(built, tmp_path):
    list(extract_mentions(CHUNKS, tmp_path / "one", CHOICE, workers=1, shard=2))
    list(extract_mentions(CHUNKS, tmp_path / "two", CHOICE, workers=2, shard=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


KILLED = """
import sys
from test_corpus_graph import *
chunks = [TextChunk("d", number, TEXTS[number % 3] * 20) for number in range(60)]
build_knowledge_graph(chunks, sys.argv[1], shard=4)
"""


def start_build(folder):
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{_path()}"}
    return subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)


def wait_for_first_shard(process, folder):
    """Until there is a whole shard; the build must be alive then."""
    while not shard_path(folder / "shards", 0).is_file():
        assert process.poll() is None, "the build ended before its first shard"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_random_moments_after_the_first_shard_it_ends_with_the_same_bytes(tmp_path):
    process = start_build(tmp_path / "whole")
    wait_for_first_shard(process, tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    rest = time.monotonic() - began
    expected = contents(tmp_path / "whole")
    random, stood = Random(0), []
    while len(stood) < 5:
        folder = tmp_path / f"killed {len(stood)}"
        process = start_build(folder)
        wait_for_first_shard(process, folder)
        time.sleep(rest * random.random())
        ended = process.poll() is not None
        process.kill()
        process.wait()
        if ended:  # the machine was faster this time: no kill, so again
            shutil.rmtree(folder)
            rest *= 0.8
            continue
        kept = {path: path.stat().st_ino for path in (folder / "shards").glob("*.parquet")}
        stood.append(len(contents(folder)))
        assert start_build(folder).wait() == 0
        assert {path: path.stat().st_ino for path in kept} == kept  # what stood was not written again
        left = {name: data for name, data in contents(folder).items() if not name.endswith(".tmp")}
        assert left == expected
    assert len(set(stood)) > 1, "all kills came at one stage"


def test_the_page_asks_nothing_of_others_and_no_text_ends_its_script(built):
    page = (built[1] / "graph.html").read_text(encoding="utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert " src=" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>" not in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    sentences = [sentence for node in data["nodes"] for _, sentence in node["sentences"]]
    assert any("</script><b> Ada" in sentence for sentence in sentences)
    said = [(data["nodes"][a]["name"], relation, data["nodes"][b]["name"]) for a, b, relation, *_ in data["says"]]
    assert ("George Boole", "write to", "Ada Lovelace") in said
    assert page.count("<line") == len(data["edges"]) == len({(a, b) for a, b, *_ in data["edges"]})
    assert page.count('<line class="says"') == 2  # of the three things that verbs say, two are of one pair


def test_a_large_graph_shows_its_top_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("graft.graphs.knowledge_graph.graph_page.AT_MOST", 2)
    mentions = [PlacedMention("d", 0, 0, 3, name, "l", i, 0, 3) for i in range(3) for name in ("abc", "xyz", "qrs")]
    page = write_page(build_graph(mentions), [], tmp_path / "p.html", "T").read_text()
    assert "The 2 nodes of highest PageRank, of 3" in page
    assert page.count("<circle") == 2


@given(st.text(alphabet="aB. \n", max_size=200), st.integers(1, 30))
def test_chunks_of_a_text_tile_it_and_are_short(text, length):
    chunks = list(chunks_of_text("d", text, length))
    assert "".join(chunk.text for chunk in chunks) == text
    assert all(0 < len(chunk.text) <= length for chunk in chunks)
    assert all(text[c.start : c.start + len(c.text)] == c.text and c.index == i for i, c in enumerate(chunks))


def test_folders_lines_tables_and_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"raw_text_chunks": c.text, "document_id": c.document, "chunk_index": c.index, "chunk_start": 0}
        for c in CHUNKS
    ]
    (tmp_path / "chunks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "chunks.parquet"))
    for name in ("chunks.jsonl", "saved", "chunks.parquet"):
        assert read_chunks(tmp_path / name) == CHUNKS
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "in" / "a.md").write_text("One. Two.")
    assert read_chunks(tmp_path / "folder") == [TextChunk("in/a.md", 0, "One. Two.")]
    (tmp_path / "bad.jsonl").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"Row 0 has no text in 'text'; it has \['other'\]"):
        read_chunks(tmp_path / "bad.jsonl")


def test_the_command_builds_and_answers_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("".join(TEXTS))
    arguments = [str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--extractor"]
    assert main([*arguments, "capitalised", "--min-weight", "1"]) == 0
    assert set(FILES) <= set(contents(tmp_path / "out"))
    assert main([*arguments, "guess"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("graft-knowledge-graph: `extractor` must be one of")
    assert error.count("\n") == 1
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2


def test_chunks_must_be_there_and_differ(tmp_path):
    with pytest.raises(ValueError, match="`chunks` is empty"):
        build_knowledge_graph([], tmp_path)
    with pytest.raises(ValueError, match="same document and index"):
        build_knowledge_graph([CHUNKS[0], CHUNKS[0]], tmp_path, CHOICE)
