"""Latents: a few vectors that stand for groups of tokens, attend to tokens and to each other, and never look ahead."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import rotate_half

from .llama_heads import join_heads, split_heads

_ROTARY_BASE = 10000.0


def rotate_by(states: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of (batch, heads, source, head_dim) at positions (batch or 1, source)."""
    width = states.shape[-1]
    exponents = torch.arange(0, width, 2, device=states.device, dtype=torch.float32) / width
    angles = positions[..., None].float() * _ROTARY_BASE**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return states * angles.cos().to(states.dtype) + rotate_half(states) * angles.sin().to(states.dtype)


class LatentCrossAttention(nn.Module):
    """Attention of latents to sources, as softmax(q k^T / sqrt(d)) v by heads; no biases but that of the output map.

    Args:
        width: of latents and sources.
        heads, head_dim: of queries, keys and values.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.output = nn.Linear(heads * head_dim, width)

    def forward(self, latents: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        """From (..., latents, width) to (..., source, width), whose keys are rotated to `places` (1, source)."""
        query, key, value = self.query(latents), self.key(sources), self.value(sources)
        query, key, value = (split_heads(each.flatten(0, -3), self.head_dim) for each in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, rotate_by(key, places), value)
        return self.output(join_heads(attended)).unflatten(0, latents.shape[:-2])


class LatentSelfAttention(nn.Module):
    """Queries, keys and values of latents, rotated to their numbers, and the output map."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.projections = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, width)

    def query_key_value(self, latents: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three of (batch, heads, latents, head_dim)."""
        query, key, value = (split_heads(each, self.head_dim) for each in self.projections(latents).chunk(3, dim=-1))
        return rotate_by(query, numbers), rotate_by(key, numbers), value


class LatentTransformerLayer(nn.Module):
    """Pre-norm causal self-attention among latents, then an MLP of four times the width (GELU)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = LatentSelfAttention(width, heads, head_dim)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def query_key_value(self, latents: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What latents (batch, latents, width) of these numbers attend with."""
        return self.attention.query_key_value(self.attention_norm(latents), numbers)

    def finish(self, latents: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to, (batch, heads, latents, head_dim), and the MLP's part."""
        latents = latents + self.attention.output(join_heads(attended))
        return latents + self.down(functional.gelu(self.up(self.mlp_norm(latents))))


def latent_sums(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where the latent of number c reads those up to c, itself included.

    Args:
        query: (batch, heads, new, head_dim), of the latents `numbers` (batch or 1, new).
        key, value: (batch, heads, known, .), of latents 0, 1, ...; numbers beyond what a row has are never read.
    """
    if not query.shape[2]:
        return query @ (key.transpose(-1, -2) @ value)  # nothing, with its gradients
    visible = torch.arange(key.shape[2], device=key.device) <= numbers[:, None, :, None]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
