"""Linear maps on a CPU, as fast as it reads and multiplies: few rows in blocks of the weight, more by oneDNN.

Few rows are a decoding step. torch multiplies one by a weight with the matrix-vector product of its BLAS, and two to
four by one that packs the whole weight first. On an AMD processor those of MKL read it at a third to a sixth of
memory's speed. A batched product of blocks of its rows, which are views of it, does not. Measured on two cores with
AVX-512, the weight not in the caches, a head of 28,996 x 256: 1.2 ms and not 4.1 for one row, 1.3 and not 8.0 for two,
1.5 and not 6.2 for four.

More rows are multiplied by oneDNN there, 1.1 to 3 times as fast as by MKL where tens of rows (beams, batches) meet a
weight, most where it is wide, 1.1 to 1.5 times where a thousand do (documents): `benchmarks/cpu_linear.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cpu import AVX512_MAKER, HAS_ONEDNN, onednn_linear
from .attachment import Attachment

FEW = 4
"""Rows up to which each shape that was measured gained from blocks."""
LARGE = 2**16
"""Numbers of a weight from which on blocks gain anything; 256 x 256 takes as long either way."""
BLOCKS = (4, 5, 3, 2)
"""Of the weight's rows: the first of these that divides them. All are as fast; one block is the matrix-vector product
again."""
SHORT = 3072
"""Numbers of a few rows up to which blocks are as fast as oneDNN: one row of 3,072, four of 768."""
LARGE_FOR_ONEDNN = 2**18
"""Numbers of a weight from which on oneDNN gains; 256 x 256 and few rows take it 1.5 times as long."""
ONEDNN_IS_FASTER = HAS_ONEDNN and AVX512_MAKER == "AMD"
"""Where it was measured. Intel's own BLAS runs at the rate of its processors."""


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
    rows, numbers = x.numel() // max(inputs, 1), outputs * inputs
    if rows == 0 or numbers < LARGE or not _are_plain(x, weight):
        return functional.linear(x, weight, bias)
    if (rows > FEW or x.numel() > SHORT) and numbers >= LARGE_FOR_ONEDNN and _suits_onednn(x):
        return onednn_linear(x, weight, bias)
    if rows <= FEW and outputs >= BLOCKS[0]:
        return _in_blocks(x, weight, bias)
    return functional.linear(x, weight, bias)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of a few rows by a batched product of blocks of the weight's rows."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
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


def _suits_onednn(x: Tensor) -> bool:
    """Whether oneDNN is the faster here; code that is compiled chooses its kernels itself."""
    return ONEDNN_IS_FASTER and x.dtype is torch.float32 and not torch.compiler.is_compiling()


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
    On AMD processors with AVX-512 more rows are multiplied faster too, in float32: beams, batches, reading, training.
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
