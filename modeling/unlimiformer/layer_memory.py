"""What one layer reads of a memory, and how its keys are searched: all of them, or those that an index offers."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from .indexed_attention import indexed_attention
from .key_index import KeyIndex
from .knn_attention import KeyChoice, Observer, knn_attention


@dataclass(frozen=True)
class LayerMemory:
    """Keys and values whose keys are all searched.

    Args:
        keys, values: (documents, key_value_heads, source, head_dim), or (documents, 1, source, hidden_size) twice the
            same tensor if `is_hidden`, to be projected by the layer's own weights.
        visible: (documents, source), False at padding and excluded keys; None if all may be seen.
        choice: how many keys a query keeps.
        heads: heads that read the memory, None for all.
        is_hidden: whether hidden states are stored instead of keys and values.
        window: keys, values and visibility of the first window, for heads and steps that read only that.
        window_first: whether the first decoded token reads the window.
        is_window: whether this is itself a first window, which no report counts as memory.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    choice: KeyChoice
    heads: tuple[int, ...] | None = None
    is_hidden: bool = False
    window: "LayerMemory | None" = None
    window_first: bool = False
    is_window: bool = False

    def attend(
        self, query: Tensor, visible: Tensor | None, dropout: float, observe: Observer | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to the best keys of each query; arguments and result as of `knn_attention`."""
        return knn_attention(query, self.keys, self.values, self.choice, visible, dropout, observe)


@dataclass(frozen=True)
class IndexedLayerMemory(LayerMemory):
    """Keys and values of which an index offers some to each query; these are scored exactly.

    Args:
        index: over `keys`.
        candidates: keys it offers to each query.
    """

    index: KeyIndex = field(kw_only=True)
    candidates: int = field(kw_only=True)

    def attend(
        self, query: Tensor, visible: Tensor | None, dropout: float, observe: Observer | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to the best keys that the index finds; arguments and result as of `knn_attention`."""
        offered = self.index.search, self.candidates
        return indexed_attention(query, self.keys, self.values, self.choice, offered, visible, dropout, observe)


def with_softcap(memory: LayerMemory, softcap: float | None) -> LayerMemory:
    """The same memory, its scores capped as the attention that reads it caps them."""
    return memory if softcap is None else replace(memory, choice=replace(memory.choice, softcap=softcap))
