"""Rows that lie in several files, read as one: mapped, never written to, nothing copied but what is asked for."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np


class ShardedRows:
    """Arrays that share their trailing shape, one behind another, addressed by row number.

    Args:
        shards: arrays (rows_s, ...) of one dtype, at least one; memory maps stay maps.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.offsets = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])]).astype(np.int64)
        self._opaque = [_opaque(shard) for shard in self.shards]
        self._firsts: list[int] = self.offsets[:-1].tolist()  # of each shard; a list is searched faster for one number
        self.shape = (int(self.offsets[-1]), *self.shards[0].shape[1:])
        self.dtype = self.shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copy rows out.

        Args:
            rows: (count,) integers in [0, len).

        Returns:
            (count, ...).
        """
        if len(self.shards) == 1:
            return self.shards[0].take(rows, axis=0)
        where = np.searchsorted(self.offsets, rows, side="right") - 1
        if len(rows) and (first := where[0]) == where[-1] and (where == first).all():
            return self.shards[first].take(rows - self.offsets[first], axis=0)
        taken = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        whole = _opaque(taken)
        for shard in np.bincount(where).nonzero()[0]:
            here = (where == shard).nonzero()[0]
            whole[here] = self._opaque[shard].take(rows[here] - self.offsets[shard])
        return taken

    def between(self, start: int, end: int) -> np.ndarray:
        """Rows start ... end - 1; a view if they lie in one shard."""
        first = bisect_right(self._firsts, start) - 1
        offset, shard = self._firsts[first], self.shards[first]
        if end <= start or end <= offset + len(shard):
            return shard[start - offset : max(end, start) - offset]
        return np.concatenate([block[max(start - at, 0) : end - at] for at, block in self._overlapping(start, end)])

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Views of at most `rows` rows each, none across two shards, with the number of their first row."""
        for offset, shard in zip(self.offsets, self.shards, strict=False):
            for start in range(0, len(shard), rows):
                yield int(offset) + start, shard[start : start + rows]

    def _overlapping(self, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        for offset, shard in zip(self.offsets, self.shards, strict=False):
            if offset < end and offset + len(shard) > start:
                yield int(offset), shard


def _opaque(rows: np.ndarray) -> np.ndarray:
    """(rows,) views of whole rows, which numpy moves at once and not number by number."""
    numbers = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    return numbers.view(np.dtype((np.void, numbers.shape[1] * numbers.itemsize)))[:, 0]
