import numpy as np
import pytest

from graft.retrieval.corpus import indexing
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.disk_space import format_bytes, parse_bytes
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.index_choice import IndexChoice, choose_index, least_probes
from graft.retrieval.corpus.indexing import build_index, open_index
from graft.retrieval.corpus.manifest import CorpusError
from graft.retrieval.corpus.neighbours import find_neighbours
from graft.retrieval.corpus.preparation import append_documents
from graft.retrieval.corpus.verification import verify_corpus


def test_the_most_exact_index_that_fits_is_chosen():
    few = choose_index(50_000, 384)
    assert (few.kind, few.training_size, few.num_bytes) == ("exact", 0, 50_000 * 384 * 2)
    kinds = [choose_index(10**6, 384, budget).kind for budget in ("2G", "500M", "100M")]
    assert kinds == ["ivf_flat", "ivf_sq8", "opq_ivf_pq"]
    sizes = [choose_index(10**6, 384, budget).parameters["code_size"] for budget in ("100M", "60M", "45M", "30M")]
    assert sizes == [64, 48, 32, 16]
    choice = choose_index(10**6, 384, "2G")
    assert choice.parameters == {"nlist": 4000}
    assert choice.training_size == 64 * 4000
    assert "4000 lists" in choice.reason
    assert choose_index(10**6, 384, "2G", "500M").kind == "ivf_sq8"
    assert choose_index(10**6, 384, "2G", index="hnsw").num_bytes == 10**6 * (384 * 4 + 256)
    assert choose_index(10**6, 384, "2G", index="exact").kind == "exact"


def test_what_cannot_be_chosen_is_refused_with_what_is_needed():
    with pytest.raises(ValueError, match=r"must be at least 23\.9 MB for 1000000 chunks, got 1\.0 MB"):
        choose_index(10**6, 384, "1M")
    with pytest.raises(ValueError, match="`max_index_memory_usage` must be a size such as 500M, .*got '100q'"):
        choose_index(10**6, 384, "100q")
    with pytest.raises(ValueError, match="`index` for 1000 vectors must be one of .*, got 'best'"):
        choose_index(1000, 384, index="best")


def test_sizes_are_read_in_powers_of_1024():
    texts = {"100m": 100 * 2**20, "1G": 2**30, "1.5 GB": 3 * 2**29, "7": 7, "2kb": 2048, "1TiB": 2**40}
    assert {text: parse_bytes(text) for text in texts} == texts
    assert [format_bytes(n) for n in (7, 2048, 3 * 2**29)] == ["7 bytes", "2.0 KB", "1.5 GB"]


def test_lists_to_search_double_up_to_all():
    assert [least_probes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def words(n):
    return " ".join(f"w{(n * n + d * d * 3) % 200}" for d in range(40))


@pytest.fixture
def embedded(tmp_path, build):
    pytest.importorskip("faiss", reason="the extra graft-transformers[faiss] is not installed")
    return build(tmp_path / "corpus", [words(n) for n in range(60)], until="embed", shard_chunks=100)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "hnsw"])
def test_an_index_finds_nearly_what_the_exact_search_finds(embedded, kind):
    choice = choose_index(len(embedded), 32, index=kind)
    corpus = build_index(embedded.folder, choice)
    recall = corpus.manifest.stages["index"]["recall"]
    assert recall["value"] >= 0.9
    exact = find_neighbours(corpus.folder, 4, workers=1).neighbours.between(0, len(corpus)).copy()
    found = find_neighbours(corpus.folder, 4, index="stored", workers=1, overwrite=True)
    rows = found.neighbours.between(0, len(found))
    share = (exact[:, :, None] == rows[:, None]).any(-1).mean()
    assert share == pytest.approx(recall["value"], abs=0.03)
    assert (rows >= 0).all()  # nobody is short of neighbours
    assert verify_corpus(corpus.folder) == []


def test_all_lists_searched_equal_the_exact_search(embedded):
    corpus = build_index(embedded.folder, IndexChoice("ivf_flat", 300, 0, "for the test", {"nlist": 4, "nprobe": 1}))
    store = open_index(corpus)
    store.parameters["nprobe"] = 4
    own = corpus.document_of(np.arange(len(corpus)))
    exclude = np.stack([corpus.documents[own], corpus.documents[own + 1]], 1)
    queries = corpus.embeddings.between(0, len(corpus))
    ids, distances = indexing.indexed_neighbours(queries, corpus, store, 3, exclude)
    exact_ids, exact = indexing.exact_neighbours(queries, corpus.embeddings, 3, exclude)
    assert (ids == exact_ids).mean() > 0.999  # faiss breaks ties beyond the candidates in its own order
    np.testing.assert_allclose(distances, exact, rtol=1e-9)


def test_rows_that_are_short_are_searched_in_more_lists(embedded):
    corpus = build_index(embedded.folder, IndexChoice("ivf_flat", 300, 0, "for the test", {"nlist": 7}))
    store = open_index(corpus)
    store.parameters["nprobe"] = 1
    exclude = np.tile([0, len(corpus) - 5], (len(corpus), 1))
    queries = corpus.embeddings.between(0, len(corpus))
    ids, _ = indexing.indexed_neighbours(queries, corpus, store, 5, exclude)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {tuple(range(len(corpus) - 5, len(corpus)))}


def test_building_twice_gives_the_same_bytes_and_a_finished_one_is_left_alone(embedded, digests, caplog):
    choice = choose_index(len(embedded), 32, index="ivf_sq8")
    build_index(embedded.folder, choice)
    once = digests(embedded.folder)
    with caplog.at_level("INFO"):
        build_index(embedded.folder, choice)
    assert "stage index is complete already" in caplog.text
    assert digests(embedded.folder) == once
    build_index(embedded.folder, choice, overwrite=True)
    assert digests(embedded.folder) == once


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            IndexChoice("ivf_flat", 300, 0, "", {"nlist": 8}),
            "`nlist` 8 needs at least 312 .*, 39 for each list, got 3",
        ),
        (IndexChoice("ivf_flat", 300, 0, "", {"lists": 8}), r"'ivf_flat' has the parameters .* got \['lists'\]"),
        (IndexChoice("ivf_pq", 300, 0, "", {"nlist": 2, "code_size": 5}), "`code_size` must divide the dimension 32"),
        (IndexChoice("hnsw", 0, 0, "", {"neighbours": "many"}), "faiss refuses the index 'HNSWmany' for dimension 32"),
        (IndexChoice("tree", 0, 0, ""), "`kind` must be one of exact, .*, got 'tree'"),
    ],
)
def test_what_faiss_could_not_train_is_refused_and_nothing_is_noted(embedded, digests, choice, message):
    before = digests(embedded.folder)
    with pytest.raises(ValueError, match=message):
        build_index(embedded.folder, choice)
    assert digests(embedded.folder) == before


def test_an_index_that_does_not_serve_is_refused(embedded, embedder):
    with pytest.raises(ValueError, match="`choice` is exact: find_neighbours searches"):
        build_index(embedded.folder, choose_index(len(embedded), 32))
    with pytest.raises(CorpusError, match="stage 'index' has not run"):
        find_neighbours(embedded.folder, 3, index="stored")
    with pytest.raises(ValueError, match='`index` must be "exact" or "stored", got \'fast\''):
        find_neighbours(embedded.folder, 3, index="fast")
    build_index(embedded.folder, choose_index(len(embedded), 32, index="ivf_flat"))
    append_documents(DatasetRows([{"text": words(99)}]), embedded.folder, embedder, workers=1)
    with pytest.raises(CorpusError, match="stage 'index' was interrupted; run it"):
        open_index(Corpus(embedded.folder))
