"""Retrieval's place in a generation: cache layers that hold the neighbours which the next tokens read.

Each decoder layer with cross-attention keeps the keys and values of the neighbours of the last complete chunk, and of
the one before it, so that `crop` can go back over one boundary. The first of these layers also keeps the hidden states
and ids of the open chunk and of the one before it: the encoder is conditioned on them when the chunk is complete.
What it costs is constant in the length of the text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..cache_layers import CacheLayerWrapper, innermost, wrap_innermost, wrappers_of
from .chunk_grid import ChunkGrid
from .neighbour_states import NeighbourStates, join_chunks
from .padded_chunk_grid import PaddedChunkGrid
from .partial_rotary import Rotary


class OpenChunk:
    """Where each row of a generation stands: shared by the retrieval layers of one cache.

    Attributes:
        chunk_size: m.
        past: tokens that the layers have seen, padding included.
        padding: (batch,) padding tokens at the beginning of each row, on the CPU; None if there are none.
        ids: (batch, up to 2 m - 1) last token ids.
        hidden: (batch, up to 2 m - 1, hidden_size) what conditions the encoder, for the same tokens.
        keeps_previous: whether the chunk before the last complete one is still known.
        crossed: whether the last `crop` went back over a boundary.
        row_table: rotary table of the m rows of a group, the same for all chunks.
        token_table: (positions, 2 rotary_dim) cos and sin of the positions so far, and of some to come.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.past = 0
        self.padding: Tensor | None = None
        self.ids: Tensor | None = None
        self.hidden: Tensor | None = None
        self.keeps_previous = False
        self.crossed = False
        self.row_table: Rotary | None = None
        self.token_table: Tensor | None = None

    def grid(self, new: int) -> ChunkGrid:
        """Where `new` tokens behind those seen lie among chunks."""
        if self.padding is None:
            return ChunkGrid(self.past, new, self.chunk_size)
        return PaddedChunkGrid(self.past, new, self.chunk_size, self.padding)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on the batch."""
        for name in ("padding", "ids", "hidden"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, function(held))

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens`; `crossed` then says whether that went back over a boundary.

        Raises:
            ValueError: more would be needed than is kept, or some rows go back over a boundary and others do not.
        """
        own = torch.tensor([self.past]) if self.padding is None else (self.past - self.padding).clamp(min=0)
        crossed = own // self.chunk_size - (own - tokens).clamp(min=0) // self.chunk_size
        if int(crossed.max()) > int(self.keeps_previous) or bool((crossed != crossed[0]).any()):
            alike = len(own) == 1 or bool((own % self.chunk_size == own[0] % self.chunk_size).all())
            most = int((own % self.chunk_size).min()) + (self.chunk_size if alike and self.keeps_previous else 0)
            raise ValueError(
                f"`crop` can take back at most {most} tokens here, got {tokens}: older chunks of {self.chunk_size} "
                "tokens are not kept."
            )
        self.past -= tokens
        self.crossed = bool(crossed[0])
        self.keeps_previous = self.keeps_previous and not self.crossed
        if self.ids is not None:
            self.ids = self.ids[:, : self.ids.shape[1] - tokens]
        if self.hidden is not None:
            self.hidden = self.hidden[:, : self.hidden.shape[1] - tokens]


class RetrievalCacheLayer(CacheLayerWrapper):
    """A cache layer that also holds the neighbours which tokens read in this decoder layer.

    Args:
        inner: the layer of the tokens' own keys and values.
        chunk: shared by the retrieval layers of one cache.
        is_first: whether this layer passes operations on the cache on to `chunk`.
    """

    def __init__(self, inner: Any, chunk: OpenChunk, is_first: bool) -> None:
        super().__init__(inner)
        self.chunk, self.is_first = chunk, is_first
        self.latest: NeighbourStates | None = None
        """Of each row's last complete chunk: (batch, key_value_heads, source, head_dim); None if not retrieved."""
        self.previous: NeighbourStates | None = None

    def complete(self, fresh: NeighbourStates | None, grid: ChunkGrid) -> None:
        """Take in the neighbours of the chunks that a pass completed; None if none were given for them."""
        if not grid.closed:
            return
        self.chunk.keeps_previous = True
        if fresh is None:
            self.previous, self.latest = self.latest, None
            return
        parts = [part.with_chunk_axis() for part in (self.previous, self.latest) if part is not None]
        chunks = join_chunks([*parts, fresh])
        self.latest = chunks.map(grid.latest)
        count = chunks.keys.shape[1]
        self.previous = chunks.map(lambda states: grid.latest(states, back=1)) if count > 1 else None

    def crop(self, tokens_to_remove: int) -> None:
        count = int(tokens_to_remove)
        tokens = -count if count <= 0 else int(self.get_seq_length()) - count  # positive: how many shall stay
        if self.is_first:
            self.chunk.crop(tokens)
        super().crop(tokens_to_remove)
        if self.chunk.crossed:
            self.latest, self.previous = self.previous, None

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on the batch to all that is held beside the inner layer."""
        self.latest = None if self.latest is None else self.latest.map(function)
        self.previous = None if self.previous is None else self.previous.map(function)
        if self.is_first:
            self.chunk.map(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda states: states[indices.to(states.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda states: states.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        super().reset()
        self.latest = self.previous = None
        if self.is_first:
            self.chunk.__init__(self.chunk.chunk_size)  # type: ignore[misc]


def retrieval_layers(cache: Cache, layers: Sequence[int], chunk_size: int) -> dict[int, RetrievalCacheLayer]:
    """The retrieval layers of `cache`, by decoder layer; a fresh cache gets them when they are first asked for.

    They lie inside of what other wings put around its layers: there they count local tokens, not the positions that a
    memory takes.

    Args:
        cache: a fresh one, or one that went through here before.
        layers: decoder layers with cross-attention, rising.
        chunk_size: m.

    Raises:
        ValueError: the cache holds tokens that no retrieval layer has seen.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= max(layers):
        cache.layers.append(cache.layer_class_to_replicate())
    found = {index: _retrieval_layer(cache.layers[index]) for index in layers}
    known = {index: layer for index, layer in found.items() if layer is not None}
    if len(known) == len(found):
        return known
    held = max(int(innermost(cache.layers[index]).get_seq_length()) for index in layers)
    if known or held:
        raise ValueError(f"The cache holds {held} tokens that were not read with retrieval: give a fresh cache.")
    chunk = OpenChunk(chunk_size)
    made = {}
    for index in layers:
        wrap = partial(RetrievalCacheLayer, chunk=chunk, is_first=index == layers[0])
        made[index] = wrap_innermost(cache.layers, index, wrap)
    return made


def _retrieval_layer(layer: Any) -> RetrievalCacheLayer | None:
    """The retrieval layer among the wrappers around a cache layer."""
    return next((wrapper for wrapper in wrappers_of(layer) if isinstance(wrapper, RetrievalCacheLayer)), None)
