"""Where the keys of a decoder's memory lie in rotary position space."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pairing = Literal["halves", "neighbours"]
"""Which dimensions one rotary angle turns: i and i + r/2, or 2i and 2i + 1."""


class Rotation(NamedTuple):
    """How a layer turns its keys: frequencies (rotated / 2,), and the pairing of dimensions."""

    frequencies: Tensor
    pairing: Pairing = "halves"


def memory_positions(length: int, window: int, rule: str, device: torch.device | None = None) -> tuple[Tensor, int]:
    """Position of each remembered token, and how many positions the memory takes in front of the local tokens.

    Args:
        length: tokens of the document.
        window: tokens of a window.
        rule: "squeeze" maps token p of a long document to floor(p window / length), "true" to p, "origin" to 0.

    Returns:
        (length,) int64, and the number of positions taken: min(length, window), or length under "true".
    """
    taken = length if rule == "true" else min(length, window)
    absolute = torch.arange(length, device=device)
    if rule == "origin":
        return torch.zeros_like(absolute), taken
    if rule == "squeeze" and length > window:
        return absolute * window // length, taken
    return absolute, taken


def rotate(keys: Tensor, offsets: Tensor, rotation: Rotation | None) -> Tensor:
    """Move rotary keys by `offsets` positions: R(a) R(b) k = R(a + b) k (Su et al. 2021, section 3.2).

    Only the angle changes: a family's scaling of rotary keys is in them already.

    Args:
        keys: (..., source, head_dim); the first `rotated` dimensions turn, in the pairs of `rotation`.
        offsets: (source,), any sign.
        rotation: of the layer; None leaves keys as they are.

    Returns:
        Like `keys`, computed in float32 or wider.
    """
    if rotation is None or not bool(offsets.any()):
        return keys
    wide = torch.promote_types(keys.dtype, torch.float32)
    half = rotation.frequencies.shape[-1]
    angles = offsets[:, None].to("cpu", torch.float64) * rotation.frequencies.to("cpu", torch.float64)
    cosine, sine = (table.to(keys.device, wide) for table in (angles.cos(), angles.sin()))
    turned, rest = keys.to(wide).split([2 * half, keys.shape[-1] - 2 * half], dim=-1)
    pairs = turned.unflatten(-1, (2, half) if rotation.pairing == "halves" else (half, 2))
    axis = -2 if rotation.pairing == "halves" else -1
    first, second = pairs.unbind(axis)
    moved = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=axis)
    return torch.cat([moved.flatten(-2), rest], dim=-1).to(keys.dtype)
