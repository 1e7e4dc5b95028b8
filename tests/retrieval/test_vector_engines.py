"""Every engine passes the same tests; one that is not installed, or has no server here, is skipped and says so."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from postgres_server import DATABASE, USER, postgres_programs, running_postgres

from graft.retrieval.corpus.bm25_retriever import BM25Retriever
from graft.retrieval.corpus.ray_executor import RayExecutor
from graft.retrieval.engines.faiss_engine import FaissEngine
from graft.retrieval.engines.milvus_engine import MilvusEngine
from graft.retrieval.engines.postgres_engine import PostgresEngine

DIM, COUNT = 12, 60


@pytest.fixture(scope="module")
def postgres():
    """A server of its own until the module's tests end; its conninfo."""
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    programs = postgres_programs(extension="vector")
    if programs is None:
        pytest.skip("no PostgreSQL server with pgvector is installed here")
    with running_postgres(programs) as socket:
        yield f"host={socket} user={USER} dbname={DATABASE}"


class Engines:
    """Opens clients of one engine, and closes them at the end."""

    def __init__(self, kind, place):
        self.kind, self.place, self.opened = kind, place, []

    def open(self):
        if self.kind == "faiss":
            return FaissEngine(self.place)
        engine = MilvusEngine(self.place) if self.kind == "milvus" else PostgresEngine(self.place)
        self.opened.append(engine)
        return engine

    def reopen(self, engine):
        if self.kind != "faiss":
            engine.close()
        return self.open()

    def close(self):
        for engine in self.opened:
            engine.close()


@pytest.fixture(params=["faiss", "milvus", "pgvector"])
def engines(request, tmp_path):
    if request.param == "faiss":
        pytest.importorskip("faiss")
        place = tmp_path / "vectors"
    elif request.param == "milvus":
        pytest.importorskip("pymilvus", reason="pymilvus is not installed")
        pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
        place = str(tmp_path / "vectors.db")
    else:
        place = request.getfixturevalue("postgres")
    made = Engines(request.param, place)
    yield made
    made.close()


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((7, DIM)).astype(np.float32)


def naive(queries, vectors, ids, k, metric, exclude):
    """Brute force in float64: ids, best first, -1 where there are fewer."""
    rows = []
    for query, (first, end) in zip(queries.astype(float), exclude, strict=True):
        scores = {}
        for number, vector in zip(ids.tolist(), vectors.astype(float), strict=True):
            if not first <= number < end:
                gap = float(((query - vector) ** 2).sum())
                scores[number] = gap if metric == "l2" else -float(query @ vector)
        best = sorted(scores, key=scores.get)[:k]
        rows.append(best + [-1] * (k - len(best)))
    return rows


class TestVectorEngine:
    @pytest.mark.parametrize("metric", ["l2", "inner_product"])
    def test_search_is_exact_and_leaves_ranges_out(self, engines, vectors, queries, metric):
        engine, ids = engines.open(), 2 * np.arange(COUNT)
        engine.create(DIM, metric)
        engine.add(ids[:40], vectors[:40])
        engine.add(ids[40:], vectors[40:])
        engine.flush()
        assert engine.count() == COUNT
        nothing = np.zeros((7, 2), np.int64)
        scores, found = engine.search(queries, 5)
        assert found.tolist() == naive(queries, vectors, ids, 5, metric, nothing)
        truth = vectors[found // 2].astype(float)
        expected = (queries[:, None] * truth).sum(-1) if metric == "inner_product" else None
        expected = ((queries[:, None] - truth) ** 2).sum(-1) if expected is None else expected
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
        ranges = np.array([[0, 0], [0, 60], [0, 60], [30, 31], [10, 120], [0, 120], [118, 500]])
        left = engine.search(queries, 5, ranges)[1]
        assert left.tolist() == naive(queries, vectors, ids, 5, metric, ranges)

    def test_what_is_missing_is_minus_one_at_the_worst_score(self, engines, vectors, queries):
        engine = engines.open()
        engine.create(DIM, "l2")
        engine.add(np.arange(3), vectors[:3])
        engine.flush()
        scores, found = engine.search(queries, 4, np.array([[1, 3]] * 7))
        assert found.tolist() == [[0, -1, -1, -1]] * 7
        assert np.isinf(scores[:, 1:]).all()
        assert engine.search(queries[:0], 2)[1].shape == (0, 2)

    def test_it_is_all_there_after_reopening_and_can_grow(self, engines, vectors, queries):
        engine = engines.open()
        engine.create(DIM, "inner_product")
        engine.add(np.arange(50), vectors[:50])
        engine.flush()
        before = engine.search(queries, 4)[1]
        engine = engines.reopen(engine)
        assert engine.count() == 50
        assert engine.search(queries, 4)[1].tolist() == before.tolist()
        engine.add(np.arange(50, COUNT), vectors[50:])
        engine.flush()
        expected = naive(queries, vectors, np.arange(COUNT), 4, "inner_product", np.zeros((7, 2), int))
        assert engine.search(queries, 4)[1].tolist() == expected

    def test_a_second_process_finds_the_same(self, engines, vectors, queries, tmp_path):
        if engines.kind == "milvus":
            pytest.skip("Milvus Lite serves one process; a Milvus server serves many")
        engine = engines.open()
        engine.create(DIM, "l2")
        engine.add(np.arange(COUNT), vectors)
        engine.flush()
        np.save(tmp_path / "queries.npy", queries)
        module, name = {"faiss": ("faiss_engine", "FaissEngine"), "pgvector": ("postgres_engine", "PostgresEngine")}[
            engines.kind
        ]
        program = (
            f"import sys, numpy as np\nfrom graft.retrieval.engines.{module} import {name}\n"
            f"print({name}(sys.argv[2]).search(np.load(sys.argv[1]), 3)[1].tolist())"
        )
        arguments = [sys.executable, "-c", program, str(tmp_path / "queries.npy"), str(engines.place)]
        clients = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        expected = str(engine.search(queries, 3)[1].tolist())
        for client in clients:
            assert client.communicate(timeout=120)[0].strip() == expected

    def test_dropped_and_created_again_it_is_empty(self, engines, vectors, queries):
        engine = engines.open()
        engine.create(DIM, "l2")
        engine.add(np.arange(COUNT), vectors)
        engine.flush()
        engine.create(DIM, "l2")
        engine.flush()
        assert engine.count() == 0
        assert (engine.search(queries, 2)[1] == -1).all()
        engine.drop()

    def test_wrong_shapes_are_refused(self, engines, vectors, queries):
        engine = engines.open()
        with pytest.raises(ValueError, match='`metric` must be "inner_product" or "l2", got \'cosine\''):
            engine.create(DIM, "cosine")
        engine.create(DIM, "l2")
        with pytest.raises(ValueError, match=r"`ids` and `vectors` must be \(count,\) and \(count, 12\)"):
            engine.add(np.arange(2), vectors[:3])
        for wrong, k, exclude in ((queries[:, :5], 1, None), (queries, 0, None), (queries, 1, np.zeros((2, 2)))):
            with pytest.raises(ValueError, match="`queries` must be|`k` must be|`exclude` must be"):
                engine.search(wrong, k, exclude)


@pytest.mark.parametrize("index", ["hnsw", "ivfflat"])
def test_indexes_of_pgvector_find_the_nearest(postgres, index):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((2000, DIM)).astype(np.float32)
    options = {"hnsw": {"m": 16}, "ivfflat": {"lists": 20}}[index]
    engine = PostgresEngine(postgres, f"by_{index}", index, options, {"ivfflat.probes": 20, "hnsw.ef_search": 200})
    engine.create(DIM, "l2")
    engine.add(np.arange(2000), vectors)
    engine.flush()
    found = engine.search(vectors[::100], 1)[1]
    assert (found[:, 0] == np.arange(0, 2000, 100)).mean() >= 0.95
    engine.close()
    with pytest.raises(ValueError, match="`table` must be made of small letters"):
        PostgresEngine(postgres, "a; DROP TABLE b")
    with pytest.raises(ValueError, match='`index` must be "exact", "hnsw" or "ivfflat"'):
        PostgresEngine(postgres, index="flat")


def test_a_mapped_store_does_not_grow_by_accident(tmp_path, vectors):
    pytest.importorskip("faiss")
    engine = FaissEngine(tmp_path / "v", "ivf_flat", nlist=1, nprobe=1)
    engine.create(DIM, "l2")
    engine.add(np.arange(COUNT), vectors)
    engine.flush()
    opened = FaissEngine(tmp_path / "v")
    assert opened.search(vectors[:3], 1)[1][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="is mapped from .* and cannot grow"):
        opened.store.add(torch.from_numpy(vectors))
    opened.add(np.arange(COUNT, 2 * COUNT), vectors)
    assert opened.count() == 2 * COUNT


@pytest.mark.parametrize(
    ("package", "make", "extra"),
    [
        ("pymilvus", lambda: MilvusEngine("x.db"), "milvus"),
        ("psycopg", lambda: PostgresEngine("dbname=x"), "pgvector"),
        ("faiss", lambda: FaissEngine("x").create(DIM), "faiss"),
        ("bm25s", lambda: BM25Retriever(None), "bm25"),
        ("ray", RayExecutor, "ray"),
    ],
)
def test_an_absent_client_names_its_extra(monkeypatch, package, make, extra):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed, where it is
    with pytest.raises(ImportError, match=rf"pip install graft-transformers\[{extra}\]"):
        make()
