"""Rotary positions on the first dimensions of each head (Su et al. 2021, arXiv 2104.09864), halves paired."""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (batch or 1, rows, 1, rotary_dim); sin is negative in its first half, as `rotate` needs it."""


def rotary_table(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of the angles p theta^(-2i / rotary_dim), computed in float32 or wider and cast then.

    Args:
        positions: (batch or 1, rows) integers.

    Returns:
        cos and sin, each (batch or 1, rows, 1, rotary_dim).
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, -rotary_dim, -2, device=positions.device, dtype=wide) / rotary_dim
    frequencies = theta**exponents
    # cos(-a) = cos(a) and sin(-a) = -sin(a): the sign of the first half comes with the angle.
    angles = positions[..., None, None] * torch.cat([-frequencies, frequencies])
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Rotate the first dimensions of queries or keys.

    Args:
        x: (batch, rows, heads, head_dim).
        table: of the same rows; a batch of 1 serves all.
    """
    cos, sin = table
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], table), x[..., width:]], dim=-1)
    return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)
