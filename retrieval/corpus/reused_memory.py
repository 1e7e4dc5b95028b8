"""Memory for batches, lent again when nothing reads it any more.

A batch is gathered in microseconds, and most of them would go into fresh pages, which the kernel fills with zeros.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Int64 tensors on blocks of memory that come back when the last tensor on them goes.

    Args:
        most: bytes of free blocks that are kept, about, as if all were as large as the last that came back.
    """

    def __init__(self, most: int = 2**25) -> None:
        self.most = most
        self._free: deque[np.ndarray] = deque()

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[int]]:
        return ReusedMemory, (self.most,)  # a process that gets this has memory of its own

    def lend(self, count: int) -> Tensor:
        """(count,) int64 with arbitrary numbers; any view of it keeps its block from being lent again."""
        block = self._block(count)
        lent = block[:count]  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(lent, self._take_back, block).atexit = False
        return torch.from_numpy(lent)

    def _block(self, count: int) -> np.ndarray:
        with suppress(IndexError):  # of an empty queue; other threads take and give too
            while True:
                block = self._free.pop()
                if count <= len(block) <= 2 * count:  # others are of batches of another size, and go
                    return block
        return np.empty(count, dtype=np.int64)

    def _take_back(self, block: np.ndarray) -> None:
        self._free.append(block)
        with suppress(IndexError):
            while len(self._free) * block.nbytes > self.most:
                self._free.popleft()
