"""Who calls a stage's function for each shard: this process, or several; in ray_executor.py, those of a cluster.

The functions are pure over (corpus, shard), and only the caller writes, in the order of shards: whoever computes, the
files get the same bytes. A worker that dies is replaced, and what it had not sent is computed again.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, cast

import numpy as np

from .corpus import Corpus
from .threads import default_workers

logger = logging.getLogger(__name__)

ShardFunction = Callable[[Corpus, int, int], Mapping[str, np.ndarray]]
"""(corpus, first chunk, end) to arrays by file suffix; the same call gives the same bytes, whoever makes it."""
Shard = tuple[int, int, int]
"""Its number, first chunk and end."""
ShardResult = tuple[Shard, Mapping[str, np.ndarray]]


class Executor(Protocol):
    """Calls a stage's function for each shard."""

    def run(self, corpus: Corpus, compute: ShardFunction, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Each shard with its arrays, in the order of `shards`."""
        ...


class InProcess:
    """One shard after another, here; the stages use threads of their own."""

    def run(self, corpus: Corpus, compute: ShardFunction, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Each shard with its arrays, in the order of `shards`."""
        for shard in shards:
            yield shard, compute(corpus, *shard[1:])


def executor_and_threads(workers: int | Executor | None) -> tuple[Executor, int]:
    """What `workers` of a stage means: so many threads of this process (None: the cores), or an executor's workers,
    each with one thread.

    Raises:
        ValueError: a number below 1.
    """
    if workers is None or isinstance(workers, int):
        if workers is not None and workers < 1:
            raise ValueError(f"`workers` must be at least 1, got {workers}.")
        return InProcess(), workers or default_workers()
    return workers, 1


class InOrder:
    """Gives out shards a little ahead, takes results in any order, and hands them on in the first one.

    Args:
        shards: to be computed.
        ahead: at most so many are given out or held, which bounds memory.
    """

    def __init__(self, shards: Sequence[Shard], ahead: int) -> None:
        self.waiting = deque(shards)
        self.expected = deque(shards)
        self.done: dict[Shard, Mapping[str, np.ndarray]] = {}
        self.ahead, self.out = ahead, 0

    def next(self) -> Shard | None:
        """A shard to compute now, or None."""
        if not self.waiting or self.out + len(self.done) >= self.ahead:
            return None
        self.out += 1
        return self.waiting.popleft()

    def give_back(self, shard: Shard) -> None:
        """A shard was not computed; it is next again."""
        self.out -= 1
        self.waiting.appendleft(shard)

    def finish(self, shard: Shard, arrays: Mapping[str, np.ndarray]) -> Iterator[ShardResult]:
        """A result has come; all that can be handed on now."""
        self.out -= 1
        self.done[shard] = arrays
        while self.expected and self.expected[0] in self.done:
            first = self.expected.popleft()
            yield first, self.done.pop(first)


@dataclass
class _Worker:
    """A process and what it is at."""

    process: Any
    connection: Connection
    shard: Shard | None = None

    def ask(self, shard: Shard) -> None:
        self.shard = shard
        self.connection.send(shard)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


class LocalExecutor:
    """Processes of this machine, started anew (not forked), each with the corpus and the stage's function.

    Args:
        processes: by default the cores.
        most_deaths: workers that may die, killed or out of memory, before the stage gives up.

    Raises:
        ValueError: `processes` is below 1.
    """

    def __init__(self, processes: int | None = None, most_deaths: int = 3) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"`processes` must be at least 1, got {processes}.")
        self.processes, self.most_deaths = processes or default_workers(), most_deaths

    def run(self, corpus: Corpus, compute: ShardFunction, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Each shard with its arrays, in the order of `shards`.

        Raises:
            RuntimeError: the function failed in a worker, or too many workers died.
        """
        order, deaths = InOrder(shards, 2 * self.processes), 0
        workers = [_start(corpus, compute) for _ in range(min(self.processes, len(shards)))]
        try:
            while order.expected:
                _give_out(workers, order)
                for worker in _ready(workers):
                    result = _receive(worker)
                    if result is not None:
                        shard, worker.shard = cast(Shard, worker.shard), None
                        yield from order.finish(shard, result)
                        continue
                    deaths += 1
                    if deaths > self.most_deaths:
                        raise RuntimeError(f"{deaths} workers died, the last at chunks {worker.shard}; see the log.")
                    logger.warning("a worker died at chunks %s, another takes its place", worker.shard)
                    order.give_back(cast(Shard, worker.shard))
                    worker.end()
                    workers[workers.index(worker)] = _start(corpus, compute)
        finally:
            for worker in workers:
                worker.end()


def _give_out(workers: Sequence[_Worker], order: InOrder) -> None:
    for worker in workers:
        if worker.shard is None and (shard := order.next()) is not None:
            worker.shard = shard
            try:
                worker.ask(shard)
            except OSError:  # it is dead, which `_receive` will find
                logger.debug("a worker could not be asked")


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    by_connection = {worker.connection: worker for worker in workers if worker.shard is not None}
    return [by_connection[cast(Connection, ready)] for ready in wait(list(by_connection))]


def _receive(worker: _Worker) -> Mapping[str, np.ndarray] | None:
    """A worker's result; None if it died."""
    try:
        failure, arrays = worker.connection.recv()
    except (EOFError, OSError):
        return None
    if failure:
        raise RuntimeError(f"a worker failed at chunks {worker.shard}: {failure}")
    return cast(Mapping[str, np.ndarray], arrays)


def _start(corpus: Corpus, compute: ShardFunction) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, corpus, compute), daemon=True)
    process.start()
    theirs.close()  # so that ours ends when the worker does
    return _Worker(process, ours)


def _serve(connection: Connection, corpus: Corpus, compute: ShardFunction) -> None:
    """A worker: shards in, arrays out, until the caller hangs up."""
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Mapping[str, np.ndarray]] = ("", compute(corpus, *shard[1:]))
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", {})
        connection.send(answer)
