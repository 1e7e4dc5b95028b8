import numpy as np
import pytest
import torch

from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.corpus_retriever import CorpusRetriever, embedder_of
from graft.retrieval.corpus.embedder import ChunkEmbedder, EmbedderSettings
from graft.retrieval.corpus.embedding import embed_chunks
from graft.retrieval.corpus.index_choice import IndexChoice
from graft.retrieval.corpus.indexing import build_index, send_embeddings
from graft.retrieval.engines.faiss_engine import FaissEngine


def chunk_ids(corpus, *chunks):
    return torch.from_numpy(corpus.tokens.take(np.asarray(chunks)).astype(np.int64))


def test_a_chunk_of_the_corpus_finds_itself_first(corpus, embedder):
    ids, distances = CorpusRetriever(corpus, embedder).search(chunk_ids(corpus, 3, 11, 7))
    assert ids[:, 0].tolist() == [3, 11, 7]
    assert (distances[:, 0] < 1e-5).all()


def test_without_its_document_it_finds_what_the_neighbours_stage_found(corpus, embedder):
    for chunk in range(0, len(corpus), 5):
        own = int(corpus.document_of(np.asarray([chunk]))[0])
        retriever = CorpusRetriever(corpus, embedder, exclude_documents=[own])
        found = retriever(chunk_ids(corpus, chunk))
        expected = corpus.passages(corpus.neighbours.between(chunk, chunk + 1)[0, :2].astype(np.int64), 16)
        assert found.dtype == torch.int64
        assert found[0].tolist() == expected.tolist()


def test_it_equals_brute_force_over_the_query_vectors(corpus, embedder, naive_neighbours):
    chunks = torch.randint(4, 204, (5, 8))
    chunks[2, 5:] = corpus.pad_token_id
    ids, _ = CorpusRetriever(corpus, embedder, num_neighbours=4).search(chunks)
    queries = embed_chunks(corpus, chunks.numpy(), embedder)
    expected, _ = naive_neighbours(queries, corpus.embeddings.between(0, len(corpus)), 4, [(0, 0)] * 5)
    assert ids.tolist() == expected


def test_documents_are_excluded_by_number_and_by_name(corpus, embedder):
    name = corpus.document_names[2].as_py()
    retriever = CorpusRetriever(corpus, embedder, 3, exclude_documents=[0, name])
    ids, _ = retriever.search(chunk_ids(corpus, *range(len(corpus))))
    assert not {0, 2} & set(corpus.document_of(ids.reshape(-1)).tolist())
    excluded = sum(end - start for start, end in map(corpus.document_range, (0, 2)))
    assert f"{excluded} chunks excluded" in repr(retriever)
    with pytest.raises(KeyError, match="0 documents of .* are called 'nobody'"):
        CorpusRetriever(corpus, embedder, exclude_documents=["nobody"])
    with pytest.raises(KeyError, match=r"has documents 0 \.\.\. \d+, got 999"):
        CorpusRetriever(corpus, embedder, exclude_documents=[999])


def test_an_engine_and_a_stored_index_that_hold_all_find_what_measuring_every_chunk_finds(tmp_path, build, embedder):
    pytest.importorskip("faiss")
    texts = [" ".join(f"w{(7 * n + 3 * d * d) % 200}" for d in range(60)) for n in range(9)]
    corpus = build(tmp_path / "corpus", texts, until="embed")
    engine = FaissEngine(tmp_path / "engine")
    send_embeddings(corpus, engine)
    build_index(corpus.folder, IndexChoice("ivf_flat", len(corpus), 0, "a test", {"nlist": 1}))
    corpus = Corpus(corpus.folder)
    chunks = torch.randint(4, 204, (6, 8))
    for excluded in ([], [1], [0, 3, 4, 5, 6, 7, 8]):
        expected = CorpusRetriever(corpus, embedder, 3, exclude_documents=excluded).search(chunks)
        for index in (engine, "stored"):
            retriever = CorpusRetriever(corpus, embedder, 3, exclude_documents=excluded, index=index)
            ids, distances = retriever.search(chunks)
            assert ids.tolist() == expected[0].tolist()
            np.testing.assert_allclose(distances, expected[1], rtol=1e-12)
            assert ("FaissEngine" if index is engine else "ivf_flat") in repr(retriever)
    with pytest.raises(ValueError, match='`index` must be "exact", "stored" or an engine, got \'flat\''):
        CorpusRetriever(corpus, embedder, index="flat")


def test_what_is_missing_is_all_padding(tmp_path, build, embedder):
    corpus = build(tmp_path, ["w1 w2", "w3"], until="embed")
    found = CorpusRetriever(corpus, embedder, 3, 20)(chunk_ids(corpus, 0))
    assert found.shape == (1, 3, 20)
    assert (found[0, 2] == corpus.pad_token_id).all()
    assert (found[0, :2, 8:] == corpus.pad_token_id).all()
    assert CorpusRetriever(corpus, embedder)(torch.zeros(0, 8).long()).shape == (0, 2, 16)


def test_the_embedder_is_found_again_and_another_refused(corpus, encoder_folder):
    assert embedder_of(corpus).identity() == corpus.manifest.stages["embed"]["settings"]
    assert CorpusRetriever(corpus)(chunk_ids(corpus, 0)).shape == (1, 2, 16)
    with pytest.raises(ValueError, match="`pooling` of `embedder` is 'cls', .* made with 'mean'"):
        CorpusRetriever(corpus, ChunkEmbedder(encoder_folder, settings=EmbedderSettings("cls")))
    changed = ChunkEmbedder(encoder_folder)
    changed.model.embeddings.word_embeddings.weight.data[7] += 1
    with pytest.raises(ValueError, match="`embedder` is .*, but .* was embedded with"):
        CorpusRetriever(corpus, changed)


def test_chunks_of_another_size_are_refused(corpus, embedder):
    with pytest.raises(ValueError, match=r"`chunks` must be \(rows, 8\), the corpus's chunk_size, got \(2, 7\)"):
        CorpusRetriever(corpus, embedder)(torch.zeros(2, 7).long())
    with pytest.raises(ValueError, match="`num_neighbours` must be at least 1, got 0"):
        CorpusRetriever(corpus, embedder, 0)
