"""The folder of a knowledge graph, read back as what each chunk names: it repeats, and knows its own documents."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft.graphs.knowledge_graph.chunk_weights import chunk_weights, entities_of_chunks
from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph, knowledge_graph_stands
from graft.graphs.knowledge_graph.document_entities import read_documents
from graft.graphs.knowledge_graph.entity_extractors import CapitalisedExtractor
from graft.graphs.knowledge_graph.graph_building import GraphSettings
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice
from graft.graphs.knowledge_graph.mentions import TextChunk

pytest.importorskip("networkx")

CHOICE, SETTINGS = ExtractorChoice("capitalised"), GraphSettings(max_nodes=2)
TEXTS = ("Here Ada Lovelace met Charles Babbage. ", "It rained. ", "Of Ada Lovelace a letter came. And George Boole? ")
STARTS = (0, len(TEXTS[0]), len(TEXTS[0]) + len(TEXTS[1]))
CHUNKS = [
    *(TextChunk("book", n, text, start) for n, (text, start) in enumerate(zip(TEXTS, STARTS, strict=True))),
    TextChunk("note", 0, "Then George Boole wrote.", 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    build_knowledge_graph(CHUNKS, folder, CHOICE, SETTINGS)
    return folder


def test_chunks_come_back_with_all_they_name_also_what_the_graph_left_out(folder):
    documents = read_documents(folder)
    book = documents["book"]
    assert (book.starts, book.lengths) == (STARTS, tuple(map(len, TEXTS)))
    assert book.sentences == (((0, 1),), (), ((0,), (2,)))  # Ada and Charles; nothing; Ada, and George
    assert documents["note"].sentences == (((0,),),)  # numbers are a document's own
    weights = chunk_weights(entities_of_chunks(TEXTS, CapitalisedExtractor()))
    np.testing.assert_array_equal(chunk_weights(book.sentences), weights)


def test_a_text_is_known_by_its_chunks(folder):
    book = read_documents(folder)["book"]
    whole = "".join(TEXTS)
    assert book.unlike(whole) is None
    assert book.unlike(whole + "A tail that was left out.") is None
    assert book.unlike(whole.replace("rained", "snowed")) == 1
    assert book.unlike(whole[:-1]) == 2
    assert [book.chunk_at(place) for place in (0, STARTS[1] - 1, STARTS[1], 999)] == [0, 0, 1, 2]


def test_a_graph_stands_for_its_chunks_and_options_alone(folder, tmp_path):
    assert knowledge_graph_stands(CHUNKS, folder, CHOICE, SETTINGS)
    assert not knowledge_graph_stands(CHUNKS, folder, CHOICE)
    assert not knowledge_graph_stands(CHUNKS, folder, ExtractorChoice("keyphrase"), SETTINGS)
    assert not knowledge_graph_stands(CHUNKS[:-1], folder, CHOICE, SETTINGS)
    assert not knowledge_graph_stands(CHUNKS, tmp_path, CHOICE, SETTINGS)


def test_a_folder_without_a_whole_graph_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no chunks.parquet: make it with graft-knowledge-graph"):
        read_documents(tmp_path)
    for name in ("chunks.parquet", "mentions.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    chunks = pq.read_table(tmp_path / "chunks.parquet")
    pq.write_table(chunks.slice(1), tmp_path / "chunks.parquet")
    with pytest.raises(ValueError, match=r"mentions in \('book', 0\), which is no chunk"):
        read_documents(tmp_path)
    (tmp_path / "chunks.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read"):
        read_documents(tmp_path)


def test_chunks_that_overlap_are_refused(folder, tmp_path):
    (tmp_path / "mentions.parquet").write_bytes((folder / "mentions.parquet").read_bytes())
    chunks = pq.read_table(folder / "chunks.parquet")
    starts = [max(start - 1, 0) for start in chunks["start"].to_pylist()]
    place = chunks.schema.get_field_index("start")
    pq.write_table(chunks.set_column(place, "start", pa.array(starts)), tmp_path / "chunks.parquet")
    with pytest.raises(ValueError, match="Chunk 1 of the document 'book' begins at character 38, before the end"):
        read_documents(tmp_path)
