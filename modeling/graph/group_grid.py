"""Where the tokens of a pass lie among groups of t tokens, counted from each row's first real token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .visible_rows import visible_rows


def padding_in_front(mask: Tensor | None, target: int, source: int) -> Sequence[int] | Tensor:
    """Padding tokens in front of each row of the batch, from the first key that its last query may read.

    Args:
        mask: as transformers makes it, see `visible_rows`.

    Returns:
        One number per row of the batch, or [0] if there is no padding. While torch.compile traces they stay on the
        device: a graph cannot branch on them.
    """
    if mask is None:
        return [0]
    last = visible_rows(mask, range(target - 1, target), (target, source), mask.device)[:, 0, 0]
    hidden = last.to(torch.uint8).argmax(-1)
    if torch.compiler.is_compiling():
        return hidden
    found: list[int] = hidden.tolist()
    return found if any(found) else [0]


class GroupGrid:
    """Real tokens 0 ... t - 1 of a row are group 0, and so on. Group c is complete once its last token is there.

    Args:
        size: t.
        past: tokens before this pass, padding included.
        new: tokens of this pass.
        padding: tokens in front that do not count, by row of the batch; [0] stands for all rows. A tensor is not read
            on the host: there are as many groups as any row could have, of which some rows leave the last unread.
        device: of the tensors that are made.

    Attributes:
        known: complete groups before this pass, in the row that has most.
        fresh: groups that this pass completes, in the row that completes most.
        touched: groups in which new tokens lie, in the row that has most.
        open: tokens before this pass that lie in the first of these groups, in the row that has most.
        first: (batch or 1, 1), the first group in which new tokens lie.
    """

    def __init__(self, size: int, past: int, new: int, padding: Sequence[int] | Tensor, device: torch.device) -> None:
        self.size, self.past, self.new, self.device = size, past, new, device
        if isinstance(padding, Tensor):
            self.starts, self.is_even, self.padding = [], False, padding[:, None]
            self.first = (past - self.padding).clamp(min=0) // size
            self.known, self.open = past // size, min(past, size - 1)
            self.fresh, self.touched = (self.open + new) // size, 1 + (self.open + new - 1) // size
            return
        self.starts = [past - hidden for hidden in padding]
        self.is_even = len(set(self.starts)) == 1
        first = [max(start, 0) // size for start in self.starts]
        self.padding, self.first = self._column(padding), self._column(first)
        self.known = max(first)
        ends = [(max(start + new, 0), group) for start, group in zip(self.starts, first, strict=True)]
        self.fresh = max(end // size - group for end, group in ends)
        self.touched = 1 + max(max(end - 1, 0) // size - group for end, group in ends)
        self.open = max(max(start, 0) % size for start in self.starts)

    def _column(self, numbers: Sequence[int]) -> Tensor:
        if self.is_even:
            return torch.full((1, 1), numbers[0], device=self.device)
        return torch.tensor(numbers, device=self.device)[:, None]

    def places(self) -> Tensor:
        """(batch or 1, new): each new token's place among its row's real tokens; padding counts as the first."""
        return (self.past + torch.arange(self.new, device=self.device) - self.padding).clamp(min=0)

    def fresh_groups(self) -> Tensor:
        """(batch or 1, fresh): numbers of the groups that are completed; rows that complete fewer get later ones."""
        return self.first + torch.arange(self.fresh, device=self.device)

    def fresh_tokens(self, states: Tensor) -> Tensor:
        """The tokens of the groups that are completed: (batch, source, width) to (batch, fresh, size, width)."""
        rows = self._take(states, self.padding + self.first * self.size, self.fresh * self.size)
        return rows.unflatten(1, (self.fresh, self.size))

    def touched_tokens(self, states: Tensor) -> Tensor:
        """All places of the groups in which new tokens lie.

        Args:
            states: (batch, source, width) of tokens up to the last new one.

        Returns:
            (batch, touched, size, width); places of tokens that are not there hold anything.
        """
        begin = self.padding + self.first * self.size - (self.past + self.new - states.shape[1])
        return self._take(states, begin, self.touched * self.size).unflatten(1, (self.touched, self.size))

    def new_tokens(self, grid: Tensor) -> Tensor:
        """From (batch, touched * size, width) those that are new: (batch, new, width)."""
        if self.is_even and self.starts[0] >= 0:
            begin = self.starts[0] % self.size
            return grid[:, begin : begin + self.new]
        return _gather(grid, self.places() - self.first * self.size)

    def place(self, held: Tensor | None, fresh: Tensor) -> Tensor:
        """What is known of groups, by number: `held` (batch, heads, known, width), then that of `fresh_groups`."""
        if held is None or not self.known:
            return fresh
        if self.is_even:
            return torch.cat([held[:, :, : self.known], fresh], dim=2)
        length = self.known + self.fresh
        held = pad(held[:, :, :length], (0, 0, 0, max(0, length - held.shape[2])))
        index = self.fresh_groups()[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        return held.scatter(2, index, fresh)

    def _take(self, states: Tensor, begin: Tensor, count: int) -> Tensor:
        """(batch, count, width): `count` rows from `begin` (batch or 1, 1) on; any for those that are not there."""
        if self.is_even:
            start = max(self.starts[0], 0) // self.size * self.size + self.past - self.starts[0]
            start -= self.past + self.new - states.shape[1]
            rows = states[:, max(start, 0) : max(start + count, 0)]
            front = min(max(-start, 0), count)
            return rows if rows.shape[1] == count else pad(rows, (0, 0, front, count - front - rows.shape[1]))
        return _gather(states, (begin + torch.arange(count, device=self.device)).clamp(max=states.shape[1] - 1))


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch or 1, rows) of (batch, source, width)."""
    index = index.clamp(min=0).expand(states.shape[0], -1)[..., None]
    return states.gather(1, index.expand(-1, -1, states.shape[-1]))
