"""Attention written out, a block of rows at a time: for what reads its weights, and for wide values."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import repeat_kv

from .pair_scores import grouped_scores, grouped_sum
from .summed_slices import SummedSlices
from .visible_rows import in_row_blocks, normalisation, visible_block


@dataclass(frozen=True)
class ScoredPairs:
    """What a layer's attention is the softmax of.

    Args:
        query: (batch, heads, target, head_dim).
        key: (batch, heads or a divisor of them, source, head_dim), each for as many heads as follow each other; its
            last `target` are the rows' own.
        scaling: of the scores.
        mask: as transformers makes it, see `visible_rows`.
        softcap: scores s become softcap tanh(s / softcap), as in Gemma 2.
    """

    query: Tensor
    key: Tensor
    scaling: float
    mask: Tensor | None
    softcap: float | None = None

    @property
    def key_of_heads(self) -> Tensor:
        """(batch, heads, source, head_dim)."""
        return repeat_kv(self.key, self.query.shape[1] // self.key.shape[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of rows and of keys."""
        return self.query.shape[2], self.key.shape[2]

    @property
    def bytes_of_row(self) -> int:
        """What the weights of one row take in all heads, in float32."""
        batch, heads = self.query.shape[:2]
        return 4 * batch * heads * self.sizes[1]


class AttentionRows:
    """The attention weights of `pairs`, a block of rows at a time."""

    def __init__(self, pairs: ScoredPairs) -> None:
        self.pairs, self.query, self.key = pairs, SummedSlices(pairs.query), SummedSlices(pairs.key)

    def weights(self, rows: range) -> tuple[Tensor, Tensor]:
        """Those of some rows (batch, heads, rows, seen), up to the last key seen; which are visible."""
        mask, softcap = self.pairs.mask, self.pairs.softcap
        visible = visible_block(mask, rows, self.pairs.sizes, self.pairs.query.device)
        query, key = self.query.take(rows.start, rows.stop), self.key.take(0, visible.shape[-1])
        scores = grouped_scores(query, key, self.pairs.scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return normalisation("softmax", mask)(scores, visible), visible

    def read(self, value: Tensor, dropout: float, block_bytes: int) -> Tensor:
        """softmax(scaling q k^T) v.

        Args:
            value: (batch, heads or a divisor of them, source, width), each for as many heads as follow each other.
            dropout: of the weights.
            block_bytes: if all weights take more, they are made again in the backward pass.

        Returns:
            (batch, heads, target, width).
        """
        values = SummedSlices(value)

        def compute(rows: range) -> Tensor:
            return read_by(self.weights(rows)[0], values, dropout)

        return in_row_blocks(compute, self.pairs.sizes[0], self.pairs.bytes_of_row, block_bytes)


def read_by(weights: Tensor, values: SummedSlices, dropout: float) -> Tensor:
    """What weights (batch, heads, rows, seen) read of the values of the first `seen` keys, some weights dropped."""
    value = values.take(0, weights.shape[-1])
    return grouped_sum(functional.dropout(weights, dropout, dropout > 0).to(value.dtype), value)
