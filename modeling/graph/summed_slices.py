"""Slices of a tensor whose gradients are added in one place: many that overlap cost no more than what they hold."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SummedSlices:
    """Slices of `tensor` along its last axis but one.

    They are plain slices, but for their gradients: autograd would fill a tensor as large as the whole for each of
    them, which for the blocks of rows of an attention is more work than the scores. Here each is added in place to
    its part of one sum, which becomes the gradient of `tensor` when all have come.

    Args:
        tensor: (..., length, width).
    """

    def __init__(self, tensor: Tensor) -> None:
        needs_gradient = torch.is_grad_enabled() and tensor.requires_grad and not torch.compiler.is_compiling()
        self._sum = _Sum() if needs_gradient else None
        self._whole: Tensor = tensor if self._sum is None else _Whole.apply(tensor, self._sum)

    def take(self, start: int, stop: int) -> Tensor:
        """Places `start` to `stop` - 1, (..., stop - start, width)."""
        if self._sum is None:
            return self._whole[..., start:stop, :]
        part: Tensor = _Slice.apply(self._whole, start, stop, self._sum)
        return part


class _Sum:
    """The gradients that have come in one backward pass."""

    def __init__(self) -> None:
        self.total: Tensor | None = None


class _Whole(torch.autograd.Function):
    """The tensor that slices are taken of; autograd comes here when all of them have been."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, summed: _Sum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.summed = summed
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        total, ctx.summed.total = ctx.summed.total, None
        return total, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, start: int, stop: int, summed: _Sum) -> Tensor:
        ctx.shape, ctx.place, ctx.summed = whole.shape, slice(start, stop), summed
        return whole[..., start:stop, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        if ctx.summed.total is None:
            ctx.summed.total = gradient.new_zeros(ctx.shape)
        ctx.summed.total[..., ctx.place, :] += gradient
        return None, None, None, None
