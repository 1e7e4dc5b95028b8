"""One level of latent attention: latents of complete groups of t tokens, and how tokens read them.

Buehler 2025 (arXiv 2501.02393) has such levels; here they are causal, and depend on each token's latents. Group c of a
row holds its real tokens c t ... c t + t - 1. A token at place i may read latents up to number ell(i) =
(i + 1) // t - 1, that of the last group complete with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...configuration.configuration_gnn import LlamaGNNConfig
from .group_grid import GroupGrid
from .latent_attention import LatentCrossAttention, LatentTransformerLayer, latent_sums, rotate_by
from .latent_cache import LevelState
from .llama_heads import join_heads, split_heads


def read_latents_and_group(
    query: Tensor, groups: tuple[Tensor, Tensor], latents: tuple[Tensor, Tensor], last: Tensor, place: Tensor
) -> Tensor:
    """One softmax over the latents up to `last` and the places of the own group up to `place`.

    Args:
        query: (batch, heads, groups, rows, head_dim).
        groups: keys and values of the groups' tokens, (batch, heads, groups, size, head_dim).
        latents: keys and values of the latents, (batch, heads, latents, head_dim).
        last: (batch or 1, groups, rows), -1 for none.
        place: as `last`, within the group.

    Returns:
        As `query`. rows x (latents + size) scores for each group and head.
    """
    query = query * query.shape[-1] ** -0.5
    key, value = latents
    far = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    scores = torch.cat([far, query @ groups[0].transpose(-1, -2)], dim=-1)
    numbers = [torch.arange(n, device=query.device) for n in (key.shape[2], groups[0].shape[3])]
    visible = [count <= bound[:, None, ..., None] for count, bound in zip(numbers, (last, place), strict=True)]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    weights = scores.masked_fill(~torch.cat(visible, dim=-1), -torch.inf).softmax(-1).to(value.dtype)
    far, near = weights.split([key.shape[2], groups[0].shape[3]], dim=-1)
    return (far.flatten(2, 3) @ value).unflatten(2, query.shape[2:4]) + near @ groups[1]


class TokenGroups(nn.Module):
    """Latents of one level: `encode` makes them of complete groups and lets them attend to earlier ones.

    Latent c is the attention of one learned query, the same for all groups, to the tokens of group c, whose keys are
    rotated to their places in it. Layers of causal attention among latents follow, rotated to their numbers: O(S) and
    O((S / t)^2).

    Args:
        config: of the model.
        size: t.
        layers: of attention among latents.
    """

    def __init__(self, config: LlamaGNNConfig, size: int, layers: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.size, self.heads = size, heads
        self.head_dim = int(config.head_dim or width // heads)
        sizes = width, heads, self.head_dim
        self.latent_query = nn.Parameter(torch.zeros(1, width))
        self.cross_attention = LatentCrossAttention(*sizes)
        self.layers = nn.ModuleList(LatentTransformerLayer(*sizes) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def encode(self, states: Tensor, grid: GroupGrid, state: LevelState) -> Tensor:
        """Latents of the groups that this pass completes.

        Args:
            states: (batch, source, width), normed hidden states of all tokens so far.

        Returns:
            (batch, fresh, width).
        """
        latents = self.cross_attention(self.latent_query, grid.fresh_tokens(states))
        numbers = grid.fresh_groups()
        layer: Any  # a LatentTransformerLayer; a ModuleList does not say so
        for depth, layer in enumerate(self.layers):
            query, key, value = layer.query_key_value(latents, numbers)
            key, value = known(f"layer {depth}", (key, value), grid, state)
            latents = layer.finish(latents, latent_sums(query, key, value, numbers))
        return self.norm(latents)


class ReadGroups(TokenGroups):
    """Tokens read latents and their own group, in one softmax, through the level's own projections."""

    def __init__(self, config: LlamaGNNConfig, size: int, layers: int) -> None:
        super().__init__(config, size, layers)
        width, inner = config.hidden_size, self.heads * self.head_dim
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)

    def forward(self, states: Tensor, grid: GroupGrid, state: LevelState) -> Tensor:
        """(batch, source, width), of all tokens so far, to (batch, new, heads * head_dim).

        Rotary positions are numbers for latents, and places in the group for tokens.
        """
        latents = self.encode(states, grid, state)
        key, value = self._by_heads(self.key_value(latents))
        far = known("read", (rotate_by(key, grid.fresh_groups()), value), grid, state)
        near = self._near(states, grid, state)
        query = split_heads(self.query(states[:, grid.past :]), self.head_dim)
        places = grid.places()
        query = join_heads(rotate_by(query, places % self.size))
        if grid.touched == 1:
            queries, places = query[:, None], places[:, None]
        else:
            queries = grid.touched_tokens(query)
            places = grid.first * self.size + torch.arange(grid.touched * self.size, device=states.device)
            places = places.unflatten(1, (grid.touched, self.size))
        queries = queries.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
        last = (places + 1) // self.size - 1
        read = read_latents_and_group(queries, near, far, last, places % self.size)
        read = join_heads(read.flatten(2, 3))
        return read if grid.touched == 1 else grid.new_tokens(read)

    def _by_heads(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        key, value = joined.chunk(2, dim=-1)
        return split_heads(key, self.head_dim), split_heads(value, self.head_dim)

    def _token_keys_values(self, states: Tensor, places: Tensor) -> Tensor:
        """(batch, tokens, 2 * heads * head_dim): keys, rotated to their places in the group, and values."""
        key, value = self.key_value(states).chunk(2, dim=-1)
        key = rotate_by(split_heads(key, self.head_dim), places % self.size)
        return torch.cat([join_heads(key), value], dim=-1)

    def _near(self, states: Tensor, grid: GroupGrid, state: LevelState) -> tuple[Tensor, Tensor]:
        """Keys and values of all places of the groups in which new tokens lie; the open group's come from `state`."""
        held = 0 if state.open is None else state.open.shape[1]
        parts = [] if state.open is None else [state.open]
        parts.append(self._token_keys_values(states[:, grid.past :], grid.places()))
        if held < grid.open:  # after a crop, earlier tokens of the group are not held
            lost = torch.arange(grid.past - grid.open, grid.past - held, device=states.device)
            places = (lost - grid.padding).clamp(min=0)
            parts.insert(0, self._token_keys_values(states[:, grid.past - grid.open : grid.past - held], places))
        window = torch.cat(parts, dim=1)
        state.open = window[:, max(0, window.shape[1] - self.size + 1) :]
        pairs = grid.touched_tokens(window).unflatten(-1, (2, self.heads, self.head_dim)).permute(3, 0, 4, 1, 2, 5)
        return pairs[0], pairs[1]


class GroupMap(TokenGroups):
    """The attention map among latents, up-sampled to tokens: token i reads group c with Lambda[ell(i), c] / t each.

    Equal to a sum over a map of tokens x tokens, which is never made: sums over groups are means of values.
    """

    def __init__(self, config: LlamaGNNConfig, size: int, layers: int) -> None:
        super().__init__(config, size, layers - 1)
        width = config.hidden_size
        self.map = nn.Linear(width, 2 * self.heads * self.head_dim, bias=False)

    def forward(self, states: Tensor, values: Tensor, grid: GroupGrid, state: LevelState) -> tuple[Tensor, Tensor]:
        """What each new token reads of complete groups.

        Args:
            states: (batch, source, width), normed hidden states of all tokens so far.
            values: (batch, heads, source, head_dim), of all tokens so far.

        Returns:
            (batch, heads, new, head_dim), 0 where no group is complete, and whether one is, (batch or 1, 1, new, 1).
        """
        latents, numbers = self.encode(states, grid, state), grid.fresh_groups()
        query, key = (split_heads(each, self.head_dim) for each in self.map(latents).chunk(2, dim=-1))
        means = split_heads(grid.fresh_tokens(join_heads(values)).mean(2), self.head_dim)
        key, means = known("map", (rotate_by(key, numbers), means), grid, state)
        sums = latent_sums(rotate_by(query, numbers), key, means, numbers)
        sums = grid.place(state.latents.get("sums"), sums)
        state.latents["sums"] = sums
        last = (grid.places() + 1) // self.size - 1
        index = (last + 1)[:, None, :, None].expand(sums.shape[0], sums.shape[1], -1, sums.shape[3])
        return functional.pad(sums, (0, 0, 1, 0)).gather(2, index), (last >= 0)[:, None, :, None]


def known(name: str, fresh: tuple[Tensor, Tensor], grid: GroupGrid, state: LevelState) -> tuple[Tensor, Tensor]:
    """Keys and values of all latents by number; `state`, which held those of earlier passes, holds all then."""
    width = fresh[0].shape[-1]
    both = grid.place(state.latents.get(name), torch.cat(fresh, dim=-1))
    state.latents[name] = both
    return both[..., :width], both[..., width:]
