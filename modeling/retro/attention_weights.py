"""How scores become an output: softmax by any of transformers' implementations, or rectified linear attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...configuration.configuration_retro import RetroConfig
from .dropped_attention import dropped_attention
from .few_numbers import attend_from_one_row
from .normalisation import GatedRMSNorm
from .projections import make_dropout


def repeat_heads(states: Tensor, repeats: int) -> Tensor:
    """(batch, key_value_heads, source, head_dim) to (batch, heads, source, head_dim)."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def masked_scores(query: Tensor, key: Tensor, visible: Tensor | None, scaling: float, hidden: float) -> Tensor:
    """scaling q k^T, and `hidden` where nothing may be seen.

    Args:
        query: (batch, heads, target, head_dim).
        key: (batch, key_value_heads, source, head_dim).
        visible: (batch or 1, 1, target or 1, source) bool, or additive scores as transformers' eager masks are.
    """
    scores = query @ repeat_heads(key, query.shape[1] // key.shape[1]).transpose(-1, -2) * scaling
    if visible is None:
        return scores
    return scores.masked_fill(~visible if visible.dtype == torch.bool else visible < 0, hidden)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling q k^T) v with all weights kept; arguments and results as transformers' attention functions."""
    scores = masked_scores(query, key, attention_mask, scaling, torch.finfo(query.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    output = dropped @ repeat_heads(value, query.shape[1] // value.shape[1])
    return output.transpose(1, 2).contiguous(), weights


class SoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v by the implementation that the config names: sdpa, eager or registered.

    On a CPU torch's sdpa has no fused kernel with dropout; our own takes its place there.
    """

    def __init__(self, config: RetroConfig, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.is_causal = is_causal
        heads, shared, head_dim = config.head_sizes
        self.scaling = head_dim**-0.5
        self.num_key_value_groups = heads // shared

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (batch, heads, target, head_dim).
            key, value: (batch, key_value_heads, source, head_dim).
            mask: (batch or 1, 1, target or 1, source) as the implementation wants it; None shows all (or, if causal,
                the past).

        Returns:
            (batch, target, heads head_dim), and the weights (batch, heads, target, source) if they were kept.
        """
        dropout = self.dropout if self.training else 0.0
        name = self.config._attn_implementation
        if name == "sdpa" and query.shape[2] == 1 and self.num_key_value_groups == 1 and not dropout:
            return attend_from_one_row(query, key, value, mask, self.scaling), None
        attend: Callable[..., tuple[Tensor, Tensor | None]]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        if dropout and name == "sdpa" and query.device.type == "cpu":
            attend = dropped_attention
        output, weights = attend(
            self, query, key, value, mask, scaling=self.scaling, dropout=dropout, is_causal=self.is_causal
        )
        return output.flatten(2), weights


class RectifiedAttention(nn.Module):
    """norm(relu(q k^T / sqrt(head_dim)) v): sparse, and the gated norm stands in for the sum of the softmax.

    Zhang et al. 2021, "Sparse Attention with Linear Units", arXiv 2104.07012.
    """

    def __init__(self, config: RetroConfig, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        heads, _, head_dim = config.head_sizes
        self.scaling = head_dim**-0.5
        self.dropout = make_dropout(dropout)
        self.norm = GatedRMSNorm(heads * head_dim, config.norm_eps)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """As SoftmaxAttention."""
        if mask is None and self.is_causal and query.shape[2] > 1:
            target, source = query.shape[2], key.shape[2]
            mask = torch.ones(target, source, dtype=torch.bool, device=query.device).tril(source - target)[None, None]
        weights = masked_scores(query, key, mask, self.scaling, 0.0).relu()
        output = self.dropout(weights) @ repeat_heads(value, query.shape[1] // value.shape[1])
        return self.norm(output.transpose(1, 2).flatten(2)), weights


def make_attention(config: RetroConfig, dropout: float, is_causal: bool) -> SoftmaxAttention | RectifiedAttention:
    """The attention that `config.attention` names."""
    kind = RectifiedAttention if config.attention == "rela" else SoftmaxAttention
    return kind(config, dropout, is_causal)
