"""Maps, norms and slopes that are independent for each group, such as a head or a tower, all groups in one product."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..cpu_linear import Linear
from .per_head_mlp import grouped_linear


class GroupedLinear(nn.Module):
    """states_g W_g + b_g for each group g; states (batch, *groups, source, in)."""

    def __init__(self, groups: tuple[int, ...], inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*groups, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(*groups, 1, outputs)) if bias else None
        self.initialise(inputs**-0.5)

    def initialise(self, std: float) -> None:
        """Normal weights, no bias."""
        init.normal_(self.weight, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.weight if self.bias is None else grouped_linear(states, self.weight, self.bias)


class GroupedLayerNorm(nn.Module):
    """Layer norm with a gain and a shift of each group."""

    def __init__(self, groups: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(*groups, 1, width))
        self.shift = nn.Parameter(torch.zeros(*groups, 1, width))

    def initialise(self, std: float) -> None:
        """The identity behind the norm."""
        init.ones_(self.gain)
        init.zeros_(self.shift)

    def forward(self, states: Tensor) -> Tensor:
        return functional.layer_norm(states, states.shape[-1:]) * self.gain + self.shift


class GroupedPReLU(nn.Module):
    """x where it is above 0, s x below, with a trainable slope s of each group that begins at 0.25."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((*groups, 1, 1) if groups else (1,), 0.25))

    def initialise(self, std: float) -> None:
        """The slope that PReLU begins with."""
        init.constant_(self.slope, 0.25)

    def forward(self, states: Tensor) -> Tensor:
        return functional.prelu(states, self.slope.flatten().to(states.dtype))


def make_linear(groups: tuple[int, ...], inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A linear map, one for each group; without groups torch's, made fast for few rows."""
    return GroupedLinear(groups, inputs, outputs, bias) if groups else Linear(inputs, outputs, bias=bias)


def make_layer_norm(groups: tuple[int, ...], width: int) -> nn.Module:
    """A layer norm, of each group; without groups a stock one."""
    return GroupedLayerNorm(groups, width) if groups else nn.LayerNorm(width)


def make_activation(name: str, groups: tuple[int, ...]) -> nn.Module:
    """The activation of that name; "prelu" has weights of its own."""
    if name == "prelu":
        return GroupedPReLU(groups)
    activation: nn.Module = ACT2FN[name]
    return activation
