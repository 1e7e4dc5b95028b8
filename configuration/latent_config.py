"""Latents that stand for groups of tokens: their options."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass, field

from huggingface_hub.dataclasses import strict


@strict
@dataclass
class LatentConfig:
    """Latents that stand for groups of tokens, on one or more scales.

    Args:
        tokens_per_latent: size of the groups, a level for each.
        num_layers: of attention among a level's latents. With "cg_interpolate" the last is an attention map only.
        skip: whether the attention's input is added to its output.
        projects: whether each level has its own output map; otherwise all share one.
        mix: share of the stock attention in "cg_interpolate" at the beginning; trainable, one number per level.
    """

    tokens_per_latent: list[int] = field(default_factory=lambda: [32, 64, 256])
    num_layers: int = 1
    skip: bool = False
    projects: bool = True
    mix: float | int = 0.5

    def validate_ranges(self) -> None:
        """Refuse numbers outside their range; the message names the field, its value and what is allowed."""
        sizes = self.tokens_per_latent
        if not sizes or min(sizes) < 2 or len(set(sizes)) != len(sizes):
            raise ValueError(f"`tokens_per_latent` must name different sizes of at least 2, got {sizes}.")
        if self.num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {self.num_layers}.")
        if not 0 < self.mix < 1:
            raise ValueError(f"`mix` must lie in (0, 1), got {self.mix}.")
