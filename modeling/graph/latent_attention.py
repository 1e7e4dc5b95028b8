"""Latents: a few vectors that stand for groups of tokens, attend to tokens and to each other, and never look ahead."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
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


class FoldedMap(nn.Module):
    """The weight (outputs, inputs) of a linear map that is multiplied with others and never applied to states."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.initialise(inputs**-0.5)

    def initialise(self, std: float) -> None:
        """Normal numbers, as those of other maps."""
        init.normal_(self.weight, std=std)

    def by_head(self, heads: int) -> Tensor:
        """(heads, outputs / heads, inputs)."""
        return self.weight.unflatten(0, (heads, -1))


class LatentCrossAttention(nn.Module):
    """Attention of one query to each group of tokens, softmax(q k^T / sqrt(d)) v by heads; the output map has a bias.

    No token is mapped to a key or a value. For a query that all groups share, q . R_p W_k x = (W_k^T R_-p q) . x: the
    maps of keys and their rotations to places p are taken to the query. Values are mapped when they are summed.

    Args:
        width: of latents and sources.
        heads, head_dim: of queries, keys and values.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query, self.key, self.value = (FoldedMap(width, heads * head_dim) for _ in range(3))
        self.output = nn.Linear(heads * head_dim, width)

    def forward(self, latent: Tensor, groups: Tensor) -> Tensor:
        """From the latent (1, width) that asks and tokens (batch, groups, size, width) to (batch, groups, width)."""
        size = groups.shape[2]
        # Not a product of one row, which rounds by how its weight lies in memory: in a mapped file it lies otherwise.
        query = (self.query.by_head(self.heads) * latent).sum(-1)[None, :, None].expand(-1, -1, size, -1)
        turned = rotate_by(query, -torch.arange(size, device=groups.device)[None])[0]  # (heads, size, head_dim)
        asked = torch.einsum("hpd,hdw->phw", turned, self.key.by_head(self.heads))
        scores = torch.einsum("bgpw,phw->bghp", groups, asked) * self.head_dim**-0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        summed = scores.softmax(-1, dtype=wide).to(groups.dtype) @ groups  # (batch, groups, heads, width)
        read = torch.einsum("bghw,hdw->bghd", summed, self.value.by_head(self.heads))
        attended: Tensor = self.output(read.flatten(-2))
        return attended


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
