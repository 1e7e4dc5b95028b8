"""Build a corpus while being killed again and again; run as a program by test_corpus_kill.py.

python killed_build.py TEXTS ENCODER SCRATCH SEED WORKERS KILLS INDEX sweep|some

Imports once, then forks one child per attempt and ends it by SIGKILL: by turns at any time of the whole build, and at
any time of one stage, the one of the next two that was hit less often, however short it is; more often early in it. It
goes on until there were KILLS; in a sweep until each stage was hit as well, or there were four times as many. Prints
one JSON object: the stages in which the kills fell, and the names of files that differ from those of an uninterrupted
build by one worker.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.document_sources import TextFolder
from graft.retrieval.corpus.embedder import ChunkEmbedder
from graft.retrieval.corpus.manifest import Manifest
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus
from graft.retrieval.corpus.stage import stages_so_far

ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT  # asks whether a child has ended, and leaves it to be waited for


def build(folder: Path, texts: Path, embedder: ChunkEmbedder, index: str, workers: int) -> None:
    settings = PreparationSettings(ChunkSettings(8, 8), 3, 32, "multi", workers, index)
    prepare_corpus(TextFolder(texts), folder, embedder.tokenizer, embedder, settings)


def start(*arguments) -> int:
    child = os.fork()
    if child:
        return child
    try:
        build(*arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def stage_under_way(folder: Path) -> str:
    """What the manifest says is being made; reading it also shows that a kill never leaves half a manifest."""
    if not (folder / "manifest.json").exists():
        return "nothing"
    states = stages_so_far(Manifest.read(folder))
    return next((stage for stage, state in states.items() if state == "running"), "between")


def seconds_of_stages(folder: Path, child: int) -> dict[str, float]:
    """How long the child is seen in each stage, until it has ended."""
    seconds: dict[str, float] = {}
    before = time.monotonic()
    while os.waitid(os.P_PID, child, ENDED) is None:
        stage = stage_under_way(folder)
        now = time.monotonic()
        seconds[stage] = seconds.get(stage, 0.0) + now - before
        before = now
        time.sleep(0.0002)
    return seconds


def wait_for_stage(folder: Path, child: int, wanted: str, seconds: float) -> None:
    """Return so many seconds after the child has begun the stage, or when it has ended."""
    while stage_under_way(folder) != wanted and os.waitid(os.P_PID, child, ENDED) is None:
        time.sleep(0.0002)
    time.sleep(seconds)


def least_hit(folder: Path, stages: list[str], hit: list[str]) -> str:
    """Of the next two stages that are not complete, the one hit less often."""
    states = stages_so_far(Manifest.read(folder)) if (folder / "manifest.json").exists() else {}
    left = [stage for stage in stages if states.get(stage) != "complete"]
    return min(left[:2] or ["none"], key=hit.count)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    texts, encoder, scratch = map(Path, sys.argv[1:4])
    seed, workers, kills = map(int, sys.argv[4:7])
    index, sweep = sys.argv[7], sys.argv[8] == "sweep"
    rng, embedder = random.Random(seed), ChunkEmbedder(encoder)
    began = time.monotonic()
    child = start(scratch / "whole", texts, embedder, index, 1)
    seconds = seconds_of_stages(scratch / "whole", child)
    assert os.waitpid(child, 0)[1] == 0
    whole_seconds, expected = time.monotonic() - began, digests(scratch / "whole")
    stages = list(Manifest.read(scratch / "whole").stages)
    hit, differing, attempt = [], set(), 0

    def wants_more() -> bool:
        return len(hit) < kills or (sweep and not set(stages) <= set(hit) and len(hit) < 4 * kills)

    while wants_more():
        folder = scratch / f"killed{attempt}"
        attempt += 1
        while True:
            wanted = least_hit(folder, stages, hit)
            child = start(folder, texts, embedder, index, workers)
            if len(hit) % 2:
                wait_for_stage(folder, child, wanted, rng.random() ** 2 * seconds.get(wanted, 0.0))
            else:
                time.sleep(rng.uniform(0, whole_seconds * 0.8))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, status
                break
            if not wants_more():
                assert os.waitpid(child, 0)[1] == 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hit.append(stage_under_way(folder))
        ours = digests(folder)
        differing |= {name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)}
    print(json.dumps({"hit": hit, "differing": sorted(differing), "builds": attempt, "seconds": whole_seconds}))


if __name__ == "__main__":
    main()
