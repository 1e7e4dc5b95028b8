"""Coarse-grained attention: tokens read latents of complete groups, on several scales, and their own group exactly."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

from ...configuration.configuration_gnn import LlamaGNNConfig
from ..transformers_compat import take_cache
from .gin_attention import rotated_pair
from .group_grid import GroupGrid, padding_in_front
from .latent_cache import LevelState, latent_cache_layer
from .llama_heads import attention_of_any_width, join_heads, split_heads
from .token_groups import GroupMap, ReadGroups


class LevelOutput(nn.Module):
    """The output map of each level, summed; or one map for the sum of all levels.

    Args:
        config: of the model.
        starts_at_zero: whether the maps begin at 0, so that what they are added to is unchanged.
    """

    def __init__(self, config: LlamaGNNConfig, starts_at_zero: bool) -> None:
        super().__init__()
        latent, inner = config.gnn_config.latent, config.num_attention_heads * _head_dim(config)
        count = len(latent.tokens_per_latent) if latent.projects else 1
        self.maps = nn.ModuleList(nn.Linear(inner, config.hidden_size, bias=False) for _ in range(count))
        each: Any
        for each in self.maps:
            each.starts_at_zero = starts_at_zero  # read by `_init_weights`

    def forward(self, levels: list[Tensor]) -> Tensor:
        """(batch, target, heads * head_dim) of each level to (batch, target, hidden_size)."""
        parts = levels if len(self.maps) > 1 else [torch.stack(levels).sum(0)]
        return torch.stack([each(part) for each, part in zip(self.maps, parts, strict=True)]).sum(0)


class CGAttention(nn.Module):
    """sum over levels of W read(n), where read is one softmax over finished latents and the token's own group.

    See `ReadGroups` for a level. With `latent.skip` the normed state n is added. Costs S (S / t + t) for a level of t
    tokens per latent. The cache holds n in the place of keys, and the latents of each level beside it.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int, beside: bool = False) -> None:
        super().__init__()
        latent = config.gnn_config.latent
        self.layer_idx, self.skip = layer_idx, latent.skip
        self.levels = nn.ModuleList(ReadGroups(config, t, latent.num_layers) for t in latent.tokens_per_latent)
        self.output = LevelOutput(config, starts_at_zero=beside)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token; arguments as in LlamaAttentionGIN. There are no attention weights to give."""
        cache, states, held = take_cache(kwargs), hidden_states, [LevelState() for _ in self.levels]
        if cache is not None:
            held = latent_cache_layer(cache, self.layer_idx, len(self.levels)).levels
            keys, _ = cache.update(states[:, None], states[:, None, :, :0], self.layer_idx)
            states = keys[:, 0]
        return self.read(states, hidden_states.shape[1], attention_mask, held), None

    def read(self, states: Tensor, target: int, mask: Tensor | None, held: list[LevelState]) -> Tensor:
        """(batch, source, hidden_size), of all tokens so far, to the update of the last `target`."""
        grids = level_grids(self.levels, states, target, mask)
        read = [level(states, *each) for level, *each in zip(self.levels, grids, held, strict=True)]
        output = self.output(read)
        return output + states[:, states.shape[1] - target :] if self.skip else output


class LlamaAttentionWithStates(LlamaAttention):
    """The stock attention, whose cache also holds the normed hidden states of all tokens, beside the values."""

    def attend(
        self, hidden_states: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What stock attention sends, (batch, heads, target, head_dim); values and states of all tokens; weights."""
        query, key = rotated_pair(self, hidden_states, table)
        value, states = split_heads(self.v_proj(hidden_states), self.head_dim), hidden_states
        if cache is not None:
            packed = split_heads(states, states.shape[-1] // value.shape[1])
            widths = [value.shape[-1], packed.shape[-1]]
            key, both = cache.update(key, torch.cat([value, packed], dim=-1), self.layer_idx)
            value, packed = both.split(widths, dim=-1)
            states = join_heads(packed)
        attended, weights = attention_of_any_width(self, (query, key, value), mask, self.scaling, kwargs)
        return attended, value, states, weights


class LlamaAttentionBesideCG(LlamaAttentionWithStates):
    """The stock attention plus CGAttention, whose output maps begin at 0: at first it is the stock attention."""

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.cg = CGAttention(config, layer_idx, beside=True)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token; arguments and results as in LlamaAttentionGIN."""
        cache = take_cache(kwargs)
        held = level_states(cache, self.layer_idx, len(self.cg.levels))
        attended, _, states, weights = self.attend(hidden_states, position_embeddings, attention_mask, cache, kwargs)
        output = self.o_proj(join_heads(attended))
        return output + self.cg.read(states, hidden_states.shape[1], attention_mask, held), weights


class CGAttentionInterpolate(LlamaAttentionWithStates):
    """y_i = mu SDPA_i + (1 - mu) sum_c Lambda[ell(i), c] mean of v over group c, for each level; see `GroupMap`.

    mu is one trainable number per level, in (0, 1) by a sigmoid, and 1 where no group is complete. Weights sum to 1.
    Levels are averaged before the stock output map. With `latent.projects` they are summed through maps of their own
    in its place. With `base_attention` the stock attention stays, and they are added through maps that begin at 0.
    """

    def __init__(self, config: LlamaGNNConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options, latent = config.gnn_config, config.gnn_config.latent
        self.skip, self.first_mix = latent.skip, float(latent.mix)
        self.levels = nn.ModuleList(GroupMap(config, t, latent.num_layers) for t in latent.tokens_per_latent)
        self.mix = nn.Parameter(torch.full((len(self.levels),), self.first_mix).logit())
        beside, projects = options.base_attention, latent.projects
        self.output = LevelOutput(config, starts_at_zero=beside) if beside or projects else None
        self.keeps_base = beside or not projects
        if not self.keeps_base:
            del self.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Update each token; arguments and results as in LlamaAttentionGIN. The weights are those of SDPA."""
        cache = take_cache(kwargs)
        held = level_states(cache, self.layer_idx, len(self.levels))
        found = self.attend(hidden_states, position_embeddings, attention_mask, cache, kwargs)
        attended, value, states, weights = found
        value = repeat_kv(value, self.num_key_value_groups)
        grids, mixed = level_grids(self.levels, states, hidden_states.shape[1], attention_mask), []
        for index, level in enumerate(self.levels):
            sums, complete = level(states, value, grids[index], held[index])
            share = torch.where(complete, self.mix[index].sigmoid(), 1.0).to(sums.dtype)
            mixed.append(join_heads(share * attended + (1 - share) * sums))
        output = self._output(attended, mixed)
        return output + hidden_states if self.skip else output, weights

    def _output(self, attended: Tensor, mixed: list[Tensor]) -> Tensor:
        if self.output is None:
            return self.o_proj(torch.stack(mixed).mean(0))
        levels: Tensor = self.output(mixed)
        return self.o_proj(join_heads(attended)) + levels if self.keeps_base else levels


def level_states(cache: Any, layer_idx: int, count: int) -> list[LevelState]:
    """The levels' states in the cache; new ones if there is none."""
    return (
        [LevelState() for _ in range(count)] if cache is None else latent_cache_layer(cache, layer_idx, count).levels
    )


def level_grids(levels: Any, states: Tensor, target: int, mask: Tensor | None) -> list[GroupGrid]:
    """Where the last `target` of (batch, source, width) states lie among each level's groups."""
    source = states.shape[1]
    padding = padding_in_front(mask, target, source)
    return [GroupGrid(level.size, source - target, target, padding, states.device) for level in levels]


def _head_dim(config: LlamaGNNConfig) -> int:
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def cg_class(options: Any) -> type[nn.Module]:
    """The coarse-grained attention that these options name."""
    if options.attention == "cg_interpolate":
        return CGAttentionInterpolate
    return LlamaAttentionBesideCG if options.base_attention else CGAttention
