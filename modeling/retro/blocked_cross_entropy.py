"""Cross-entropy of an output head without the logits of all tokens in memory at once.

The gradients of a block of tokens are taken while its logits exist, so a training step holds one block of logits
instead of three copies of all of them.
"""

from typing import Any

import torch
from torch import Tensor

# On a CPU as many logits as its caches hold from one pass over them to the next; elsewhere as many tokens as keep the
# matrix products large.
CPU_LOGITS = 1 << 23
BLOCK_TOKENS = 1024
IGNORED = -100


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block: int
    ) -> Tensor:
        needs = context.needs_input_grad
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        # Sums over blocks are kept in the wide type; what one block gives alone is not.
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=total.dtype) if bias is not None and needs[2] else None
        memory = hidden.new_empty(min(block, len(targets)), len(weight))  # of all blocks: a fresh one is slow to touch
        for start in range(0, len(targets), block):
            part = slice(start, start + block)
            rows, labels = hidden[part], targets[part][:, None]
            logits = torch.mm(rows, weight.T, out=memory[: len(rows)]).to(total.dtype)
            if bias is not None:
                logits += bias
            largest = logits.amax(-1, keepdim=True)
            of_labels = logits.gather(1, labels)
            powers = logits.sub_(largest).exp_()
            sums = powers.sum(-1, keepdim=True)
            total += (sums.log() + largest - of_labels).sum()
            if not any(needs):
                continue
            gradient = powers.div_(sums)  # softmax(logits), less one at the label
            gradient.scatter_add_(1, labels, gradient.new_full((len(labels), 1), -1.0))
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(rows.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None and grad_weight.dtype == rows.dtype:
                grad_weight.addmm_(gradient.T, rows)
            elif grad_weight is not None:
                grad_weight += gradient.T @ rows
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        context.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: Tensor) -> Any:
        scaled = (None if grad is None else grad * upstream.to(grad.dtype) for grad in context.saved_tensors)
        return (*scaled, None, None)


def blocked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    count: Tensor | int | None = None,
    block: int | None = None,
) -> Tensor:
    """Mean of -log softmax(hidden W^T + b)[target] over the tokens that have one.

    Args:
        hidden: (tokens, hidden_size).
        weight, bias: (vocab_size, hidden_size) and (vocab_size,) or None, of the output head.
        targets: (tokens,) ids, -100 where nothing is scored; these tokens cost nothing.
        count: divide by this instead of the number of scored tokens (gradient accumulation).
        block: tokens whose logits exist at once; None chooses by the device.

    Returns:
        A scalar in float32 or wider; 0, with gradients of 0, if no token is scored.
    """
    scored = targets != IGNORED
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    if block is None:
        block = max(1, CPU_LOGITS // len(weight)) if hidden.device.type == "cpu" else BLOCK_TOKENS
    total = _BlockedCrossEntropy.apply(hidden[scored], weight, bias, targets[scored], block)
    return total / (scored.sum().clamp(min=1) if count is None else count)
