"""Shard functions that fail or kill their worker; a module of its own, since workers import it by name."""

import os
import signal
import threading
import time

import numpy as np


def dies_once(corpus, start, end, mark):
    """What a shard holds; the first worker to come to chunk 16 kills itself."""
    if start == 16 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {".npy": corpus.tokens.between(start, end).astype(np.int32)}


def fails(corpus, start, end):
    raise KeyError(f"nothing at {start}")


def dies(corpus, start, end):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_meanwhile(corpus, start, end, compute, delays, marks):
    """What `compute` gives; a worker that is the first to come to a chunk of `delays` is killed so many seconds later,
    while it computes or before it has answered."""
    mark = marks / str(start)
    if start not in delays or mark.exists():
        return compute(corpus, start, end)
    mark.touch()
    threading.Timer(delays[start], os.kill, [os.getpid(), signal.SIGKILL]).start()
    compute(corpus, start, end)
    time.sleep(60)
    raise AssertionError("the worker was not killed")
