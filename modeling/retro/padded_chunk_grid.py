"""The chunk grid of a left-padded batch: each row counts its own tokens, and completes chunks at its own steps."""

import torch
from torch import Tensor

from .chunk_grid import ChunkGrid


class PaddedChunkGrid(ChunkGrid):
    """As ChunkGrid, for rows that begin with different numbers of padding tokens.

    Args:
        past, new, chunk_size: as in ChunkGrid; `past` and `new` count padding.
        padding: (batch,) padding tokens at the beginning of each row, on the CPU; it may exceed `past`.
    """

    def __init__(self, past: int, new: int, chunk_size: int, padding: Tensor) -> None:
        super().__init__(past, new, chunk_size)
        m = chunk_size
        self.own_past = (past - padding).clamp(min=0)
        self.own_end = (past + new - padding).clamp(min=0)
        self.open_of_row = self.own_past % m
        self.closed_of_row = self.own_end // m - self.own_past // m
        self.closed = int(self.closed_of_row.max())
        self.first = 0
        positions = torch.arange(past, past + new) - padding[:, None]  # (batch, new), negative at padding
        self.reads = positions >= m - 1
        begin = (self.own_past - self.open_of_row)[:, None]  # of each row's open chunk
        self.slots = (positions + 1 - begin).clamp(min=0)  # (batch, new) rows, counted from the first of group 0
        self.leading = (padding - past).clamp(min=0, max=new)  # padding among the new tokens

    def group(self, tokens: Tensor, skips_past: bool) -> Tensor:
        """(batch, new, ...) to (batch groups, rows, ...); a single new token is a group of its own."""
        if self.new == 1:
            return tokens
        m, start = self.chunk_size, self.group_start(skips_past)
        slots = torch.arange(start * m, (self.closed + 1) * m)
        source = slots - 1 - self.open_of_row[:, None] + self.leading[:, None]
        return _take(tokens, source.clamp(0, self.new - 1)).reshape(-1, m, *tokens.shape[2:])

    def ungroup(self, rows: Tensor, skips_past: bool) -> Tensor:
        """Undo `group`: (batch groups, rows, width) to (batch, new, width), exact 0 for tokens that read nothing."""
        if self.new == 1:
            reads = self.reads if not skips_past else self.reads & (self.closed_of_row > 0)[:, None]
            return rows.masked_fill(~reads.to(rows.device)[..., None], 0)
        flat = rows.reshape(len(self.reads), -1, rows.shape[-1])
        slots = self.slots - self.group_start(skips_past) * self.chunk_size
        absent = (slots < 0) | ~self.reads
        return _take(flat, slots.clamp(min=0)).masked_fill(absent.to(flat.device)[..., None], 0)

    def rows_of(self, chunk: Tensor, skips_past: bool) -> Tensor:
        """As in ChunkGrid; a single new token of each row of the batch is at a row of its own."""
        return chunk[0, (self.slots % self.chunk_size).to(chunk.device)] if self.new == 1 else chunk

    def completes(self) -> Tensor:
        """(batch, chunks) bool: which of the chunks that this pass completes each row really has."""
        return torch.arange(self.closed) < self.closed_of_row[:, None]

    def continue_chunks(self, held: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As ChunkGrid; what is held ends with each row's latest token, so short rows begin with anything."""
        m = self.chunk_size
        if held is None:
            held = tokens[:, :0]
        rows = torch.cat([held, tokens], dim=1)
        ends = rows.shape[1] - self.new + self.leading - self.open_of_row  # where each row's open chunk begins
        source = ends[:, None] + torch.arange(self.closed * m)
        chunks = _take(rows, source.clamp(0, rows.shape[1] - 1)).unflatten(1, (self.closed, m))
        return chunks, rows[:, max(rows.shape[1] - 2 * m + 1, 0) :]

    def latest(self, chunks: Tensor, back: int = 0) -> Tensor:
        """Of (batch, chunks, ...), the last one each row has completed, or the one `back` before it."""
        unused = self.closed - self.closed_of_row
        place = chunks.shape[1] - 1 - back - unused
        return chunks[torch.arange(len(place), device=chunks.device), place.to(chunks.device)]

    def group_start(self, skips_past: bool) -> int:
        return 1 if skips_past else 0


def _take(tokens: Tensor, source: Tensor) -> Tensor:
    """Row b of the result holds `tokens[b, source[b]]`."""
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[batch, source.to(tokens.device)]
