"""What the stages share that work by shards: check what is there, do what is missing, note each shard as it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .corpus import Corpus
from .corpus_lock import corpus_lock
from .disk_space import require_space
from .executors import Executor, InProcess, Shard, ShardFunction, ShardResult
from .manifest import STAGES, Manifest, described

logger = logging.getLogger(__name__)

FOLDERS = {"embed": "embeddings", "neighbours": "neighbours"}


def run_shards(
    folder: str | Path,
    stage: str,
    settings: Mapping[str, Any],
    compute: ShardFunction,
    chunk_bytes: int,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> Corpus:
    """Run `compute` for each shard that the manifest does not list yet.

    Args:
        folder: of the corpus.
        stage: "embed" or "neighbours".
        settings: recorded; must equal those of a run begun before.
        compute: makes the arrays of one shard.
        chunk_bytes: that a chunk takes on disk, for the check of space.
        executor: calls `compute`; by default this process.
        overwrite: begin anew; what was made from the old result goes.

    Raises:
        ValueError: `settings` differ from the recorded ones.
        OSError: the disk is too small.
        TimeoutError: another process writes the corpus.
    """
    with corpus_lock(folder):
        manifest = Manifest.read(folder)
        corpus = Corpus(folder)
        if not begin_stage(manifest, stage, settings, overwrite):
            logger.info("%s: stage %s is complete already", folder, stage)
        else:
            pending = _missing_shards(manifest, stage, corpus)
            require_space(folder, chunk_bytes * sum(end - start for _, start, end in pending))
            work = (executor or InProcess()).run(corpus, compute, pending)
            _store_shards(manifest, stage, corpus.num_chunks, pending, work)
            corpus = Corpus(folder)
        manifest.remove_leftovers()
    return corpus


def begin_stage(manifest: Manifest, stage: str, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Check recorded settings against these, and note the stage as running; False if it is complete."""
    if overwrite:
        manifest.drop(stage)
    there = manifest.stages.get(stage)
    if there is None:
        manifest.stages[stage] = {"status": "running", "settings": dict(settings)}
        manifest.write()
        manifest.remove_leftovers()
        return True
    for name, value in settings.items():
        if _essence(there["settings"].get(name)) != _essence(value):
            raise ValueError(
                f"`{name}` is {described(value)}, but stage {stage!r} of {manifest.folder} was run with "
                f"{described(there['settings'].get(name))}; use that, or begin anew with --overwrite (overwrite=True)."
            )
    manifest.remove_leftovers()
    return there["status"] != "complete"


def _essence(value: Any) -> Any:
    """What decides whether two settings are the same: of an embedder or a corpus, not what it is called."""
    return {key: part for key, part in value.items() if key != "name"} if isinstance(value, dict) else value


def complete_stage(manifest: Manifest, stage: str) -> None:
    """Note the stage as complete."""
    manifest.stages[stage]["status"] = "complete"
    manifest.write()


def _missing_shards(manifest: Manifest, stage: str, corpus: Corpus) -> list[Shard]:
    done = {name.split("/")[-1].split(".")[0] for name in manifest.files_of(stage)}
    return [(n, start, end) for n, (start, end) in enumerate(corpus.shards) if f"{n:05d}" not in done]


def _store_shards(
    manifest: Manifest, stage: str, num_chunks: int, pending: list[Shard], results: Iterator[ShardResult]
) -> None:
    """Write what comes, shard by shard, and note each one."""
    todo = sum(end - start for _, start, end in pending)
    began = time.monotonic()
    with tqdm(
        desc=stage, total=num_chunks, initial=num_chunks - todo, unit="chunk", unit_scale=True, disable=None
    ) as progress:
        for (number, start, end), arrays in results:
            for suffix, array in arrays.items():
                manifest.store(stage, f"{FOLDERS[stage]}/{number:05d}{suffix}", array)
            manifest.write()
            progress.update(end - start)
    complete_stage(manifest, stage)
    rate = todo / max(time.monotonic() - began, 1e-9)
    logger.info("%s: stage %s is complete, %d chunks, %.0f a second", manifest.folder, stage, todo, rate)


def stages_so_far(manifest: Manifest) -> dict[str, str]:
    """Each stage with what has become of it: "complete", "running" (or interrupted), or "not begun"."""
    return {stage: manifest.stages.get(stage, {}).get("status", "not begun") for stage in STAGES}
