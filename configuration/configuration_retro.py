"""What a RETRO is: a decoder whose chunks of tokens read neighbours found in a corpus.

Borgeaud et al. 2021, "Improving Language Models by Retrieving from Trillions of Tokens", arXiv 2112.04426.
"""

# No `from __future__ import annotations` here: it would silently switch the strict type checks off.
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

RETRIEVER_NAMES = ("corpus", "embedder")


@strict
class RetroConfig(PreTrainedConfig):
    """Sizes and variants of a RetroModel. Tokens are cut into chunks; each chunk's neighbours are read by the next.

    Args:
        vocab_size: tokens known to decoder and encoder, which share one embedding.
        hidden_size: width of the decoder.
        intermediate_size: width inside the decoder's feed-forward; None is 4 times `hidden_size`.
        num_hidden_layers: decoder layers.
        num_attention_heads, num_key_value_heads, head_dim: of every attention; None gives as many key/value heads as
            heads, and `hidden_size / num_attention_heads`.
        encoder_hidden_size: width of the encoder and of the embedding; None is `hidden_size`.
        encoder_intermediate_size: None is 4 times `encoder_hidden_size`.
        num_encoder_layers: layers of the encoder of neighbours.
        cross_attention_layers: decoder layers that read neighbours, from 0. The first of them conditions the encoder.
        encoder_cross_attention_layers: encoder layers that read the chunk whose neighbours they encode; None is all.
            An empty list makes an encoding depend on the neighbour alone.
        chunk_size: tokens of a chunk, m.
        neighbour_length: most tokens of a neighbour, r; None is 2 `chunk_size` (a chunk and its continuation).
        num_neighbours: neighbours per chunk that data is prepared with; the model takes any number.
        rotary_dim: dimensions of each head that are rotated; None is all.
        rope_theta: base of the rotary frequencies.
        rope: "paper" places the queries of cross-attention at m - 1, m, ...; "legacy" where RETRO-pytorch put them.
        position_embedding: "rotary", for any length, or "rotary+learned", which adds learned absolute positions.
        max_position_embeddings: length trained for; a limit only with learned positions.
        norm: "rms", "gated_rms" (x / rms g sigmoid(x w)) or "layer".
        norm_eps: added to the mean square; "gated_rms" takes it as the least rms.
        residual: "prenorm", h + f(norm(h)), or "deepnorm", norm(a h + f(h)) (arXiv 2203.00555).
        hidden_act: activation of the feed-forward: "gelu", "relu2" (squared ReLU), "silu", ...
        gated_mlp: feed-forward with a gate, (act(x W_g) * x W_u) W_d.
        attention: "softmax", or "rela": rectified scores with a gated norm on the output (arXiv 2104.07012).
        attention_dropout, hidden_dropout: of attention weights and inside the feed-forward, in the decoder.
            Attention dropout on a CPU stores all weights; `residual_dropout` costs nothing there.
        encoder_attention_dropout, encoder_hidden_dropout: the same in the encoder.
        residual_dropout: of what a sublayer adds to the residual, in both.
        initializer_range: standard deviation of new weights; outputs to the residual are smaller by sqrt(2 layers).
        tie_word_embeddings: use the embedding as output head; needs equal widths.
        head_bias: whether the output head has a bias.
        pad_token_id: fills short and missing neighbours, which nothing attends to.
        retriever: names, for the reader of a model card, of the {"corpus", "embedder"} that it was trained with.
    """

    model_type = "graft_retro"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    encoder_hidden_size: int | None = None
    encoder_intermediate_size: int | None = None
    num_encoder_layers: int = 2
    cross_attention_layers: list[int] | tuple[int, ...] = (5, 8, 11)
    encoder_cross_attention_layers: list[int] | tuple[int, ...] | None = None
    chunk_size: int = 64
    neighbour_length: int | None = None
    num_neighbours: int = 2
    rotary_dim: int | None = None
    rope_theta: float | int = 10000.0
    rope: Literal["paper", "legacy"] = "paper"
    position_embedding: Literal["rotary", "rotary+learned"] = "rotary"
    max_position_embeddings: int = 2048
    norm: Literal["rms", "gated_rms", "layer"] = "rms"
    norm_eps: float = 1e-8
    residual: Literal["prenorm", "deepnorm"] = "prenorm"
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    attention: Literal["softmax", "rela"] = "softmax"
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    encoder_attention_dropout: float | int = 0.0
    encoder_hidden_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    head_bias: bool = False
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    retriever: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs, [field.name for field in fields(self)])
        self.cross_attention_layers = list(self.cross_attention_layers)
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.encoder_intermediate_size is None:
            self.encoder_intermediate_size = 4 * self.encoder_hidden_size
        if self.encoder_cross_attention_layers is None:
            self.encoder_cross_attention_layers = list(range(self.num_encoder_layers))
        self.encoder_cross_attention_layers = list(self.encoder_cross_attention_layers)
        if self.neighbour_length is None:
            self.neighbour_length = 2 * self.chunk_size
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim
        super().__post_init__(**kwargs)

    # The fields above may be given as None; from here on they are numbers.

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """Heads, key/value heads, and dimensions of each."""
        return self.num_attention_heads, int(self.num_key_value_heads or 0), int(self.head_dim or 0)

    @property
    def encoder_width(self) -> int:
        """Width of encoder and embedding."""
        return int(self.encoder_hidden_size or 0)

    @property
    def rotary_width(self) -> int:
        """Dimensions of each head that are rotated."""
        return int(self.rotary_dim or 0)

    @property
    def longest_neighbour(self) -> int:
        """Most tokens of a neighbour, r."""
        return int(self.neighbour_length or 0)

    def validate_sizes(self) -> None:
        """Refuse sizes that make no model; the message names the field, its value and what is allowed."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        heads, shared, _ = self.head_sizes
        if heads % shared:
            raise ValueError(f"`num_key_value_heads` must divide `num_attention_heads` {heads}, got {shared}.")
        if self.rotary_width % 2 or self.rotary_width > self.head_sizes[2]:
            raise ValueError(
                f"`rotary_dim` must be even and at most `head_dim` {self.head_dim}, got {self.rotary_dim}."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` must lie in [0, vocab_size {self.vocab_size}), got {self.pad_token_id}.")
        if self.tie_word_embeddings and self.hidden_size != self.encoder_hidden_size:
            raise ValueError(
                f"`tie_word_embeddings` needs `encoder_hidden_size` {self.encoder_hidden_size} equal to `hidden_size` "
                f"{self.hidden_size}: the embedding has the encoder's width."
            )

    def validate_layers(self) -> None:
        """Refuse layers that do not exist or are named twice."""
        if not self.cross_attention_layers:
            raise ValueError("`cross_attention_layers` must name at least one decoder layer, got none.")
        _check_layers("cross_attention_layers", self.cross_attention_layers, self.num_hidden_layers)
        encoder_layers = self.encoder_cross_attention_layers or []
        _check_layers("encoder_cross_attention_layers", encoder_layers, self.num_encoder_layers)

    def validate_retriever(self) -> None:
        """Let `retriever` hold names only."""
        if unknown := sorted(set(self.retriever or ()) - set(RETRIEVER_NAMES)):
            raise ValueError(f"`retriever` holds names of {RETRIEVER_NAMES} only, got {unknown}.")


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "encoder_hidden_size",
    "encoder_intermediate_size",
    "num_encoder_layers",
    "chunk_size",
    "neighbour_length",
    "num_neighbours",
    "rotary_dim",
    "max_position_embeddings",
)
_SHARES = (
    "attention_dropout",
    "hidden_dropout",
    "encoder_attention_dropout",
    "encoder_hidden_dropout",
    "residual_dropout",
)


def _check_layers(name: str, layers: Sequence[int], count: int) -> None:
    """Raise ValueError unless `layers` are different numbers from 0 to `count` - 1 in rising order."""
    if list(layers) != sorted(set(layers)) or any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"`{name}` must name different layers in [0, {count}) in rising order, got {list(layers)}.")


def _refuse_misspelt(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for a name that looks like a field: a PreTrainedConfig would keep it, and nobody read it."""
    for name in given:
        if meant := get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"RetroConfig has no field `{name}`; did you mean `{meant[0]}`?")
