"""Which token reads the neighbours of which chunk (Borgeaud et al. 2021, section 2.3 and figure 2).

Chunk u holds the tokens u m ... (u + 1) m - 1. Its neighbours are known once its last token is, so they are read from
that token on: a token at position p reads those of chunk (p + 1) // m - 1, as row (p + 1) % m of a group of m.

A forward pass sees `new` tokens behind `past` ones. The groups it touches are numbered from 0, the chunk that was the
last complete one before it, so group i > 0 belongs to the i-th chunk that it completes itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


class ChunkGrid:
    """Lays new tokens out by the chunk they read, all rows of the batch being at the same position.

    Args:
        past: tokens before this forward pass.
        new: tokens in it.
        chunk_size: m.
    """

    def __init__(self, past: int, new: int, chunk_size: int) -> None:
        self.past, self.new, self.chunk_size = past, new, chunk_size
        self.open = past % chunk_size
        """Tokens of the chunk that is open before this pass."""
        self.closed = (past + new) // chunk_size - past // chunk_size
        """Chunks that this pass completes."""
        self.first = (self.open + 1) // chunk_size
        """The group of the first new token."""

    def group(self, tokens: Tensor, skips_past: bool) -> Tensor:
        """(batch, new, ...) to (batch groups, rows, ...); `skips_past` leaves group 0 out."""
        start = self.group_start(skips_past)
        if start == self.closed and not skips_past:  # all in one group: nothing to fill up
            return tokens
        m = self.chunk_size
        before = self.open + 1 - start * m  # rows to fill in front, or tokens to leave out
        tokens = tokens[:, max(-before, 0) :]
        if start == self.closed:
            return tokens
        after = (self.closed + 1 - start) * m - max(before, 0) - tokens.shape[1]
        filled = pad(tokens, (0, 0) * (tokens.dim() - 2) + (max(before, 0), after))
        return filled.reshape(-1, m, *tokens.shape[2:])

    def ungroup(self, rows: Tensor, skips_past: bool) -> Tensor:
        """Undo `group`: (batch groups, rows, width) to (batch, new, width), exact 0 for tokens that were left out."""
        start = self.group_start(skips_past)
        before = self.open + 1 - start * self.chunk_size
        if start != self.closed:
            flat = rows.reshape(-1, (self.closed + 1 - start) * self.chunk_size, rows.shape[-1])
            rows = flat[:, max(before, 0) : max(before, 0) + self.new - max(-before, 0)]
        return pad(rows, (0, 0, max(-before, 0), 0)) if before < 0 else rows

    def rows_of(self, chunk: Tensor, skips_past: bool) -> Tensor:
        """Of something for each row of a full group, (1, m, ...), what belongs to the rows of the groups here.

        Returns:
            (batch groups or 1, rows, ...): a token at position p is row (p + 1) % m.
        """
        start = self.group_start(skips_past)
        if start != self.closed:
            return chunk
        first = max(self.open + 1 - start * self.chunk_size, 0)
        return chunk[:, first : self.open + self.new + 1 - start * self.chunk_size]

    def completes(self) -> Tensor:
        """(1 or batch, chunks) bool: which of the chunks that this pass completes each row really has."""
        return torch.ones(1, self.closed, dtype=torch.bool)

    def continue_chunks(self, held: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens behind those held of earlier passes.

        Args:
            held: (batch, up to 2 m - 1, ...): tokens of the open chunk, and before them those of the last complete
                one; None if there are none.
            tokens: (batch, new, ...).

        Returns:
            The chunks completed (batch, closed, m, ...) and what to hold from now on.
        """
        m = self.chunk_size
        rows = tokens if held is None else torch.cat([held, tokens], dim=1)
        start = rows.shape[1] - self.new - self.open
        chunks = rows[:, start : start + self.closed * m].unflatten(1, (self.closed, m))
        keep = (self.past + self.new) % m + m
        return chunks, rows[:, max(rows.shape[1] - keep, 0) :]

    def latest(self, chunks: Tensor, back: int = 0) -> Tensor:
        """Of (batch, chunks, ...), the last one each row has completed, or the one `back` before it."""
        return chunks[:, chunks.shape[1] - 1 - back]

    def group_start(self, skips_past: bool) -> int:
        """The first group that is laid out."""
        return max(self.first, 1) if skips_past else self.first
