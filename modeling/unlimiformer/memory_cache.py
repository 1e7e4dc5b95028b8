"""The memory's place in a generation: layers of its cache that hold what each layer of the model may read.

Batch rows of a generation are beams or questions; several may ask one document. The memory itself is stored once per
document and never copied: each row carries the number of its document.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..cache_layers import CacheLayerWrapper
from ..transformers_compat import ASSISTED_SINCE, ASSISTS_FROM_A_CACHE
from .layer_memory import LayerMemory
from .report import AttentionReport


class DocumentRows:
    """Which document each batch row of a generation asks.

    Args:
        documents: document of each row as the memory was given; generation may repeat each (beams, samples).
        count: number of documents stored.

    `is_padded` says whether positions of the memory or of the questions are padding.
    """

    def __init__(self, documents: Sequence[int], count: int) -> None:
        self.given = list(documents)
        self.count = count
        self.rows: list[int] | None = None
        self.is_padded = False
        self._slots: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.given if self.rows is None else self.rows)

    def expect(self, batch: int) -> list[int]:
        """The document of each of `batch` rows.

        Raises:
            ValueError: the batch is no multiple of the rows the memory was made for.
        """
        if self.rows is None:
            if batch % len(self.given):
                raise ValueError(
                    f"a batch of {batch} rows reads a memory made for {len(self.given)} rows: the batch must be a "
                    "multiple of it. `memory.select([...])` repeats a document for several questions."
                )
            self.rows = [document for document in self.given for _ in range(batch // len(self.given))]
        if batch != len(self.rows):
            raise ValueError(f"a batch of {batch} rows reads a memory whose generation has {len(self.rows)} rows.")
        return self.rows

    def take(self, indices: Sequence[int]) -> None:
        """Keep (or repeat, or reorder) the rows `indices`."""
        rows = self.given if self.rows is None else self.rows
        self.rows = [rows[i] for i in indices]
        self._slots = None

    def to_grid(self, rows: Tensor) -> Tensor:
        """Lay batch rows (batch, ...) out by document: (documents, repeats, ...), filled up with copies of row 0."""
        documents = self.expect(rows.shape[0])
        repeats = rows.shape[0] // self.count
        if documents == [document for document in range(self.count) for _ in range(repeats)]:
            return rows.view(self.count, repeats, *rows.shape[1:])
        to_grid, _ = self._slot_indices(documents)
        return rows[to_grid.to(rows.device)]

    def from_grid(self, grid: Tensor) -> Tensor:
        """Undo `to_grid`: (documents, repeats, ...) to (batch, ...)."""
        documents = self.expect(len(self))
        flat = grid.flatten(0, 1)
        if documents == [document for document in range(self.count) for _ in range(grid.shape[1])]:
            return flat
        _, from_grid = self._slot_indices(documents)
        return flat[from_grid.to(grid.device)]

    def _slot_indices(self, documents: list[int]) -> tuple[Tensor, Tensor]:
        if self._slots is None:
            rows_of = [[row for row, of in enumerate(documents) if of == document] for document in range(self.count)]
            width = max(map(len, rows_of))
            slots = [
                (document * width + place, row)
                for document, rows in enumerate(rows_of)
                for place, row in enumerate(rows)
            ]
            to_grid = torch.zeros(self.count * width, dtype=torch.long)
            from_grid = torch.zeros(len(documents), dtype=torch.long)
            for slot, row in slots:
                to_grid[slot], from_grid[row] = row, slot
            self._slots = to_grid.view(self.count, width), from_grid
        return self._slots


class MemoryCacheLayer(CacheLayerWrapper):
    """A cache layer behind a memory: it holds the local tokens, which lie `shift` positions further on.

    Args:
        inner: the layer of the local tokens.
        index: number of the layer in the model.
        rows: shared by the layers of one cache.
        memory: what this layer reads, None for local tokens only.
        shift: positions taken by the memory.
        record: told what was read.
    """

    def __init__(
        self,
        inner: Any,
        index: int,
        rows: DocumentRows,
        memory: LayerMemory | None,
        shift: int = 0,
        record: AttentionReport | None = None,
    ) -> None:
        super().__init__(inner)
        self.index, self.rows, self.memory, self.shift, self.record = index, rows, memory, shift, record
        self.is_offered = False

    def offer(self) -> None:
        """Called before each forward of the attention module that will read the memory."""
        self.is_offered = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in local tokens.

        Raises:
            RuntimeError: the model is not attached, so it would pass over the memory in silence.
        """
        self._check_offered()
        self.is_offered = False
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def keys(self) -> Tensor | None:
        """Of local tokens, or what stands for the memory where cross-attention takes its keys from the cache.

        Raises:
            RuntimeError: as of `update`, for what stands there is no key.
        """
        if isinstance(self.inner, PlaceholderLayer):
            self._check_offered()
            self.is_offered = False
        return self.inner.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.inner.keys = keys

    def _check_offered(self) -> None:
        if self.memory is not None and not self.is_offered:
            raise RuntimeError(
                "this cache holds a memory and the model cannot read it: call it inside `with unlimiform(model, ...)`."
            )

    def get_seq_length(self) -> int:
        return self.shift + self.inner.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = self.inner.get_mask_sizes(query_length)
        return length, offset + self.shift

    def activate_past_recording(self) -> None:
        """Called when assisted decoding starts: refuse where `generate` would lose the mask of the memory.

        Raises:
            RuntimeError: the question is padded, or this transformers cuts the mask to the question's length.
        """
        if self.shift and (self.rows.is_padded or not ASSISTS_FROM_A_CACHE):
            raise RuntimeError(
                "Assisted decoding from a decoder's memory needs a question without padding and transformers "
                f"{ASSISTED_SINCE} or newer (this is {transformers.__version__}): otherwise `generate` cuts the mask."
            )
        record = getattr(self.inner, "activate_past_recording", None)
        if record is not None:
            record()

    # The layers share their rows, so only the first one passes an operation on to them.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.index == 0:
            self.rows.take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.index == 0:
            self.rows.take([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.index == 0:
            chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.rows.take(chosen.tolist())

    def reset(self) -> None:
        super().reset()
        self.rows.rows, self.rows._slots = None, None


class PlaceholderLayer(DynamicLayer):
    """The inner layer of cross-attention, where the memory is all there is: one token of NaN that nothing changes.

    Attention modules take `keys` and `values` from the cache before they call the attention function. NaN makes a path
    around our attention function show at once.
    """

    def __init__(self, placeholder: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(placeholder, placeholder)
        self.keys = self.values = self.placeholder = placeholder

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.placeholder, self.placeholder

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass


def memory_layer(cache: Cache | None, index: int) -> tuple[MemoryCacheLayer | None, int]:
    """The memory layer of `cache` for layer `index` of the model, and the tokens decoded before and in this step."""
    if cache is None:
        return None, 0
    layers: Any = cache
    if isinstance(cache, EncoderDecoderCache):
        layers = cache.cross_attention_cache
    if index >= len(layers.layers):
        return None, 0
    layer = layers.layers[index]
    while not isinstance(layer, MemoryCacheLayer):
        if not isinstance(layer, CacheLayerWrapper):
            return None, 0
        layer = layer.inner
    return layer, cache.get_seq_length(index)
