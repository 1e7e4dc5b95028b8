"""Linear maps of the few rows of a decoding step on a CPU, which read their weights as fast as memory gives them.

torch multiplies one row by a weight with the matrix-vector product of its BLAS, and two to four by one that packs the
whole weight first. On an AMD processor those of MKL read it at a third to a sixth of memory's speed. A batched product
of blocks of its rows, which are views of it, does not. Measured on two cores with AVX-512, the weight not in the
caches, a head of 28,996 x 256: 1.2 ms and not 4.1 for one row, 1.3 and not 8.0 for two, 1.5 and not 6.2 for four.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attachment import Attachment

FEW = 4
"""Rows up to which each shape that was measured gained."""
LARGE = 2**16
"""Numbers of a weight from which on anything is gained; 256 x 256 takes as long either way."""
BLOCKS = (4, 5, 3, 2)
"""Of the weight's rows: the first of these that divides them. All are as fast; one block is the matrix-vector product
again."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `torch.nn.functional.linear`.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,).

    Returns:
        (..., outputs).
    """
    outputs, inputs = weight.shape
    rows = x.numel() // max(inputs, 1)
    if not (0 < rows <= FEW and outputs >= BLOCKS[0] and outputs * inputs >= LARGE and _are_plain(x, weight)):
        return functional.linear(x, weight, bias)
    blocks = next((count for count in BLOCKS if outputs % count == 0), BLOCKS[0])
    columns = x.reshape(rows, inputs).t().expand(blocks, inputs, rows)
    rest = outputs % blocks
    if rest == 0:
        product = torch.bmm(weight.view(blocks, outputs // blocks, inputs), columns).view(outputs, rows)
    else:
        cut = weight[:-rest].view(blocks, outputs // blocks, inputs)
        product = torch.cat([torch.bmm(cut, columns).view(-1, rows), weight[-rest:] @ columns[0]])
    product = product.t().contiguous().view(*x.shape[:-1], outputs)
    return product if bias is None else product + bias


def _are_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is on a CPU and not of half precision, and the weight a plain one whose rows follow each other.

    torchao and DTensor put sub-classes of Tensor in the place of a weight, which know `linear` and not always views.
    """
    return (
        x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """torch's Linear, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return linear(input, self.weight, self.bias)


def with_fast_linears(model: nn.Module) -> list[nn.Module]:
    """Make each plain `torch.nn.Linear` in `model` one of ours; gives those that were.

    They stay the same objects, with their weights, names and hooks, as torch's own parametrisation does it. Other
    sub-classes, such as quantised ones, keep their own way.
    """
    plain: list[nn.Module] = [module for module in model.modules() if type(module) is nn.Linear]
    for module in plain:
        module.__class__ = Linear
    return plain


def decode_faster(model: nn.Module) -> Attachment:
    """Let the linear maps of any model read their weights at memory's speed for few rows, until the handle is removed.

    On a CPU, in float32 or float64, for at most `FEW` rows and weights of at least `LARGE` numbers: a decoding step.
    Results then differ from the stock model's in their last places. Where a weight is read at memory's speed anyway,
    nothing is gained.

        with decode_faster(model):
            model.generate(ids, max_new_tokens=50)
    """
    attachment = Attachment()
    for module in with_fast_linears(model):
        attachment.on_removal(_make_plain, module)
    return attachment


def _make_plain(module: nn.Module) -> None:
    if type(module) is Linear:
        module.__class__ = nn.Linear  # type: ignore[assignment]
