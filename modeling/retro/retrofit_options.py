"""How a decoder people already have is given retrieval: the options, without PEFT, which may be absent."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...configuration.configuration_retro import RetroConfig


@strict
@dataclass
class RetroFitOptions:
    """What RetroFitConfig says of the new parts; its fields, which are explained there."""

    chunk_size: int = 64
    neighbour_length: int | None = None
    cross_attention_layers: list[int] | tuple[int, ...] | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    encoder_hidden_size: int | None = None
    encoder_intermediate_size: int | None = None
    num_encoder_layers: int = 2
    encoder_cross_attention_layers: list[int] | tuple[int, ...] | None = None
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    norm: Literal["rms", "gated_rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    rotary_dim: int | None = None
    rope_theta: float | int = 10000.0
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("cross_attention_layers", "encoder_cross_attention_layers"):
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))

    def validate_ranges(self) -> None:
        """Refuse what no base could make right; the rest is checked by `retro_config`."""
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("attention_dropout", "hidden_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        for name in ("norm_eps", "rope_theta", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"`rotary_dim` must be even, got {self.rotary_dim}.")

    def validate_layers(self) -> None:
        """Refuse layers named twice or not at all."""
        if self.cross_attention_layers is not None and not self.cross_attention_layers:
            raise ValueError("`cross_attention_layers` must name at least one decoder layer, got none.")
        for name in ("cross_attention_layers", "encoder_cross_attention_layers"):
            layers = getattr(self, name) or []
            if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise ValueError(f"`{name}` must name different layers from 0 on in rising order, got {layers}.")

    def retro_config(self, base: PreTrainedConfig) -> RetroConfig:
        """What the new parts are made from: these options, completed by the configuration of the base model.

        Raises:
            ValueError: a layer or a padding token that the base does not have, or none to be had.
            StrictDataclassError: sizes that do not fit together.
        """
        count = base.num_hidden_layers
        layers = every_third_layer(count) if self.cross_attention_layers is None else self.cross_attention_layers
        if layers[-1] >= count:
            raise ValueError(f"`cross_attention_layers` must lie in [0, {count}) for this model, got {list(layers)}.")
        heads = base.num_attention_heads if self.num_attention_heads is None else self.num_attention_heads
        config = RetroConfig(
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            num_hidden_layers=count,
            num_attention_heads=heads,
            num_key_value_heads=self.num_key_value_heads or self._key_value_heads(base, heads),
            head_dim=self.head_dim or getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
            encoder_hidden_size=self.encoder_hidden_size,
            encoder_intermediate_size=self.encoder_intermediate_size,
            num_encoder_layers=self.num_encoder_layers,
            cross_attention_layers=list(layers),
            encoder_cross_attention_layers=self.encoder_cross_attention_layers,
            chunk_size=self.chunk_size,
            neighbour_length=self.neighbour_length,
            rotary_dim=self.rotary_dim,
            rope_theta=self.rope_theta,
            norm=self.norm,
            norm_eps=self.norm_eps,
            hidden_act=self.hidden_act,
            gated_mlp=self.gated_mlp,
            attention_dropout=self.attention_dropout,
            encoder_attention_dropout=self.attention_dropout,
            encoder_hidden_dropout=self.hidden_dropout,
            residual_dropout=self.residual_dropout,
            initializer_range=self.initializer_range,
            pad_token_id=self._padding(base),
        )
        config._attn_implementation = "eager" if base._attn_implementation == "eager" else "sdpa"
        return config

    def _key_value_heads(self, base: PreTrainedConfig, heads: int) -> int:
        """The base's, if they fit as many heads as it has."""
        shared = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        return shared if heads == base.num_attention_heads else heads

    def _padding(self, base: PreTrainedConfig) -> int:
        padding = self.pad_token_id
        if padding is None:
            ends = base.eos_token_id
            padding = (
                base.pad_token_id if base.pad_token_id is not None else ends[0] if isinstance(ends, list) else ends
            )
        if padding is None or not 0 <= padding < base.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie in [0, vocab_size {base.vocab_size}), got {padding}: it marks neighbours "
                "that are short or missing."
            )
        return padding


def every_third_layer(count: int) -> Sequence[int]:
    """Of `count` layers: every third up to the last, in the upper half; of 12 those are 5, 8, 11."""
    return list(range(count - 1, max(count // 2 - 2, -1), -3))[::-1]


_COUNTS = (
    "chunk_size",
    "neighbour_length",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "encoder_hidden_size",
    "encoder_intermediate_size",
    "num_encoder_layers",
    "rotary_dim",
)
