"""Norms, and how a sublayer meets the residual stream: before it (pre-norm) or after it (DeepNorm)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...configuration.configuration_retro import RetroConfig
from .few_numbers import RMSNorm
from .projections import make_dropout

Sublayer = Callable[[Tensor], Tensor]
"""A `partial` around a module, not the module: hooks that move arguments to a device would move a module too."""


class GatedRMSNorm(nn.Module):
    """x / rms(x) * g * sigmoid(x * w), the rms being at least `eps` (Zhang et al. 2021, arXiv 2104.07012, eq. 11)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gate = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same; the rms is taken in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Clamped before the root, whose gradient at 0 is infinite: rectified attention often gives exact zeros.
        rms = wide.square().mean(-1, keepdim=True).clamp(min=self.eps**2).sqrt()
        return (wide / rms).to(x.dtype) * self.weight * torch.sigmoid(x * self.gate)


def make_norm(config: RetroConfig, width: int) -> nn.Module:
    """The norm that `config.norm` names, for rows of `width`."""
    if config.norm == "gated_rms":
        return GatedRMSNorm(width, config.norm_eps)
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=max(config.norm_eps, 1e-5))
    return RMSNorm(width, eps=config.norm_eps)


class PreNormResidual(nn.Module):
    """h + dropout(f(norm(h)))."""

    def __init__(self, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.dropout = make_dropout(dropout)

    def forward(self, h: Tensor, sublayer: Sublayer) -> Tensor:
        """(batch, rows, width); `sublayer` is called with the normed rows."""
        return h + self.dropout(sublayer(self.norm(h)))

    def without(self, h: Tensor) -> Tensor:
        """What a sublayer that adds exact zeros would give."""
        return h


class DeepNormResidual(nn.Module):
    """norm(a h + dropout(f(h))) (Wang et al. 2022, arXiv 2203.00555)."""

    def __init__(self, norm: nn.Module, dropout: float, scale: float) -> None:
        super().__init__()
        self.norm = norm
        self.dropout = make_dropout(dropout)
        self.scale = scale

    def forward(self, h: Tensor, sublayer: Sublayer) -> Tensor:
        """(batch, rows, width); `sublayer` is called with the rows."""
        return self.norm(self.scale * h + self.dropout(sublayer(h)))

    def without(self, h: Tensor) -> Tensor:
        """What a sublayer that adds exact zeros would give: the norm still acts."""
        return self.norm(self.scale * h)


def deepnorm_constants(config: RetroConfig, of_encoder: bool) -> tuple[float, float]:
    """Scale of the residual and gain of the initial weights, by the table for encoder-decoders of arXiv 2203.00555."""
    decoder, encoder = config.num_hidden_layers, config.num_encoder_layers
    if of_encoder:
        return 0.81 * (encoder**4 * decoder) ** (1 / 16), 0.87 * (encoder**4 * decoder) ** (-1 / 16)
    return (3 * decoder) ** 0.25, (12 * decoder) ** -0.25


def make_residual(config: RetroConfig, width: int, of_encoder: bool) -> PreNormResidual | DeepNormResidual:
    """The residual that `config.residual` names, for rows of `width` in the decoder or the encoder."""
    norm = make_norm(config, width)
    if config.residual == "deepnorm":
        return DeepNormResidual(norm, config.residual_dropout, deepnorm_constants(config, of_encoder)[0])
    return PreNormResidual(norm, config.residual_dropout)
