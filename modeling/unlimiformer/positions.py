"""Where the keys of a decoder's memory lie in rotary position space."""

import torch
from torch import Tensor


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


def rotate(keys: Tensor, offsets: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Move rotary keys by `offsets` positions: R(a) R(b) k = R(a + b) k (Su et al. 2021, section 3.2).

    Only the angle changes: a family's scaling of rotary keys is in them already.

    Args:
        keys: (..., source, head_dim), first and second half of the rotated dimensions paired, as in Llama.
        offsets: (source,), any sign.
        inverse_frequencies: (rotated / 2,); dimensions past `rotated` stay.

    Returns:
        Like `keys`, computed in float32 or wider.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    half = inverse_frequencies.shape[-1]
    angles = offsets[:, None].to("cpu", torch.float64) * inverse_frequencies.to("cpu", torch.float64)
    cosine, sine = (table.to(keys.device, wide) for table in (angles.cos(), angles.sin()))
    first, second, rest = keys.to(wide).split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    moved = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return torch.cat(moved, dim=-1).to(keys.dtype)
