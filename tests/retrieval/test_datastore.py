import sys
from functools import cache

import numpy as np
import pytest
import torch

from graft.retrieval.datastore import KINDS, Datastore

FAISS = [kind for kind in KINDS if kind != "exact"]
SMALL = {
    "ivf_flat": {"nlist": 8, "nprobe": 4},
    "ivf_sq8": {"nlist": 8, "nprobe": 4},
    "ivf_pq": {"nlist": 8, "nprobe": 8, "code_size": 16},
    "opq_ivf_pq": {"nlist": 8, "nprobe": 8, "code_size": 8},
}
LEAST_RECALL = {"exact": 1, "flat": 1, "ivf_flat": 0.9, "ivf_sq8": 0.9, "hnsw": 0.95, "scalar": 0.95}
LEAST_RECALL |= {"ivf_pq": 0.6, "opq_ivf_pq": 0.45}


# faiss trains product quantizers for half a minute however few the vectors are.
@pytest.fixture(params=[pytest.param(k, marks=pytest.mark.slow) if k.endswith("pq") else k for k in KINDS])
def kind(request):
    if request.param != "exact":
        pytest.importorskip("faiss", reason="the extra graft-transformers[faiss] is not installed")
    return request.param


def clustered(count=2000, dim=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=rng)
    which = torch.randint(40, (count,), generator=rng)
    return centres[which] + 0.5 * torch.randn(count, dim, generator=rng)


@cache
def shared(kind, metric="l2"):
    """Of `clustered()`, trained once; tests only search it."""
    return filled(kind, metric)


def filled(kind, metric="l2", vectors=None):
    store = Datastore(32, kind, metric, **SMALL.get(kind, {}))
    vectors = clustered() if vectors is None else vectors
    store.train(vectors)
    store.add(vectors[:700])
    store.add(vectors[700:])
    return store


def naive_scores(queries, vectors, metric):
    queries, vectors = queries.double(), vectors.double()
    return queries @ vectors.T if metric == "inner_product" else (queries[:, None] - vectors).square().sum(-1)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_each_kind_reaches_its_recall_and_the_exact_ones_are_exact(kind, metric):
    vectors, queries = clustered(), clustered(50, seed=1)
    store = shared(kind, metric)
    expected = naive_scores(queries, vectors, metric)
    best, truth = expected.topk(10, largest=metric == "inner_product")
    scores, ids = store.search(queries, 10)
    recall = (truth[:, :, None] == ids[:, None]).any(-1).double().mean()
    assert recall >= LEAST_RECALL[kind]
    measured, mass = store.recall(queries, 10, vectors)
    assert measured == pytest.approx(float(recall))
    assert 0 < mass <= 1 + 1e-6
    if kind in ("exact", "flat"):
        torch.testing.assert_close(scores.double(), best, rtol=1e-4, atol=1e-3)


def test_a_search_is_widened_by_doubling_until_it_reads_all(kind):
    vectors, queries = clustered(), clustered(20, seed=1)
    store = filled(kind)
    if kind not in ("exact", "flat", "scalar"):
        [name] = store.search_options
        store.parameters[name] = 3
        most = len(vectors) if name == "ef_search" else store.parameters["nlist"]
        while (before := store.parameters[name]) < most:
            assert store.widen()
            assert store.parameters[name] == min(2 * before, most)
        expected = filled(kind).search(queries, 5, **{name: most})
        assert all(torch.equal(mine, whole) for mine, whole in zip(store.search(queries, 5), expected, strict=True))
    assert not store.widen()


def test_a_long_vector_beats_a_near_one_in_inner_product(kind):
    if kind == "opq_ivf_pq":
        pytest.skip("its training is long, and ivf_pq is the same but for a rotation")
    vectors = clustered()
    vectors[77] *= 100
    store = filled(kind, "inner_product", vectors)
    assert int(store.search(vectors[77:78] / 100, 1, **({"nprobe": 8} if "ivf" in kind else {}))[1]) == 77


def test_what_is_excluded_is_not_found_and_the_rest_is(kind):
    vectors, queries = clustered(), clustered(30, seed=1)
    store = shared(kind)
    starts = np.arange(30) // 5 * 300
    exclude = np.stack([starts, starts + 300], 1)
    expected = naive_scores(queries, vectors, "l2")
    for row, (start, end) in enumerate(exclude):
        expected[row, start:end] = torch.inf
    _, ids = store.search(queries, 5, exclude)
    assert not ((ids.numpy() >= exclude[:, :1]) & (ids.numpy() < exclude[:, 1:])).any()
    truth = expected.topk(5, largest=False).indices
    assert (truth[:, :, None] == ids[:, None]).any(-1).double().mean() >= LEAST_RECALL[kind]
    everything = np.tile([0, 2000], (30, 1))
    scores, ids = store.search(queries, 5, everything)
    assert (ids == -1).all()
    assert torch.isinf(scores).all()


def test_ids_of_the_callers_are_given_back_and_excluded_by(kind):
    if kind == "opq_ivf_pq":
        pytest.skip("its training is long, and ivf_pq is the same but for a rotation")
    vectors = clustered()
    store = Datastore(32, kind, "l2", **SMALL.get(kind, {}))
    store.train(vectors)
    store.add(vectors, ids=np.arange(2000) * 3 + 5)
    wide = {"nprobe": 8} if "ivf" in kind else {}
    _, ids = store.search(vectors[:20], 3, np.tile([0, 3005], (20, 1)), **wide)
    assert (ids % 3 == 2).all()
    assert (ids >= 3005).all()
    with pytest.raises(ValueError, match="`ids` must be 1 numbers that ascend beyond those stored"):
        store.add(vectors[:1], ids=np.array([5]))


def test_fewer_vectors_than_asked_for_end_in_missing_ones(kind):
    if kind in SMALL:
        pytest.skip("inverted lists need more vectors")
    store = Datastore(4, kind, "l2")
    assert store.search(torch.randn(2, 4), 3)[1].tolist() == [[-1] * 3] * 2
    store.add(torch.eye(4)[:2])
    _, ids = store.search(torch.eye(4)[:1], 3)
    assert ids.tolist() == [[0, 1, -1]]


def test_a_saved_store_answers_the_same(kind, tmp_path):
    store, queries = shared(kind), clustered(9, seed=2)
    store.save(tmp_path / "store")
    loaded = Datastore.load(tmp_path / "store")
    assert repr(loaded) == repr(store)
    assert loaded.nbytes == store.nbytes
    for ours, theirs in zip(loaded.search(queries, 4), store.search(queries, 4), strict=True):
        assert torch.equal(ours, theirs)
    vectors = clustered()
    error = (loaded.reconstruct(np.array([3, 900])) - vectors[[3, 900]]).norm() / vectors[[3, 900]].norm()
    assert error < {"ivf_pq": 0.5, "opq_ivf_pq": 0.9}.get(kind, 0.05)
    name = "vectors.npy" if kind == "exact" else "index.faiss"
    content = bytearray((tmp_path / "store" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "store" / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        Datastore.load(tmp_path / "store")


def test_a_store_with_a_missing_or_shortened_file_is_refused_with_its_name(kind, tmp_path):
    shared(kind).save(tmp_path / "store")
    index = "vectors.npy" if kind == "exact" else "index.faiss"
    for name in ("ids.npy", index):
        path = tmp_path / "store" / name
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        with pytest.raises(ValueError, match=name):
            Datastore.load(tmp_path / "store")
        path.unlink()
        with pytest.raises(ValueError, match=name):
            Datastore.load(tmp_path / "store")
        path.write_bytes(content)
    assert len(Datastore.load(tmp_path / "store")) == 2000


def test_training_twice_gives_the_same_bytes(kind, tmp_path):
    if kind in ("hnsw", "opq_ivf_pq"):
        pytest.skip("a graph is built by several threads; a rotation is long to train")
    for name in ("a", "b"):
        filled(kind).save(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_wrong_arguments_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="`kind` must be one of exact, flat, .*got 'tree'"):
        Datastore(4, "tree")
    with pytest.raises(ValueError, match='`metric` must be "inner_product" or "l2", got \'cosine\''):
        Datastore(4, metric="cosine")
    with pytest.raises(ValueError, match=r"kind 'exact' has the parameters \[\], got \['nprobe'\]"):
        Datastore(4, nprobe=3)
    with pytest.raises(ValueError, match=r"vectors must be \(count, 4\), got \(2, 5\)"):
        Datastore(4).add(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        Datastore(4).search(torch.zeros(2, 4), 0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)  # as if it were not installed
        with pytest.raises(ImportError, match=r"faiss.*graft-transformers\[faiss\]"):
            Datastore(4, "flat")
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="`nlist` 8 needs at least 312 training vectors, 39 for each list, got 40"):
        Datastore(4, "ivf_flat", nlist=8).add(torch.randn(40, 4))
    with pytest.raises(ValueError, match="`code_size` must divide the dimension 4, got 3"):
        Datastore(4, "ivf_pq", nlist=1, code_size=3).add(torch.randn(40, 4))
    with pytest.raises(ValueError, match="`device` of kind 'flat' must be the CPU, got cuda"):
        Datastore(4, "flat", device="cuda")
    with pytest.raises(KeyError, match="lacks some of the ids"):
        filled("exact").reconstruct(np.array([5000]))
