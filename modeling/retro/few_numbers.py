"""Norm, activation and attention of a decoding step on a CPU, where calls cost more than what they compute.

Each equals torch's own function and has its gradients. They take fewer or lighter calls for the few numbers of a
generated token, and torch's function otherwise: on a GPU it is one kernel, and of many numbers it is the faster one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW = 4096
"""Numbers up to which the calls are what costs: measured on two cores, gelu breaks even here and the norm later."""


def are_few(x: Tensor) -> bool:
    """Whether `x` holds few numbers, on a CPU, in a dtype that needs no wider sums."""
    return x.numel() <= FEW and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Args:
        x: (..., width).
        weight: (width,).
        eps: added to the mean square.
    """
    if not (are_few(x) and x.dtype == weight.dtype):
        return functional.rms_norm(x, weight.shape, weight, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(length.new_full((), eps), length, length, value=1 / x.shape[-1])
    return x * mean_square.rsqrt() * weight


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016, arXiv 1606.08415), exactly.

    torch's own sets up a oneDNN primitive in each call, which for one token takes longer than the product before it.
    """
    return x * torch.special.ndtr(x) if are_few(x) else functional.gelu(x)


def attend_from_one_row(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v for one query a head: there is no future to hide, so nothing remains to be prepared.

    Args:
        query: (batch, heads, 1, head_dim).
        key, value: (batch, heads, source, head_dim).
        mask: (batch or 1, 1, 1, source) bool, or scores to add; None shows all.

    Returns:
        (batch, 1, heads head_dim).
    """
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).flatten(2)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, by `rms_norm`."""

    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return rms_norm(x, self.weight, self.eps)


class GELU(nn.Module):
    """`gelu` as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return gelu(x)
