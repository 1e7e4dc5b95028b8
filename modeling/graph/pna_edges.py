"""PNA attention on transformed edges: A weighs what is read, and decides what is read at all."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from ...configuration.configuration_gnn import GNNConfig, LlamaGNNConfig
from .aggregation import Aggregates, variance
from .edge_transforms import EdgeTransform
from .llama_heads import active_dropout
from .pair_scores import dot_scores
from .pna_attention import LlamaAttentionPNA, extremes
from .summed_slices import SummedSlices
from .visible_rows import in_row_blocks, normalisation, visible_block

_CUT_AT_THRESHOLD = ("relu", "silu", "binary", "silu+binary", "relu_below_binary_above", "silu_below_binary_above")
_ABOVE_ZERO = ("softplus", "sharp_softplus", "sigmoid", "flow", "softplus_below_binary_above")
_MANY_EDGES = 32  # a row; gathering more costs as much as reading all keys


def most_edges(options: GNNConfig, dropout: float) -> int | None:
    """How many weights above 0 a row can have at most; None if no number that does not grow with the input is known.

    Softmax weights sum to 1, or to 1 / (1 - dropout), so fewer than that by t of them lie above t.
    """
    edges = options.edges
    cuts = edges.transform in _CUT_AT_THRESHOLD and edges.threshold > 0 and not edges.trains_threshold
    if not cuts or options.normalisation != "softmax":
        return None
    return math.ceil(1 / ((1 - dropout) * edges.threshold))


def extremes_of_all(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each coordinate among the keys of weight above 0, and 0 where there are none.

    Args:
        weights: (batch, heads, rows, source).
        values: (batch, heads, source, width).

    Returns:
        Two of (batch, heads, rows, width). Holds batch x heads x rows x source x width numbers meanwhile.
    """
    return _extremes(weights > 0, values[:, :, None])


def extremes_of_few(weights: Tensor, values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As `extremes_of_all` where no row has more than `most` weights above 0: those only are gathered."""
    kept, ids = weights.detach().topk(min(most, weights.shape[-1]), dim=-1)
    index = ids.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
    return _extremes(kept > 0, values.gather(2, index).unflatten(2, ids.shape[2:]))


def _extremes(chosen: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, heads, rows, n) bool and (batch, heads, rows or 1, n, width) to two of (batch, heads, rows, width)."""
    some = chosen.any(-1)[..., None]
    chosen = chosen[..., None]
    largest = torch.where(chosen, candidates, -torch.inf).amax(-2)
    smallest = torch.where(chosen, candidates, torch.inf).amin(-2)
    return torch.where(some, largest, 0.0), torch.where(some, smallest, 0.0)


def longest_and_shortest(chosen: Tensor, values: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The whole vectors of largest and smallest norm among the chosen keys of each row; its own where there are none.

    Args:
        chosen: (batch, heads, rows, source), boolean.
        values: (batch, heads, source, width).
        own: place of each row's own key, (batch or 1, 1, rows).

    Returns:
        Two of (batch, heads, rows, width). Of equal norms the earlier wins.
    """
    norms = values.detach().norm(dim=-1)[:, :, None]
    some, own = chosen.any(-1), own.expand(chosen.shape[:3])
    found = []
    for ids in (
        torch.where(chosen, norms, -torch.inf).argmax(-1),
        torch.where(chosen, norms, torch.inf).argmin(-1),
    ):
        index = torch.where(some, ids, own)[..., None].expand(-1, -1, -1, values.shape[-1])
        found.append(values.gather(2, index))
    return found[0], found[1]


class LlamaAttentionPNAEdges(LlamaAttentionPNA):
    """y_h = W2 silu(W1 [s, m, max, var]), A' = T(A): s = A' v, deg = sum A', m = s / deg, var = A' v^2 / deg - m^2.

    A is the softmax of scores, or relu of them. max goes over keys of weight above 0, coordinate by coordinate; a row
    without any gets 0, and deg 0 counts as 1. Rows of A' are made in blocks. Transforms that can only be above 0 take
    the extremes of all visible keys; those that cut weights at a threshold gather the few that can be left.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.options = config.gnn_config
        self.edges = EdgeTransform(self.options.edges)
        self.normalisation = self.options.normalisation
        self.row_extremes, self.numbers_per_pair = self._choose_extremes()

    def _choose_extremes(self) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None, int]:
        """How a block's extremes are found, None for those of all visible keys; and what that holds for each pair."""
        if self.options.edges.transform in _ABOVE_ZERO:
            return None, 1
        most = most_edges(self.options, float(self.attention_dropout or 0))
        if most is None or most > _MANY_EDGES:
            return extremes_of_all, self.head_dim
        return partial(extremes_of_few, most=most), 1

    def aggregate(
        self, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Aggregates, Tensor | None]:
        query, key, value = states[0], *(repeat_kv(part, self.num_key_value_groups) for part in states[1:])
        batch, heads, target, width = query.shape
        slices = SummedSlices(query), SummedSlices(key), SummedSlices(value)
        compute = partial(self._rows, slices, (target, key.shape[2]), mask)
        row_bytes = 4 * batch * heads * key.shape[2] * self.numbers_per_pair
        joined = in_row_blocks(compute, target, row_bytes, self.options.block_bytes)
        read = Aggregates(*joined.split(width, dim=-1))
        if self.row_extremes is None:
            largest, smallest = (repeat_kv(e, self.num_key_value_groups) for e in extremes(states[2], mask, target))
            read = read._replace(largest=largest, smallest=smallest)
        return read, None

    def _rows(
        self,
        states: tuple[SummedSlices, SummedSlices, SummedSlices],
        sizes: tuple[int, int],
        mask: Tensor | None,
        rows: range,
    ) -> Tensor:
        """All aggregates of these rows, side by side."""
        query = states[0].take(rows.start, rows.stop)
        visible = visible_block(mask, rows, sizes, query.device)
        key, value = (part.take(0, visible.shape[-1]) for part in states[1:])
        weights = normalisation(self.normalisation, mask)(dot_scores(query, key, self.scaling), visible)
        dropout = active_dropout(self)
        weights = self.edges(functional.dropout(weights, dropout, dropout > 0), visible)
        degree = weights.sum(-1, keepdim=True)
        degree = torch.where(degree == 0, 1.0, degree).to(value.dtype)
        sums = weights.to(value.dtype) @ torch.cat([value, value.square()], dim=-1)
        total, _ = sums.chunk(2, dim=-1)
        mean, second = (sums / degree).chunk(2, dim=-1)
        largest, smallest = self._extremes(weights, value, visible, mean)
        return torch.cat(Aggregates(total, mean, largest, smallest, variance(second, mean)), dim=-1)

    def _extremes(self, weights: Tensor, value: Tensor, visible: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return (mean, mean) if self.row_extremes is None else self.row_extremes(weights, value)


class LlamaAttentionPNAVector(LlamaAttentionPNAEdges):
    """As LlamaAttentionPNAEdges, reading [mean, max, var, min] with whole vectors for max and min.

    They are the values of largest and smallest norm among the keys whose transformed weight lies above the threshold,
    and the token's own value where there is none. Buehler 2025, PNA_LM; the original takes token 0's there.
    """

    def _choose_extremes(self) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None, int]:
        return extremes_of_all, 1  # not used: whole vectors need no coordinates

    def _extremes(self, weights: Tensor, value: Tensor, visible: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        threshold = self.options.edges.threshold if self.edges.threshold is None else self.edges.threshold
        own = visible.shape[-1] - 1 - visible.flip(-1).to(torch.uint8).argmax(-1)
        return longest_and_shortest(visible & (weights > threshold), value, own)


def pna_class(options: GNNConfig) -> type[LlamaAttention]:
    """The PNA attention that these options name."""
    if options.attention == "pna_vector":
        return LlamaAttentionPNAVector
    is_fused = options.edges.transform == "none" and options.normalisation == "softmax"
    return LlamaAttentionPNA if is_fused else LlamaAttentionPNAEdges
