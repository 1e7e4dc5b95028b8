"""The options of a retro-fit as the configuration of a PEFT method: one class for `retrofit` and for PEFT."""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from peft import PeftConfig

from .retrofit_options import RetroFitOptions

PEFT_TYPE = "RETROFIT"


@strict
@dataclass
class RetroFitConfig(RetroFitOptions, PeftConfig):
    """Chunked cross-attention in some layers of a frozen decoder, and an encoder of neighbours (arXiv 2112.04426).

    None takes what the base model has: its heads, its width, its padding.

    Args:
        chunk_size: tokens of a chunk, m.
        neighbour_length: most tokens of a neighbour, r; None is 2 `chunk_size` (a chunk and its continuation).
        cross_attention_layers: decoder layers that read neighbours, from 0, rising. The first conditions the encoder.
            None is every third layer up to the last, in the upper half (of 12: 5, 8, 11, as in the paper).
        num_attention_heads, num_key_value_heads, head_dim: of every new attention.
        encoder_hidden_size: width of the encoder; another one than the base's projects the embedding.
        encoder_intermediate_size: width inside the encoder's feed-forward; None is 4 times its width.
        num_encoder_layers: layers of the encoder.
        encoder_cross_attention_layers: encoder layers that read the chunk whose neighbours they encode; None is all.
        hidden_act, gated_mlp: feed-forward of the encoder, as in RetroConfig.
        norm, norm_eps: in front of cross-attention and in the encoder.
        rotary_dim, rope_theta: rotary positions of the new attentions, None rotates the whole head.
        attention_dropout, hidden_dropout, residual_dropout: of the new parts.
        initializer_range: standard deviation of new weights. The outputs of cross-attention begin at 0.
        pad_token_id: fills short and missing neighbours; needed where the base has none.
    """

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        super().__post_init__()
        self.peft_type = PEFT_TYPE
