"""The norm and the rotation of Llama with backward passes of few steps: the same numbers forward, bit for bit.

Autograd's own backward passes of them read and write tensors as large as the states about three times as often, which
for a thousand tokens is a sixth of a training step on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

_DTYPES = (torch.float32, torch.float64)  # narrower ones are widened on the way, which the stock forms do


def rms_normed(states: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain x / sqrt(mean x^2 + eps), the mean over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        states: x, (..., width) in float32 or wider, the dtype of `gain`.
        gain: (width,), or (groups, 1, width) for states (batch, groups, source, width).
    """
    made: Tensor = _RMSNormed.apply(states, gain, eps)
    return made


def normed_by(states: Tensor, gain: Tensor, eps: float) -> Tensor:
    """As `rms_normed`, of states in any dtype; the norm itself runs in float32 or wider."""
    if _may_be_lean(states, gain):
        return rms_normed(states, gain, eps)
    wide = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype) * gain


class LeanRMSNorm(LlamaRMSNorm):
    """LlamaRMSNorm, whose backward pass keeps no normed states and takes few steps."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., width) to the same. In float64 too the stock form computes in float32, so it stays."""
        if hidden_states.dtype == torch.float32 and _may_be_lean(hidden_states, self.weight):
            return rms_normed(hidden_states, self.weight, self.variance_epsilon)
        stock: Tensor = super().forward(hidden_states)
        return stock


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) as Llama's.

    Args:
        query, key: (batch, heads or key_value_heads, target, head_dim).
        cosine, sine: (batch or 1, target, head_dim).
    """
    if not (_may_be_lean(query, cosine) and _may_be_lean(key, sine)) or cosine.requires_grad or sine.requires_grad:
        return apply_rotary_pos_emb(query, key, cosine, sine)
    table = cosine.unsqueeze(1), sine.unsqueeze(1)
    return _Rotated.apply(query, *table), _Rotated.apply(key, *table)


def _may_be_lean(states: Tensor, other: Tensor) -> bool:
    """Whether a gradient is wanted of operands that need no cast, and no compiler will join the steps anyway."""
    is_plain = states.dtype in _DTYPES and other.dtype == states.dtype
    return is_plain and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RMSNormed(torch.autograd.Function):
    """With r = 1 / sqrt(mean x^2 + eps), s = sum_k g_k w_k x_k: dx = r w g - r^3 s x / width, dw = sum r x g."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(states, gain, inverse)
        return (states * inverse).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, gain, inverse = ctx.saved_tensors
        own = gain if gain.dim() > 1 else gain.unsqueeze(0)
        product, of_states, of_gain = gradient * states, None, None
        if ctx.needs_input_grad[0]:
            along = (product @ own.mT).mul_(inverse.pow(3)).div_(-states.shape[-1])
            of_states = (gradient * gain).mul_(inverse).addcmul_(states, along)
        if ctx.needs_input_grad[1]:
            of_gain = (inverse.mT @ product).sum_to_size(own.shape).view_as(gain)
        return of_states, of_gain, None


class _Rotated(torch.autograd.Function):
    """[x1; x2] to [x1 c1 - x2 s1; x2 c2 + x1 s2]; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        half = states.shape[-1] // 2
        made = states * cosine
        # No addcmul_: it may round once where the stock form rounds twice.
        made[..., :half] -= states[..., half:] * sine[..., :half]
        made[..., half:] += states[..., :half] * sine[..., half:]
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        back = gradient * cosine
        back[..., :half].addcmul_(gradient[..., half:], sine[..., half:])
        back[..., half:].addcmul_(gradient[..., :half], sine[..., :half], value=-1)
        return back, None, None
