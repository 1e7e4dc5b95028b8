"""Raw files mapped one behind another into one range of addresses, so that rows of many files are gathered at once.

Numpy gathers from one array; over a thousand shards a gather is a thousand small ones. Files whose sizes are multiples
of a page can lie side by side in memory as if they were one file, which the kernel is asked for here.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_FIXED, _FAILED = 0x10, ctypes.c_void_p(-1).value  # MAP_FIXED of Linux, macOS and the BSDs, which Python does not name


def joined_maps(paths: Sequence[Path], dtype: np.dtype, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Map raw files read-only; runs of files that fill their pages, and one behind such a run, become one array.

    Args:
        paths: of files that are not empty.
        dtype: of all.
        shapes: (rows, ...) of each, alike but for the rows.

    Returns:
        arrays (rows, ...) that hold the rows of all files in turn.

    Raises:
        OSError: the kernel refuses a map.
    """
    runs: list[list[int]] = [[]]
    for number, shape in enumerate(shapes):
        runs[-1].append(number)
        if _num_bytes(shape, dtype) % mmap.ALLOCATIONGRANULARITY:
            runs.append([])
    return [_joined([paths[n] for n in run], dtype, [shapes[n] for n in run]) for run in runs if run]


def _joined(paths: Sequence[Path], dtype: np.dtype, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    rows = sum(shape[0] for shape in shapes)
    if len(paths) == 1:
        return np.memmap(paths[0], dtype, "r", shape=shapes[0]).view(np.ndarray)
    sizes = [_num_bytes(shape, dtype) for shape in shapes]
    # The range is Python's: when the last array on it goes, all that was mapped into it is unmapped.
    whole = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    joined = np.frombuffer(whole, dtype).reshape(rows, *shapes[0][1:])
    place = joined.ctypes.data
    for path, size in zip(paths, sizes, strict=True):
        _map_at(place, path, size)
        place += size
    return joined


def _map_at(place: int, path: Path, size: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    number, offset = ctypes.c_int, ctypes.c_long
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, offset]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if call(place, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor, 0) == _FAILED:
            raise OSError(ctypes.get_errno(), "cannot be mapped", str(path))
    finally:
        os.close(descriptor)


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
