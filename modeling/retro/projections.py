"""Linear maps between rows and heads, and the feed-forward; fused where several read the same rows."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...configuration.configuration_retro import RetroConfig


class HeadProjection(nn.Linear):
    """Rows to several sets of heads by one matrix product, without bias.

    Args:
        width: of the rows.
        heads: how many heads each set has, e.g. (8, 2, 2) for queries, keys and values.
        head_dim: of each head.
    """

    def __init__(self, width: int, heads: tuple[int, ...], head_dim: int) -> None:
        super().__init__(width, sum(heads) * head_dim, bias=False)
        self.heads, self.head_dim = heads, head_dim

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(batch, rows, width) to one (batch, heads, rows, head_dim) per set."""
        projected = super().forward(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return projected.split(self.heads, dim=1)


class OutputProjection(nn.Linear):
    """What a sublayer adds to the residual stream."""


class InnerProjection(nn.Linear):
    """Into the inside of a feed-forward."""


class FeedForward(nn.Module):
    """act(x W_u) W_d, with biases (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, config: RetroConfig, width: int, inside: int, dropout: float) -> None:
        super().__init__()
        self.up = InnerProjection(width, inside)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(dropout)
        self.down = OutputProjection(inside, width)

    def forward(self, rows: Tensor) -> Tensor:
        """(batch, rows, width) to the same."""
        return self.down(self.dropout(self.activation(self.up(rows))))


class GatedFeedForward(nn.Module):
    """(act(x W_g) * x W_u) W_d, without biases (Shazeer 2020, arXiv 2002.05202); one matrix makes both halves."""

    def __init__(self, config: RetroConfig, width: int, inside: int, dropout: float) -> None:
        super().__init__()
        self.gate_and_up = InnerProjection(width, 2 * inside, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(dropout)
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
