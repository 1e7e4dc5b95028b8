"""Softmax attention with dropout that stores no weights, for the CPU.

The fused kernels of torch know no dropout on a CPU: scaled_dot_product_attention falls back to a product that keeps
the weights, their dropped copy and the mask of every layer for the backward pass, and draws that mask number by
number. Here the weights exist for one block of rows at a time, and the backward pass makes them again from queries,
keys and one seed:

    P = softmax(scaling q k^T),  D = P o M / (1 - p),  o = D v
    dv = D^T do,  dP = (do v^T) o M / (1 - p),  dS = P o (dP - rowsum(do o o))
    dq = scaling dS k,  dk = scaling dS^T q

where rowsum(dP o P) = rowsum(do o o), as in Dao et al. 2022, "FlashAttention", arXiv 2205.14135, appendix B.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Scores that exist at once: in float32, and with their mask, about what the second-level cache of a core holds.
BLOCK_SCORES = 1 << 18
_LEVELS = 1 << 16  # a weight is kept or dropped by one random number of 16 bits


class _Block(NamedTuple):
    """Which groups of heads (of batch x key-value heads) and which targets are computed together."""

    groups: slice
    targets: slice
    seen: int  # keys before this one; none after it is visible to these targets


def _blocks(groups: int, repeats: int, target: int, source: int, is_causal: bool, budget: int) -> Iterator[_Block]:
    rows = max(1, min(target, budget // (repeats * source)))
    together = max(1, budget // (repeats * rows * source)) if rows == target else 1
    for first in range(0, groups, together):
        for start in range(0, target, rows):
            stop = min(start + rows, target)
            seen = source - target + stop if is_causal else source
            yield _Block(slice(first, min(first + together, groups)), slice(start, stop), seen)


def _kept(shape: torch.Size, dropout: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Which weights stay, and by what they are multiplied.

    Four weights are decided by one draw of 64 bits: a tenth of the time that a Bernoulli variable each would take. The
    rate is rounded to 1 / 65536, and the factor is the inverse of the rounded rate.
    """
    threshold = round(dropout * _LEVELS)
    count = shape.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    levels = bits.view(torch.int16)[:count].view(shape)
    return levels >= threshold - _LEVELS // 2, _LEVELS / (_LEVELS - threshold)


class _Scores:
    """The weights of any block, the same whenever they are asked for."""

    def __init__(self, query: Tensor, key: Tensor, visible: Tensor | None, options: "_Options") -> None:
        self.query, self.key, self.visible, self.options = query, key, visible, options
        groups, self.repeats, self.target, _ = query.shape
        self.blocks = list(
            _blocks(groups, self.repeats, self.target, key.shape[1], options.is_causal, options.block_scores)
        )

    def rows(self, states: Tensor, block: _Block) -> Tensor:
        """(groups, repeats, target, width) to the block's (groups, repeats targets, width)."""
        return states[block.groups, :, block.targets].flatten(1, 2)

    def weights(self, block: _Block, number: int) -> tuple[Tensor, Tensor, float]:
        """softmax(scaling q k^T) of a block (groups, repeats targets, seen), what is kept of it, and the factor."""
        rows, keys = self.rows(self.query, block), self.key[block.groups, : block.seen]
        scores = (rows * self.options.scaling) @ keys.transpose(-1, -2)
        by_target = scores.unflatten(1, (self.repeats, -1))
        hidden = torch.finfo(scores.dtype).min
        if self.visible is not None:
            mask = self._mask(block)
            by_target = by_target.masked_fill_(~mask, hidden) if mask.dtype == torch.bool else by_target.add_(mask)
        if self.options.is_causal:
            offset = self.key.shape[1] - self.target + block.targets.start
            future = torch.ones(by_target.shape[2:], dtype=torch.bool).triu_(offset + 1)
            by_target.masked_fill_(future, hidden)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        generator = torch.Generator().manual_seed(self.options.seed + number)
        return (weights, *_kept(weights.shape, self.options.dropout, generator))

    def _mask(self, block: _Block) -> Tensor:
        """The block's part of the mask, (groups or 1, 1, targets or 1, seen)."""
        assert self.visible is not None
        mask = self.visible[..., : block.seen]
        mask = mask if mask.shape[2] == 1 else mask[:, :, block.targets]
        if mask.shape[0] == 1:
            return mask
        per_row = self.query.shape[0] // mask.shape[0]
        return mask[torch.arange(block.groups.start, block.groups.stop) // per_row]


class _Options(NamedTuple):
    scaling: float
    dropout: float
    is_causal: bool
    seed: int
    block_scores: int


class _DroppedAttention(torch.autograd.Function):
    """Queries (groups, repeats, target, head_dim), keys and values (groups, source, head_dim)."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, options: _Options
    ) -> Tensor:
        scores = _Scores(query, key, visible, options)
        output = torch.empty((*query.shape[:3], value.shape[-1]), dtype=value.dtype)
        for number, block in enumerate(scores.blocks):
            weights, kept, factor = scores.weights(block, number)
            read = weights.mul_(kept).to(value.dtype) @ value[block.groups, : block.seen]
            output[block.groups, :, block.targets] = read.mul_(factor).unflatten(1, (scores.repeats, -1))
        context.save_for_backward(query, key, value, visible, output)
        context.options = options
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: Tensor) -> Any:
        query, key, value, visible, output = context.saved_tensors
        scores = _Scores(query, key, visible, context.options)
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = key.new_zeros(key.shape, dtype=wide), value.new_zeros(value.shape, dtype=wide)
        scaling = context.options.scaling
        for number, block in enumerate(scores.blocks):
            seen = (block.groups, slice(block.seen))
            weights, kept, factor = scores.weights(block, number)
            rows = scores.rows(upstream, block)
            balance = (rows * scores.rows(output, block)).sum(-1, keepdim=True, dtype=wide)
            grad_weights = (rows @ value[seen].transpose(-1, -2)).to(wide).mul_(kept).mul_(factor)
            grad_scores = grad_weights.sub_(balance).mul_(weights).mul_(scaling).to(query.dtype)
            dropped = weights.mul_(kept).to(rows.dtype)
            grad_value[seen] += (dropped.transpose(-1, -2) @ rows).mul_(factor)
            grad_query[block.groups, :, block.targets] = (grad_scores @ key[seen]).unflatten(1, (scores.repeats, -1))
            grad_key[seen] += grad_scores.transpose(-1, -2) @ scores.rows(query, block)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def dropped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    block_scores: int = BLOCK_SCORES,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Drop each softmax weight with probability `dropout`, multiply the rest by 1 / (1 - dropout), read the values.

    Arguments and results are those of transformers' attention functions. As many scores as `block_scores` exist at
    once. The seed comes from torch's generator, so `torch.manual_seed` and a checkpointed recomputation repeat it.

    Args:
        query: (batch, heads, target, head_dim).
        key, value: (batch, key_value_heads, source, head_dim), on the CPU.
        attention_mask: (batch or 1, 1, target or 1, source) bool, true where a target sees, or added to the scores;
            its gradient is not computed.
        is_causal: without a mask, the last target is at the last source.

    Returns:
        (batch, target, heads, head_dim), and None for the weights.
    """
    batch, heads, target, _ = query.shape
    seed = int(torch.randint(2**62, ()))
    causal = is_causal and attention_mask is None and target > 1
    options = _Options(scaling, dropout, causal, seed, block_scores)
    grouped = query.reshape(key.shape[0] * key.shape[1], -1, target, query.shape[-1])
    read = _DroppedAttention.apply(grouped, key.flatten(0, 1), value.flatten(0, 1), attention_mask, options)
    return read.view(batch, heads, target, -1).transpose(1, 2).contiguous(), None
