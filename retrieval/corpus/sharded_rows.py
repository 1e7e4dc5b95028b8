"""Rows that lie in several files, read as one: mapped, never written to, nothing copied but what is asked for."""

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
        for shard in np.flatnonzero(np.bincount(where)):
            here = np.flatnonzero(where == shard)
            taken[here] = self.shards[shard].take(rows[here] - self.offsets[shard], axis=0)
        return taken

    def between(self, start: int, end: int) -> np.ndarray:
        """Rows start ... end - 1; a view if they lie in one shard."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        if end <= start or end <= self.offsets[first + 1]:
            return self.shards[first][start - self.offsets[first] : max(end, start) - self.offsets[first]]
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
