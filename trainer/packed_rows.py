"""Several short rows of a decoder in one long row, so that a batch holds text and not padding.

Each row keeps positions from 0, by which the model's mask tells the rows apart: no token sees another row's, and none
is learnt from another row's. So a packed batch has the loss and the gradients of its rows one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.tokenisation import IGNORED, Batch


def packed_together(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows share a row of `size` tokens: longest first, each where it leaves the least room (best fit).

    Numbers in a row are in order, and so are the rows by their first number.

    Raises:
        ValueError: a row is longer than `size`.
    """
    shared: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens, number in `shared`
    for row in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        if lengths[row] > size:
            raise ValueError(f"Row {row} has {lengths[row]} tokens, more than the {size} of a packed row.")
        place = bisect_left(room, (lengths[row], -1))
        free, number = room.pop(place) if place < len(room) else (size, len(shared))
        if number == len(shared):
            shared.append([])
        shared[number].append(row)
        insort(room, (free - lengths[row], number))
    return sorted(sorted(rows) for rows in shared)


def packed_rows(batch: Batch, size: int) -> Batch:
    """Rows of `size` tokens at most: input_ids, labels, position_ids, length, id (those of all in it), truncated."""
    lengths = [len(ids) for ids in batch["input_ids"]]
    packed: Batch = {name: [] for name in ("input_ids", "labels", "position_ids", "length", "id", "truncated")}
    for rows in packed_together(lengths, size):
        packed["input_ids"].append([token for row in rows for token in batch["input_ids"][row]])
        packed["labels"].append([label for row in rows for label in (IGNORED, *batch["labels"][row][1:])])
        packed["position_ids"].append([place for row in rows for place in range(lengths[row])])
        packed["length"].append(sum(lengths[row] for row in rows))
        packed["id"].append(" ".join(str(batch["id"][row]) for row in rows))
        packed["truncated"].append(any(batch["truncated"][row] for row in rows))
    return packed


@torch.no_grad()
def check_reads_packed_rows(model: nn.Module) -> None:
    """Refuse a model to which a second row in the same row looks like more of the first.

    Raises:
        ConfigurationError: its logits differ from those of the row alone.
    """
    parameter = next(model.parameters())
    if parameter.numel() == 0 or parameter.is_meta:  # sharded before it is asked
        return
    ids = torch.arange(16, device=parameter.device)[None] % 8
    positions = ids.clone()
    was_training = model.training
    model.eval()
    try:
        apart = _logits(model, ids[:, 8:], positions[:, 8:])
        packed = _logits(model, ids, positions)[:, 8:]
    except TypeError as error:
        raise ConfigurationError(f"`data.packing`: {type(model).__name__} takes no position ids: {error}.") from error
    finally:
        model.train(was_training)
    rounding = max(torch.finfo(dtype).eps for dtype in (parameter.dtype, torch.float32))
    if float((packed - apart).abs().max()) > 100 * rounding * float(apart.abs().max()):
        raise ConfigurationError(
            f"`data.packing`: {type(model).__name__} does not tell rows apart that share a row; leave it out."
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    read: Any = model(input_ids=ids, position_ids=positions, use_cache=False)
    logits: Tensor = read["logits"]
    return logits.float()
