"""Which key each row may read, whatever form the attention mask has; and work done on a block of rows at a time."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Computed = TypeVar("Computed")

_ROWS = 64  # of a block: few enough to stay in a processor's cache, and to skip most of the upper half of the square


def visible_rows(mask: Tensor | None, rows: range, sizes: tuple[int, int], device: torch.device) -> Tensor:
    """Which keys the rows `rows` may read.

    Args:
        mask: as transformers makes it: (batch, 1, target, source), boolean or added to scores, or None. None is what
            fused attention takes it for: a single row reads all keys, of several row i reads keys 0 to i. It is
            given where there are as many keys as rows, or keys behind them that are still empty (a static cache).
        rows: of the target.
        sizes: target, source.

    Returns:
        (batch or 1, 1, rows, source), boolean.

    Raises:
        ValueError: the mask has another form.
    """
    if mask is None:
        visible = torch.ones(1, 1, len(rows), sizes[1], dtype=torch.bool, device=device)
        return visible if sizes[0] == 1 else visible.tril(rows.start)
    if mask.dim() != 4:
        raise ValueError(
            f"The attention mask must have 4 dimensions, got {tuple(mask.shape)}: graph layers run with the "
            'attention implementations "sdpa" and "eager".'
        )
    part = mask[:, :, rows.start : rows.stop, : sizes[1]]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


def read_range(mask: Tensor | None, sizes: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last key that each row may read, each (batch or 1, target). A row that reads nothing gets all keys."""
    target, source = sizes
    if mask is None:
        last = (
            torch.arange(target, device=device)[None] if target > 1 else torch.full((1, 1), source - 1, device=device)
        )
        return torch.zeros_like(last), last
    visible = visible_rows(mask, range(target), sizes, device)[:, 0].to(torch.uint8)
    return visible.argmax(-1), source - 1 - visible.flip(-1).argmax(-1)


def in_row_blocks(compute: Callable[[range], Tensor], target: int, row_bytes: int, block_bytes: int) -> Tensor:
    """The blocks of `row_blocks`, each (..., rows, width), joined."""
    blocks = row_blocks(compute, target, row_bytes, block_bytes)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def row_blocks(compute: Callable[[range], Computed], target: int, row_bytes: int, block_bytes: int) -> list[Computed]:
    """`compute` of all rows, a block at a time. If all rows need more than one block may take, blocks are not kept.

    They are computed again in the backward pass then. Rows that fit are cut too: early ones need few keys, and small
    blocks stay in a processor's cache.

    Args:
        compute: from a range of rows to a tensor or several.
        target: number of rows.
        row_bytes: what one row takes while it is computed.
        block_bytes: what a block may take; at least one row is taken.
    """
    size = max(1, min(block_bytes // row_bytes, _ROWS))
    if size >= target:
        return [compute(range(target))]
    blocks = [range(start, min(start + size, target)) for start in range(0, target, size)]
    # The last rows, which see most, come first: memory that they needed is there for all others.
    if torch.is_grad_enabled() and target * row_bytes > block_bytes:
        return [checkpoint(compute, rows, use_reentrant=False) for rows in reversed(blocks)][::-1]
    return [compute(rows) for rows in reversed(blocks)][::-1]


def visible_block(mask: Tensor | None, rows: range, sizes: tuple[int, int], device: torch.device) -> Tensor:
    """As `visible_rows`, without the keys at the end that no row of the block reads where there is no mask."""
    seen = rows.stop if mask is None and sizes[0] > 1 else sizes[1]
    return visible_rows(mask, rows, (sizes[0], seen), device)


def visible_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax of fresh scores over the visible keys, in float32 or wider; a row that may read nothing is all 0."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    # A row that reads nothing gets equal scores; its weights are then taken away row by row, not pair by pair.
    weights = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * visible.any(-1, keepdim=True)


def triangle_softmax(scores: Tensor) -> Tensor:
    """`visible_softmax` of fresh scores of a `visible_block` without a mask, in about half the time.

    The last key is the last row's own, so no row reads nothing, and only pairs of the last keys, as many as there are
    rows, can be hidden.
    """
    rows = scores.shape[-2]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if rows == 1:
        return scores.softmax(-1)
    later = scores.new_full((rows, rows), -torch.inf).triu(1)
    with torch.no_grad():  # the score behind a weight of 0 has gradient 0: autograd need not follow
        scores[..., scores.shape[-1] - rows :] += later
    return scores.softmax(-1)


def visible_relu(scores: Tensor, visible: Tensor) -> Tensor:
    """The scores above 0 of visible keys, in float32 or wider; 0 elsewhere."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return torch.where(visible, scores.relu(), 0.0)


Normalise = Callable[[Tensor, Tensor], Tensor]
"""From fresh scores (batch, heads, rows, seen) and which are visible to weights, 0 where not."""


def normalisation(name: str, mask: Tensor | None) -> Normalise:
    """That of the blocks of a mask: "softmax", or "relu" of the scores; without a mask hidden pairs need no search."""
    if name == "relu":
        return visible_relu
    return visible_softmax if mask is not None else lambda scores, visible: triangle_softmax(scores)
