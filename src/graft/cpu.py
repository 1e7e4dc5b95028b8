"""What torch multiplies fast on which CPU: who made it, and oneDNN's linear map beside the BLAS of torch.

A kernel is fast on one maker's processors and slow on another's that have the same instructions.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

PROCESSORS = "/proc/cpuinfo"


def _avx512_maker() -> str | None:
    """Who made a processor with AVX-512, "AMD" or "Intel" (also where that cannot be read); None without AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        with open(PROCESSORS, encoding="utf-8", errors="replace") as lines:
            return "AMD" if any("AuthenticAMD" in line for line in islice(lines, 30)) else "Intel"
    except OSError:
        return "Intel"


AVX512_MAKER = _avx512_maker()

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
HAS_ONEDNN = _linear is not None


class _Linear(torch.autograd.Function):
    """The map with its gradients, which the BLAS computes as fast; what no gradient needs is not kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _map(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = None if weight is None else gradient @ weight
        to_weight = None if x is None else rows.t() @ x.reshape(-1, x.shape[-1])
        return to_x, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _linear(x, weight, bias, "none", [], "")
    return product


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, where `HAS_ONEDNN`. Gradients flow backwards, of any order; it has no forward-mode derivative.

    Args:
        x: (..., inputs), float32, on a CPU.
        weight: (outputs, inputs), likewise.
        bias: (outputs,), likewise.

    Returns:
        (..., outputs).
    """
    learns = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not learns:
        return _map(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight, bias)
    return product
