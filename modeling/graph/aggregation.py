"""What a token makes of its neighbours besides weighted sums: extremes and variance."""

from typing import NamedTuple

import torch
from torch import Tensor

from .visible_rows import read_range, visible_rows


class Aggregates(NamedTuple):
    """What a token read, each (batch, heads, target, head_dim); with weights that sum to 1, `total` is `mean`."""

    total: Tensor
    mean: Tensor
    largest: Tensor
    smallest: Tensor
    variance: Tensor


def range_maximum(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The largest value of each coordinate over keys first_i ... last_i, for every row i.

    Two overlapping ranges of 2^k keys cover any range, so log2(source) tables suffice: O(source log source) work
    instead of rows x source.

    Args:
        values: (batch, heads, source, width).
        first, last: (batch or 1, rows), within the keys, first <= last.

    Returns:
        (batch, heads, rows, width).
    """
    source = values.shape[2]
    length = (last - first + 1)[:, None, :, None]
    found = _take(values, first)
    table, width = values, 1
    while width < source:
        table = torch.maximum(table[:, :, :-width], table[:, :, width:])
        width *= 2
        ends = _take(table, first), _take(table, last - width + 1)
        found = torch.where(length >= width, torch.maximum(*ends), found)
        if width * 2 > source:
            break
    return found


def running_maximum(values: Tensor) -> Tensor:
    """As `range_maximum` where the keys are the rows, and each reads from key 0 to itself."""
    return values.cummax(dim=2).values


def row_maximum(values: Tensor, visible: Tensor) -> Tensor:
    """The largest value of each coordinate among the keys that one row reads, of all keys if it reads none.

    Args:
        values: (batch, heads, source, width).
        visible: (batch or 1, 1, 1, source).

    Returns:
        (batch, heads, 1, width).
    """
    read = (visible | ~visible.any(-1, keepdim=True)).transpose(-1, -2)
    return values.masked_fill(~read, torch.finfo(values.dtype).min).amax(2, keepdim=True)


def visible_maximum(values: Tensor, mask: Tensor | None, target: int) -> Tensor:
    """The largest value of each coordinate among the keys that a row may read.

    Args:
        values: (batch, heads, source, width).
        mask: as transformers makes it, see `visible_rows`. The keys that a row may read lie side by side: causal,
            padded on either end, packed documents, windows.
        target: number of rows.

    Returns:
        (batch, heads, target, width).
    """
    if mask is None and target > 1:
        return running_maximum(values[:, :, :target])  # behind them, a static cache has room
    if target == 1:
        return row_maximum(values, visible_rows(mask, range(1), (1, values.shape[2]), values.device))
    return range_maximum(values, *read_range(mask, (target, values.shape[2]), values.device))


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch or 1, rows) of (batch, heads, source, width); an index that does not exist takes another."""
    index = index.clamp(0, table.shape[2] - 1)[:, None, :, None]
    return table.gather(2, index.expand(table.shape[0], table.shape[1], -1, table.shape[3]))


def variance(second_moment: Tensor, mean: Tensor) -> Tensor:
    """max(0, E v^2 - (E v)^2), in float32 or wider and given back in the dtype of `mean`."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    return (second_moment.to(wide) - mean.to(wide).square()).relu().to(mean.dtype)
