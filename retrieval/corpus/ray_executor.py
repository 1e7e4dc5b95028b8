"""Shards on a Ray cluster: actors hold the corpus and the stage's function, so an encoder is loaded once in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .corpus import Corpus
from .executors import InOrder, Shard, ShardFunction, ShardResult


def import_ray() -> Any:
    """The module, or an ImportError that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("this executor needs Ray: pip install graft-transformers[ray]") from error
    return ray


class _ShardActor:
    """What runs on a machine of the cluster; Ray starts it again where it died, and asks again."""

    def __init__(self, folder: str, compute: ShardFunction) -> None:
        self.corpus, self.compute = Corpus(folder), compute

    def __call__(self, start: int, end: int) -> dict[str, Any]:
        return dict(self.compute(self.corpus, start, end))


class RayExecutor:
    """Actors on a Ray cluster; the folder of the corpus must be the same path on all machines.

    Without a cluster, one with as many CPUs as the actors need is begun in this process. It serves later stages too
    and ends with the process, or by `ray.shutdown()`: to begin one takes seconds.
    Where a cluster has room for fewer actors than are asked for, these do the work and the others join when they can.

    Args:
        actors: that compute at once.
        address: of a cluster; None joins one if the environment names it, else begins one here.
        num_cpus, num_gpus: that an actor takes up.
        retries: of a shard whose actor died.

    Raises:
        ImportError: Ray is not installed.
        ValueError: `actors` is below 1.
    """

    def __init__(
        self,
        actors: int = 2,
        address: str | None = None,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        retries: int = 3,
    ) -> None:
        if actors < 1:
            raise ValueError(f"`actors` must be at least 1, got {actors}.")
        self.ray = import_ray()
        self.actors, self.address, self.retries = actors, address, retries
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def run(self, corpus: Corpus, compute: ShardFunction, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Each shard with its arrays, in the order of `shards`."""
        ray = self.ray
        if not ray.is_initialized():
            begun_here = {"num_cpus": self.actors * self.resources["num_cpus"]} if self.address is None else {}
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, **begun_here)
        options = {"max_restarts": -1, "max_task_retries": self.retries, **self.resources}
        kind, shared = ray.remote(**options)(_ShardActor), ray.put(compute)
        actors = [kind.remote(str(corpus.folder.absolute()), shared) for _ in range(min(self.actors, len(shards)))]
        starting = {actor.__ray_ready__.remote(): actor for actor in actors}
        order, running = InOrder(shards, 2 * self.actors), {}
        idle: list[Any] = []
        while order.expected:
            while idle and (shard := order.next()) is not None:
                actor = idle.pop()
                running[actor.__call__.remote(*shard[1:])] = actor, shard
            [ready] = ray.wait([*starting, *running])[0]
            answer = ray.get(ready)
            if ready in starting:
                idle.append(starting.pop(ready))
            else:
                actor, shard = running.pop(ready)
                idle.append(actor)
                yield from order.finish(shard, answer)
