"""Linear maps between rows and heads, and the feed-forward; fused where several read the same rows."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...configuration.configuration_retro import RetroConfig
from ..cpu_linear import Linear
from .few_numbers import GELU
from .partial_rotary import Rotary, rotate


class HeadSets(NamedTuple):
    """The heads that one product makes: queries and keys, which are rotated, and behind them values.

    Args:
        rotated: heads of each rotated set, e.g. (8, 2) for queries and keys.
        values: heads of the values, 0 if the product makes none.
        head_dim: of each head.
    """

    rotated: tuple[int, ...]
    values: int
    head_dim: int

    def split(self, projected: Tensor, table: Rotary) -> list[Tensor]:
        """(batch, rows, all heads head_dim) to one (batch, heads, rows, head_dim) per set, all rotated at once."""
        heads = projected.view(*projected.shape[:2], -1, self.head_dim)
        turned = heads[:, :, : sum(self.rotated)] if self.values else heads
        sets = list(rotate(turned, table).transpose(1, 2).split_with_sizes(self.rotated, 1))
        return [*sets, heads[:, :, -self.values :].transpose(1, 2)] if self.values else sets


class HeadProjection(Linear):
    """Rows to the heads of `sets` by one matrix product, without bias: (batch, rows, all heads head_dim)."""

    def __init__(self, width: int, sets: HeadSets) -> None:
        super().__init__(width, (sum(sets.rotated) + sets.values) * sets.head_dim, bias=False)
        self.sets = sets


class OutputProjection(Linear):
    """What a sublayer adds to the residual stream."""


class InnerProjection(Linear):
    """Into the inside of a feed-forward."""


def unchanged(rows: Tensor) -> Tensor:
    """The rows themselves."""
    return rows


def make_dropout(share: float) -> Callable[[Tensor], Tensor]:
    """Dropout of a `share` of the numbers; none is a function, since calls of modules cost a token time."""
    return nn.Dropout(share) if share else unchanged


def make_activation(name: str) -> nn.Module:
    """The activation of this name, as transformers knows it."""
    activation: nn.Module = GELU() if name == "gelu" else ACT2FN[name]
    return activation


class FeedForward(nn.Module):
    """act(x W_u) W_d, with biases (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: RetroConfig, width: int, inside: int, dropout: float) -> None:
        super().__init__()
        self.up = InnerProjection(width, inside)
        self.activation = make_activation(config.hidden_act)
        self.dropout = make_dropout(dropout)
        self.down = OutputProjection(inside, width)

    def forward(self, rows: Tensor) -> Tensor:
        """(batch, rows, width) to the same."""
        return self.down(self.dropout(self.activation(self.up(rows))))


class GatedFeedForward(nn.Module):
    """(act(x W_g) * x W_u) W_d, without biases (Shazeer 2020, arXiv 2002.05202); one matrix makes both halves."""

    def __init__(self, config: RetroConfig, width: int, inside: int, dropout: float) -> None:
        super().__init__()
        self.gate_and_up = InnerProjection(width, 2 * inside, bias=False)
        self.activation = make_activation(config.hidden_act)
        self.dropout = make_dropout(dropout)
        self.down = OutputProjection(inside, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(batch, rows, width) to the same."""
        gate, up = self.gate_and_up(rows).chunk(2, dim=-1)
        return self.down(self.dropout(self.activation(gate) * up))


def make_feed_forward(config: RetroConfig, of_encoder: bool) -> FeedForward | GatedFeedForward:
    """The feed-forward that `config.gated_mlp` chooses, of the decoder or the encoder."""
    kind = GatedFeedForward if config.gated_mlp else FeedForward
    if of_encoder:
        inside = int(config.encoder_intermediate_size or 0)
        return kind(config, config.encoder_width, inside, config.encoder_hidden_dropout)
    return kind(config, config.hidden_size, int(config.intermediate_size or 0), config.hidden_dropout)
