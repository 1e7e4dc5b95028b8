"""Calls of a system in a process of its own, measured one by one as worker_process.py asks for them.

Needs torch alone: environments of originals, with an older transformers, run it too.
"""

import json
import os
import resource
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, TextIO

import torch


class PeakMemory:
    """The highest resident memory while it runs, in MB above what there was at the start."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self._resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak = max(self.peak, self._resident())
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    @property
    def extra(self) -> float:
        return self.peak - self.start


def answers() -> TextIO:
    """The stdout that is asked for answers; whatever else is printed from now on goes nowhere."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return channel


def serve(channel: TextIO, calls: dict[str, Callable[[], Any]], probe: list[float]) -> int:
    """Answer lines of stdin until it ends: "probe", "peak NAME" or the name of a call, with one line of JSON each."""
    for line in sys.stdin:
        word, _, name = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        if word == "probe":
            answer = {"probe": probe}
        elif word == "peak":
            with PeakMemory() as memory:
                calls[name]()
            answer = {"peak MB": round(memory.extra, 1)}
        else:
            call = calls[line.strip()]
            start, began = time.perf_counter(), time.process_time()
            call()
            answer = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - began}
        print(json.dumps(answer), file=channel, flush=True)
    return 0


def passes(forward: Callable[[], torch.Tensor], backward: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The two calls of most systems, under the names of the tables."""

    def without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    return {"fwd": without_gradients, "fwd+bwd": backward}


def without_scatter() -> None:
    """Let the original's package xgpt be imported without torch_scatter, which only a layer it never builds calls."""
    scatter = types.ModuleType("torch_scatter")
    for name in ("scatter_mean", "scatter_add", "scatter_min", "scatter_max"):
        setattr(scatter, name, None)
    sys.modules.setdefault("torch_scatter", scatter)
