"""Threads that do not change results: each computes alone, so how work is shared out changes no bit."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded(active: bool = True) -> Iterator[Callable[[], None]]:
    """Let torch use one thread per caller; how many it used before is restored at the end.

    A product that several threads share out may add in another order than one thread does. Give what this yields to a
    thread pool as its initializer: a new thread does not inherit the setting.
    """
    before = torch.get_num_threads()
    if active:
        torch.set_num_threads(1)
    try:
        yield (lambda: torch.set_num_threads(1)) if active else (lambda: None)
    finally:
        if active:
            torch.set_num_threads(before)


def default_workers() -> int:
    """As many as the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
