"""Whoever computes a shard, the files get the same bytes, also if a worker is killed meanwhile."""

import importlib
import os
import random
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import data, integers

from graft.retrieval.corpus.document_sources import TextFolder
from graft.retrieval.corpus.embedding import embed_corpus
from graft.retrieval.corpus.executors import InOrder, InProcess, LocalExecutor, executor_and_threads
from graft.retrieval.corpus.neighbours import find_neighbours

EXECUTORS = [
    "local",
    pytest.param("ray", marks=pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")),
]


def make(kind):
    if kind == "local":
        return LocalExecutor(2)
    from graft.retrieval.corpus.ray_executor import RayExecutor

    return RayExecutor(2)


@pytest.fixture(scope="module", autouse=True)
def functions():
    """The functions of dying_shards.py, importable in workers too; Ray, once begun, serves all tests of this file."""
    folder = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
        yield importlib.import_module("dying_shards")
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_executors_give_the_bytes_of_one_process(kind, tmp_path, build, embedder, text_folder, digests):
    folders = {name: tmp_path / name for name in ("here", "elsewhere")}
    for name, folder in folders.items():
        build(folder, source=TextFolder(text_folder), until="tokenize")
        workers = 1 if name == "here" else make(kind)
        assert len(embed_corpus(folder, embedder, workers).shards) > 2
        find_neighbours(folder, 3, workers=workers)
    assert digests(folders["here"]) == digests(folders["elsewhere"])


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_worker_killed_in_the_middle_is_replaced(kind, tmp_path, corpus, functions):
    mark = tmp_path / "killed"
    assert corpus.shards[2][0] == 16
    shards = [(number, start, end) for number, (start, end) in enumerate(corpus.shards)]
    results = list(make(kind).run(corpus, partial(functions.dies_once, mark=mark), shards))
    assert mark.exists()
    assert [shard for shard, _ in results] == shards
    joined = np.concatenate([arrays[".npy"] for _, arrays in results])
    assert (joined == corpus.tokens.between(0, len(corpus))).all()


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_more_actors_than_a_cluster_has_room_for_wait_for_nothing(corpus, functions, tmp_path):
    """Of the cluster that two actors began, or of one that is smaller than asked for."""
    mark = tmp_path / "nobody dies"
    mark.touch()
    for executor in (make("ray"), type(make("ray"))(5)):
        shards = [(number, start, end) for number, (start, end) in enumerate(corpus.shards)]
        results = list(executor.run(corpus, partial(functions.dies_once, mark=mark), shards))
        assert [shard for shard, _ in results] == shards
    import ray

    assert ray.cluster_resources()["CPU"] == 2


class Killing:
    """An executor of which two workers are killed at random moments, one at an early shard and one at a late."""

    def __init__(self, executor, function, marks, rng):
        self.executor, self.function, self.marks, self.rng = executor, function, marks, rng

    def run(self, corpus, compute, shards):
        half = len(shards) // 2
        starts = [self.rng.choice(part)[1] for part in (shards[: half - 2], shards[half + 2 :])]
        delays = {start: self.rng.uniform(0, 0.05) for start in starts}
        self.marks.mkdir()
        yield from self.executor.run(
            corpus, partial(self.function, compute=compute, delays=delays, marks=self.marks), shards
        )
        assert {int(mark.name) for mark in self.marks.iterdir()} == set(starts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXECUTORS)
def test_two_workers_killed_in_each_stage_change_no_byte(
    kind, tmp_path, build, embedder, text_folder, digests, functions
):
    rng = random.Random(5)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    build(undisturbed, source=TextFolder(text_folder), until="neighbours")
    assert len(build(killed, source=TextFolder(text_folder), until="tokenize").shards) > 6
    stages = [partial(embed_corpus, killed, embedder), partial(find_neighbours, killed, 3)]
    for number, stage in enumerate(stages):
        stage(workers=Killing(make(kind), functions.killed_meanwhile, tmp_path / f"marks{number}", rng))
    assert digests(undisturbed) == digests(killed)


def test_failures_and_many_deaths_end_the_stage(corpus, functions):
    shards = [(0, 0, 8), (1, 8, 16)]
    with pytest.raises(RuntimeError, match=r"a worker failed at chunks .*KeyError: 'nothing at 0'"):
        list(LocalExecutor(1).run(corpus, functions.fails, shards))
    with pytest.raises(RuntimeError, match="2 workers died"):
        list(LocalExecutor(1, most_deaths=1).run(corpus, functions.dies, shards))


@given(count=integers(0, 9), ahead=integers(1, 4), choices=data())
def test_results_are_handed_on_in_order_and_few_are_held(count, ahead, choices):
    shards = [(n, n, n + 1) for n in range(count)]
    order, running, handed = InOrder(shards, ahead), [], []
    while order.expected:
        while (shard := order.next()) is not None:
            running.append(shard)
        assert len(running) + len(order.done) <= ahead
        taken = running.pop(choices.draw(integers(0, len(running) - 1)))
        if choices.draw(integers(0, 3)) == 0:
            order.give_back(taken)
            continue
        handed += [shard for shard, _ in order.finish(taken, {})]
    assert handed == shards


def test_workers_are_threads_or_an_executor():
    executor, threads = executor_and_threads(3)
    assert (type(executor), threads) == (InProcess, 3)
    local = LocalExecutor(2)
    assert executor_and_threads(local) == (local, 1)
    for make_it in (lambda: executor_and_threads(0), lambda: LocalExecutor(0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            make_it()
