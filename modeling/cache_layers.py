"""A cache layer that wraps another: what the wings add to a generation's cache sits around the layer they find."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class CacheLayerWrapper(CacheLayerMixin):
    """Delegates everything to `inner`, the layer it found: dynamic, static, sliding or another wing's.

    A subclass adds its tensors and overrides what concerns them; keys and values stay where they were.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner  # a CacheLayerMixin; no super().__init__(): it would set keys and values of our own

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # absent while being unpickled or deep-copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def keys(self) -> Tensor | None:
        """(batch, key_value_heads, local, head_dim) of the wrapped layer."""
        return self.inner.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.inner.keys = keys

    @property
    def values(self) -> Tensor | None:
        """(batch, key_value_heads, local, head_dim) of the wrapped layer."""
        return self.inner.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.inner.values = values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the wrapped layer holds tensors."""
        return self.inner.is_initialized

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the wrapped layer has static addresses."""
        return self.inner.is_compileable

    @property
    def is_sliding(self) -> bool:
        """Whether the wrapped layer forgets all but a window."""
        return getattr(self.inner, "is_sliding", False)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` restores the wrapped layer."""
        return getattr(self.inner, "is_croppable", True)

    @property
    def supports_early_init(self) -> bool:  # type: ignore[override]
        """Whether the wrapped layer can be initialised before its first update."""
        return getattr(self.inner, "supports_early_init", True)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.inner.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.inner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        return self.inner.get_max_length()

    def get_max_cache_shape(self) -> int:
        return self.inner.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        self.inner.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.inner.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.inner.reorder_cache(beam_idx)

    def reset(self) -> None:
        self.inner.reset()

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()


Wrapper = TypeVar("Wrapper", bound=CacheLayerWrapper)


def wrappers_of(layer: Any) -> Iterator[CacheLayerWrapper]:
    """The wrappers around a cache layer, from the outermost."""
    while isinstance(layer, CacheLayerWrapper):
        yield layer
        layer = layer.inner


def innermost(layer: Any) -> Any:
    """The cache layer inside of all its wrappers: what counts local tokens only."""
    for wrapper in wrappers_of(layer):
        layer = wrapper.inner
    return layer


def wrap_innermost(layers: list[Any], index: int, wrap: Callable[[Any], Wrapper]) -> Wrapper:
    """Wrap the layer inside of what other wings put around `layers[index]`; return the new wrapper.

    There it counts local tokens, not the positions that a memory takes.
    """
    wrappers = list(wrappers_of(layers[index]))
    wrapper = wrap(innermost(layers[index]))
    if wrappers:
        wrappers[-1].inner = wrapper
    else:
        layers[index] = wrapper
    return wrapper
