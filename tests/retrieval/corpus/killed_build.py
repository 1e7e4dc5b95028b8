"""Build a corpus while being killed again and again; run as a program by test_corpus_kill.py.

python killed_build.py TEXTS ENCODER SCRATCH SEED WORKERS KILLS INDEX

Imports once, then forks one child per attempt and ends it by SIGKILL: by turns at any time, and soon after a stage has
begun, however long others take on a busy machine. Prints one JSON object: the stages in which the kills fell, and the
names of files that differ from those of an uninterrupted build by one worker.
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


def wait_for_stage(folder: Path, child: int, rng: random.Random) -> None:
    """Return a little after the child has begun one of the next two stages, or when it has ended."""
    states = stages_so_far(Manifest.read(folder)) if (folder / "manifest.json").exists() else {"tokenize": "missing"}
    wanted = rng.choice([stage for stage, state in states.items() if state != "complete"][:2] or ["none"])
    while stage_under_way(folder) != wanted and os.waitid(os.P_PID, child, ENDED) is None:
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    texts, encoder, scratch = map(Path, sys.argv[1:4])
    seed, workers, kills = map(int, sys.argv[4:7])
    index = sys.argv[7]
    rng, embedder = random.Random(seed), ChunkEmbedder(encoder)
    began = time.monotonic()
    assert os.waitpid(start(scratch / "whole", texts, embedder, index, 1), 0)[1] == 0
    whole_seconds, expected = time.monotonic() - began, digests(scratch / "whole")
    hit, differing, attempt = [], set(), 0
    while len(hit) < kills:
        folder = scratch / f"killed{attempt}"
        attempt += 1
        while True:
            child = start(folder, texts, embedder, index, workers)
            if len(hit) % 2:
                wait_for_stage(folder, child, rng)
            else:
                time.sleep(rng.uniform(0, whole_seconds * 0.8))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, status
                break
            if len(hit) >= kills:
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
