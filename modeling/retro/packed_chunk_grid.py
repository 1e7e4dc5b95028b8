"""The chunk grid of rows that hold several documents: nobody reads the neighbours of another document."""

import torch
from torch import Tensor

from .chunk_grid import ChunkGrid


class PackedChunkGrid(ChunkGrid):
    """As ChunkGrid; the first m - 1 tokens of every document read nothing.

    Args:
        position_ids: (batch, new), starting again at 0 where a document begins, which is at a chunk boundary.
        chunk_size: m.

    Raises:
        ValueError: a document begins inside a chunk.
    """

    def __init__(self, position_ids: Tensor, chunk_size: int) -> None:
        super().__init__(0, position_ids.shape[1], chunk_size)
        columns = torch.arange(self.new, device=position_ids.device)
        if bool(((position_ids - columns) % chunk_size).any()):
            raise ValueError(
                f"`position_ids` start a document inside a chunk: packed documents begin at multiples of `chunk_size` "
                f"{chunk_size} (fill each up behind its end, with labels -100)."
            )
        self.reads = position_ids >= chunk_size - 1

    def ungroup(self, rows: Tensor, skips_past: bool) -> Tensor:
        return super().ungroup(rows, skips_past).masked_fill(~self.reads[..., None], 0)
