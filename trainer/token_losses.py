"""Losses of target tokens and rows of generated ones, padded with -100, for means and position buckets."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # in labels: not scored; in a matrix of losses: no token there (a loss is never negative)


def token_losses(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """Negative log-likelihood in nats of each labelled token, the labelled ones of a row moved to its start.

    Args:
        logits: (batch, kept, vocabulary); they belong to the last `kept` positions of the row.
        labels: (batch, length), -100 where nothing is scored; length is `kept` or more.
        shifted: logits at a position predict the label of the next one (decoder-only models).

    Returns:
        (batch, most labelled tokens of a row) in float32, -100 behind the end of a row.

    Raises:
        ValueError: a labelled token has no logits.
    """
    kept = logits.shape[1] - 1 if shifted else logits.shape[1]
    targets = labels[:, labels.shape[1] - kept :] if kept else labels[:, :0]
    unscored = int((labels != IGNORED).sum() - (targets != IGNORED).sum())
    if unscored > int((labels[:, 0] != IGNORED).sum() if shifted else 0):  # nothing predicts a row's first token
        raise ValueError(
            f"The model gave logits for the last {kept} positions; {unscored} labelled tokens lie before."
        )
    losses = logits.new_full(targets.shape, IGNORED, dtype=torch.float32)
    for row, target in enumerate(targets):  # by row, so that float32 logits of one row exist at a time
        losses[row] = torch.nn.functional.cross_entropy(
            logits[row, :kept].float(), target, ignore_index=IGNORED, reduction="none"
        ).where(target != IGNORED, IGNORED)
    return to_the_left(losses)


def to_the_left(losses: Tensor) -> Tensor:
    """Move the entries other than -100 of each row to its start, in order, and cut columns that are empty then."""
    present = losses != IGNORED
    order = (~present).long().argsort(dim=1, stable=True)
    most = int(present.sum(dim=1).max()) if losses.numel() else 0
    return losses.gather(1, order)[:, : max(most, 1)]


def scored_tail(labels: Tensor) -> int:
    """How many last positions a causal model needs logits for, so that every label has one (at least 1)."""
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
    return labels.shape[1] - int(columns[0]) if len(columns) else 1


def bucket_means(losses: Tensor, size: int) -> dict[str, float]:
    """Token-weighted mean loss of the first `size` target positions, the next `size` and so on.

    Keys are `loss_0_127`, `loss_128_255`, ... for a size of 128; the last one ends with the longest target.
    """
    means = {}
    for start in range(0, losses.shape[1], size):
        part = losses[:, start : start + size]
        present = part != IGNORED
        if present.any():
            means[f"loss_{start}_{start + part.shape[1] - 1}"] = float(part[present].double().mean())
    return means


def in_rows(pieces: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """(rows, longest) from pieces (which rows, their values), -100 behind the end of a row."""
    longest = max(values.shape[1] for _, values in pieces)
    whole = pieces[0][1].new_full((rows, longest), IGNORED)
    for chosen, values in pieces:
        whole[chosen, : values.shape[1]] = values
    return whole


def until_end(sequences: Tensor, end: int | list[int] | None) -> Tensor:
    """Replace what follows the first end token of each row by -100."""
    if end is None:
        return sequences
    ends = torch.isin(sequences, torch.as_tensor(end, device=sequences.device)).long()
    return sequences.masked_fill(ends.cumsum(dim=1) - ends > 0, IGNORED)
