"""Rotary positions on the first dimensions of each head (Su et al. 2021, arXiv 2104.09864), halves paired."""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (batch or 1, rows, rotary_dim)."""


def rotary_table(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of the angles p theta^(-2i / rotary_dim), computed in float32 or wider and cast then.

    Args:
        positions: (batch or 1, rows) integers.

    Returns:
        cos and sin, each (batch or 1, rows, rotary_dim).
    """
    wide = torch.promote_types(dtype, torch.float32)
    pair = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=wide)
    angles = positions[..., None] * theta ** (-pair / rotary_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Rotate the first dimensions of queries or keys.

    Args:
        x: (batch, heads, rows, head_dim).
        table: of the same rows; a batch of 1 serves all.
    """
    cos, sin = (part.unsqueeze(1) for part in table)
    width = cos.shape[-1]
    turned = x[..., :width]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
