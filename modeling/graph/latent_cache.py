"""Latents and the open group of each level in a generation's cache: finished latents never change."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..cache_layers import CacheLayerWrapper


class LevelState:
    """What one level keeps of earlier tokens.

    Attributes:
        latents: by name, (batch, heads, groups, width) of complete groups, by number. After a crop there may be more
            than are complete; those are never read, and written again.
        open: (batch, last tokens, width): of up to t - 1 tokens, their keys and values side by side.
    """

    def __init__(self) -> None:
        self.latents: dict[str, Tensor] = {}
        self.open: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply an operation on the batch."""
        self.latents = {name: function(held) for name, held in self.latents.items()}
        self.open = None if self.open is None else function(self.open)


class LatentCacheLayer(CacheLayerWrapper):
    """The layer of the tokens' own states, with the state of each level beside it."""

    def __init__(self, inner: Any, count: int) -> None:
        super().__init__(inner)
        self.levels = [LevelState() for _ in range(count)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for level in self.levels:
            level.map(function)

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        gone = before - self.get_seq_length()  # what the argument means differs between versions; the outcome does not
        for level in self.levels:
            if level.open is not None:
                level.open = level.open[:, : max(0, level.open.shape[1] - gone)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda held: held[indices.to(held.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda held: held.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        super().reset()
        self.levels = [LevelState() for _ in self.levels]

    def offload(self) -> None:
        super().offload()
        self._map(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.inner.is_initialized:
            self._map(lambda held: held.to(self.inner.device))


def latent_cache_layer(cache: Cache, index: int, count: int) -> LatentCacheLayer:
    """The latents' layer of `cache` for decoder layer `index`; the layer found is wrapped when first asked for.

    Args:
        count: levels.

    Raises:
        RuntimeError: the cache holds tokens of which no latents are known.
        ValueError: the layer is not dynamic.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    while isinstance(layer, CacheLayerWrapper):
        if isinstance(layer, LatentCacheLayer):
            return layer
        layer = layer.inner
    if not isinstance(layer, DynamicLayer) or layer.is_sliding:
        raise ValueError(
            f"Latent attention needs a dynamic cache that keeps all tokens, got a {type(layer).__name__}."
        )
    if layer.get_seq_length():
        raise RuntimeError(
            f"The cache holds {layer.get_seq_length()} tokens of which this model knows no latents: give a fresh "
            "cache."
        )
    made = LatentCacheLayer(cache.layers[index], count)
    cache.layers[index] = made
    return made
