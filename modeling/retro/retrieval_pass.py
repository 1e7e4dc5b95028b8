"""What one forward pass knows of retrieval: where its tokens lie among chunks, and the neighbours it was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...configuration.configuration_retro import RetroConfig
from .chunk_grid import ChunkGrid
from .packed_chunk_grid import PackedChunkGrid
from .partial_rotary import Rotary, rotary_table
from .retrieval_cache import OpenChunk, RetrievalCacheLayer

EncodeNeighbours = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""`encode(neighbours, visible, chunks)`: ids (batch, chunks, n, r), their visibility or None, hidden states of the
chunks (batch, chunks, m, width), to (batch, chunks, n, r, width)."""


class RetrievalPass:
    """Made once per forward pass, and read by every layer with cross-attention.

    Args:
        config: `chunk_size`, `rope`, `rotary_dim` and `rope_theta` are read.
        grid: where the new tokens lie among chunks.
        retrieved: (batch, chunks, neighbours, neighbour_length) ids for the chunks that this pass completes, or None.
        chunk: the generation's open chunk; None without a cache.
        skips_past: whether the tokens that read an earlier pass's neighbours have none.
    """

    def __init__(
        self,
        config: RetroConfig,
        grid: ChunkGrid,
        retrieved: Tensor | None,
        chunk: OpenChunk | None,
        skips_past: bool,
    ) -> None:
        self.config, self.grid, self.chunk, self.skips_past = config, grid, chunk, skips_past
        self.retrieved = retrieved if grid.closed else None
        self.visible = None if self.retrieved is None else visible_tokens(self.retrieved, config.pad_token_id)
        self.reads_nothing = skips_past and self.retrieved is None
        """Whether no token of this pass has neighbours."""
        self._row_table: Rotary | None = None
        self._key_table: Rotary | None = None

    def token_table(self, positions: Tensor, like: Tensor) -> Rotary:
        """Rotary table of the new tokens, in the dtype of `like`; on a CPU a generation looks them up in one it keeps.

        Args:
            positions: (batch or 1, new).
        """
        chunk = self.chunk
        if chunk is None or positions.device.type != "cpu":  # elsewhere the largest position would be waited for
            return self._table(positions, like)
        lowest, highest = (int(end) for end in positions.aminmax())
        if not 0 <= lowest <= highest < chunk.past:  # positions of the caller's own, perhaps far apart
            return self._table(positions, like)
        whole = chunk.token_table
        if whole is None or whole.shape[0] <= highest or whole.dtype != like.dtype:
            first = torch.arange(1 << highest.bit_length())[None]
            whole = chunk.token_table = torch.cat(self._table(first, like), dim=-1).flatten(0, 2)
        cos, sin = whole[positions][:, :, None].chunk(2, dim=-1)
        return cos, sin

    def row_table(self, like: Tensor) -> Rotary:
        """Rotary table of the rows that read, in the dtype and on the device of `like`; a generation keeps it."""
        if self._row_table is None:
            whole = None if self.chunk is None else self.chunk.row_table
            if whole is None or whole[0].dtype != like.dtype or whole[0].device != like.device:
                positions = query_positions(self.config.chunk_size, self.config.rope, like.device)[None]
                whole = self._table(positions, like)
                if self.chunk is not None:
                    self.chunk.row_table = whole
            cos, sin = (self.grid.rows_of(part, self.skips_past) for part in whole)
            self._row_table = cos, sin
        return self._row_table

    def key_table(self, like: Tensor) -> Rotary:
        """Rotary table of the tokens of a chunk's neighbours, all of which begin at position 0."""
        if self._key_table is None:
            assert self.retrieved is not None
            neighbours, length = self.retrieved.shape[2:]
            positions = torch.arange(length, device=like.device).repeat(neighbours)[None]
            self._key_table = self._table(positions, like)
        return self._key_table

    def _table(self, positions: Tensor, like: Tensor) -> Rotary:
        return rotary_table(positions, self.config.rotary_width, self.config.rope_theta, like.dtype)

    def encode(self, hidden: Tensor, encode: EncodeNeighbours) -> Tensor | None:
        """Encode the neighbours of completed chunks, conditioned on these; hold the tokens of the open one.

        Called once, by the first layer with cross-attention.

        Args:
            hidden: (batch, new, hidden_size) residual stream behind that layer's self-attention.

        Returns:
            (batch, chunks, neighbours, neighbour_length, hidden_size); None if no chunk is completed with neighbours.
        """
        if self.chunk is None and self.retrieved is None:
            return None
        chunks, held = self.grid.continue_chunks(None if self.chunk is None else self.chunk.hidden, hidden)
        if self.chunk is not None:
            self.chunk.hidden = held
        return None if self.retrieved is None else self._encode_present(chunks, encode)

    def _encode_present(self, chunks: Tensor, encode: EncodeNeighbours) -> Tensor:
        """Encode the neighbours of all chunks but those that have none, which get zeros that nothing will see."""
        assert self.retrieved is not None
        if self.visible is None:
            return encode(self.retrieved, None, chunks)
        present = self.visible.flatten(2).any(-1)  # (batch, chunks)
        if present.all():
            return encode(self.retrieved, self.visible, chunks)
        if not present.any():
            present[0, 0] = True  # so that every weight has a gradient in every process
        some = (tensor[present][None] for tensor in (self.retrieved, self.visible, chunks))
        encoded = encode(*some)
        everywhere = encoded.new_zeros(*self.retrieved.shape, encoded.shape[-1])
        return everywhere.index_put((present,), encoded[0])


def query_positions(chunk_size: int, rope: str, device: torch.device) -> Tensor:
    """(m,): where row i of a group stands before its neighbours, m - 1 + i.

    RETRO-pytorch ("legacy") shifted its table twice, which left 2 m - 2 for row 0 and 0 for all others.
    """
    rows = torch.arange(chunk_size, device=device)
    if rope == "legacy":
        return (rows == 0) * (2 * chunk_size - 2)
    return rows + chunk_size - 1


def visible_tokens(ids: Tensor, pad_token_id: int) -> Tensor | None:
    """True where `ids` are no padding; None if there is no padding at all."""
    visible = ids != pad_token_id
    return None if bool(visible.all()) else visible


def begin_pass(
    config: RetroConfig,
    input_ids: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    retrieved: Tensor | None,
    layers: Mapping[int, RetrievalCacheLayer] | None,
) -> RetrievalPass:
    """Look at what a forward pass is given, and advance the generation's open chunk.

    Args:
        input_ids: (batch, new).
        masks: attention mask and position ids as the model was given them.
        retrieved: see RetrievalPass.
        layers: retrieval layers of the cache, None without one.

    Raises:
        TypeError, ValueError: `retrieved` does not fit the chunks that this pass completes.
    """
    attention_mask, position_ids = masks
    new = input_ids.shape[1]
    if layers is None:
        chunk, skips_past = None, True
        grid = grid_without_cache(config.chunk_size, input_ids, masks)
    else:
        first = next(iter(layers.values()))
        chunk, skips_past = first.chunk, first.latest is None
        if new > 1 or chunk.past == 0:
            chunk.padding = leading_padding(attention_mask, position_ids, chunk.past + new)
        grid = chunk.grid(new)
    check_retrieved(retrieved, input_ids.shape[0], grid.closed, config)
    if retrieved is None and grid.closed and not skips_past:
        raise ValueError(
            f"`retrieved` is missing: this pass completes {grid.closed} chunks of `chunk_size` {config.chunk_size} "
            "and those before it had neighbours. Give padding for chunks without any."
        )
    if chunk is not None:
        _, chunk.ids = grid.continue_chunks(chunk.ids, input_ids)
        chunk.past += new
    return RetrievalPass(config, grid, retrieved, chunk, skips_past)


def is_packed(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether a forward pass without a cache is given rows of several documents: positions that start again."""
    return attention_mask is None and position_ids is not None and bool((position_ids[:, 1:] == 0).any())


def leading_padding(attention_mask: Tensor | None, position_ids: Tensor | None, length: int) -> Tensor | None:
    """(batch,) padding tokens at the beginning of each row, on the CPU; None if there are none.

    Args:
        attention_mask: (batch, length), or prepared with four axes, when only the positions tell.
        position_ids: (batch, new), each row's own positions.
        length: tokens up to the end of this pass.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = (attention_mask.cumsum(1) == 0).sum(1)
    elif attention_mask is not None and position_ids is not None:
        padding = length - 1 - position_ids[:, -1]
    else:
        return None
    padding = padding.cpu()
    return padding if bool(padding.any()) else None


def check_retrieved(retrieved: Tensor | None, batch: int, closed: int, config: RetroConfig) -> None:
    """Raise unless `retrieved` holds ids for the chunks that a pass completes."""
    if retrieved is None:
        return
    if retrieved.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`retrieved` must hold token ids (int64), got {retrieved.dtype}.")
    length = config.longest_neighbour
    wanted = f"(batch, chunks, neighbours, length) = ({batch}, {closed}, ..., at most `neighbour_length` {length})"
    if retrieved.dim() != 4 or retrieved.shape[0] != batch:
        raise ValueError(f"`retrieved` must be {wanted}, got {tuple(retrieved.shape)}.")
    if retrieved.shape[1] != closed:
        raise ValueError(
            f"`retrieved` has {retrieved.shape[1]} chunks, the sequence has {closed} complete chunks of "
            f"`chunk_size` {config.chunk_size} tokens."
        )
    if retrieved.shape[2] < 1 or not 1 <= retrieved.shape[3] <= length:
        raise ValueError(f"`retrieved` must be {wanted}, got {tuple(retrieved.shape)}.")


def grid_without_cache(chunk_size: int, input_ids: Tensor, masks: tuple[Tensor | None, Tensor | None]) -> ChunkGrid:
    """Where the tokens of a pass without a cache lie among chunks: in one document a row, padded, or packed."""
    attention_mask, position_ids = masks
    new = input_ids.shape[1]
    if position_ids is not None and is_packed(attention_mask, position_ids):
        return PackedChunkGrid(position_ids.expand(input_ids.shape[0], -1), chunk_size)
    chunk = OpenChunk(chunk_size)
    chunk.padding = leading_padding(attention_mask, position_ids, new)
    return chunk.grid(new)
