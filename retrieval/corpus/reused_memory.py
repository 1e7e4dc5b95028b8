"""Memory for batches, lent again when nothing reads it any more.

A batch is gathered in microseconds, and most of them would go into fresh pages, which the kernel fills with zeros.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Int64 tensors on blocks of memory that come back when the last tensor on them goes.

    Args:
        keep: free blocks that are kept, the last that came back.
    """

    def __init__(self, keep: int = 4) -> None:
        self.keep = keep
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[int]]:
        return ReusedMemory, (self.keep,)  # a process that gets this has memory of its own

    def lend(self, count: int) -> Tensor:
        """(count,) int64 with arbitrary numbers; any view of it keeps its block from being lent again."""
        block = self._block(count)
        lent = block[:count]  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent)

    def _block(self, count: int) -> np.ndarray:
        while True:
            try:
                block = self._free.pop()
            except IndexError:
                return np.empty(count, dtype=np.int64)
            if count <= len(block) <= 2 * count:  # others are of batches of another size, and go
                return block
