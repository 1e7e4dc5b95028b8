"""One small MLP per head, all heads in two batched products."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .lean_gradients import normed_by


def grouped_linear(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """states_h weight_h + bias_h for each head h.

    Args:
        states: (batch, heads, source, in).
        weight: (heads, in, out).
        bias: (heads, 1, out).
    """
    return states @ weight + bias


class PerHeadMLP(nn.Module):
    """Linear, dropout, RMS norm, SiLU, linear; independent per head, with biases.

    Args:
        heads, width: of the states (batch, heads, source, width).
        inner: width between the two maps.
        dropout: behind the first map.
        eps: of the RMS norm.
    """

    def __init__(self, heads: int, width: int, inner: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.empty(heads, width, inner))
        self.up_bias = nn.Parameter(torch.zeros(heads, 1, inner))
        self.gain = nn.Parameter(torch.ones(heads, 1, inner))
        self.down_weight = nn.Parameter(torch.empty(heads, inner, width))
        self.down_bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.dropout, self.eps = dropout, eps
        for weight in (self.up_weight, self.down_weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        inner = grouped_linear(states, self.up_weight, self.up_bias)
        inner = functional.dropout(inner, self.dropout, self.training)
        normed = normed_by(inner, self.gain, self.eps)
        return grouped_linear(functional.silu(normed), self.down_weight, self.down_bias)
