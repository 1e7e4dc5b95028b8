"""Pack a corpus while being killed at each call that touches a file; run as a program by test_corpus_kill.py.

python killed_pack.py TEXTS ENCODER SCRATCH

The stage takes milliseconds, which a kill by the clock hits by luck. So a child ends itself by SIGKILL at its n-th
call that opens, makes, renames or removes a file of the corpus, for every n there is. Prints one JSON object: the
calls, the n whose kill left an interrupted stage, and for each n the names of files that differ after a run that goes
on from there.
"""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

from killed_build import build, digests, stage_under_way

from graft.retrieval.corpus.embedder import ChunkEmbedder
from graft.retrieval.corpus.manifest import Manifest
from graft.retrieval.corpus.packing import pack_sequences

CALLS = ("open", "os.mkdir", "os.rename", "os.remove")


def packed(folder: Path, die_at: int | None = None) -> list[str]:
    """Run the stage and give its calls, or be killed at one of them."""
    calls: list[str] = []

    def note(event, arguments) -> None:
        if event in CALLS and str(arguments[0]).startswith(str(folder)):
            if len(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(event)

    sys.addaudithook(note)
    pack_sequences(folder, 32)
    return calls


def status_in_child(call) -> int:
    """How a fork of this process ends that makes the call."""
    child = os.fork()
    if not child:
        try:
            call()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    texts, encoder, scratch = map(Path, sys.argv[1:4])
    whole, before, killed = (scratch / name for name in ("whole", "before", "killed"))
    build(whole, texts, ChunkEmbedder(encoder), "exact", 1)
    shutil.copytree(whole, before)
    manifest = Manifest.read(before)
    manifest.drop("pack")
    manifest.write()
    manifest.remove_leftovers()
    calls, expected = packed(Path(shutil.copytree(before, scratch / "counted"))), digests(whole)
    interrupted, differing = [], {}
    for die_at in range(len(calls)):
        shutil.copytree(before, killed)
        assert status_in_child(partial(packed, killed, die_at)) == signal.SIGKILL
        if stage_under_way(killed) == "pack":
            interrupted.append(die_at)
        assert status_in_child(partial(pack_sequences, killed, 32)) == 0
        ours = digests(killed)
        if names := sorted(name for name in ours | expected if ours.get(name) != expected.get(name)):
            differing[die_at] = names
        shutil.rmtree(killed)
    print(json.dumps({"calls": calls, "interrupted": interrupted, "differing": differing}))


if __name__ == "__main__":
    main()
