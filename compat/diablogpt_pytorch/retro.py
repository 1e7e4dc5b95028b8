"""DIABLOGPT, which the document also calls RETRO: its arguments, and how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graft.configuration.configuration_retro import RetroConfig
from graft.modeling.retro.blocked_cross_entropy import IGNORED, blocked_cross_entropy
from graft.modeling.retro.modeling_retro import RetroForCausalLM

BERT_VOCABULARY = 28_996
ROTATED = 32


@dataclass(frozen=True)
class RetroArguments:
    """What the document's model is made with, under its names and with its defaults.

    Args:
        num_tokens: of the vocabulary; BERT's, cased.
        max_seq_len: tokens of a row.
        enc_dim, enc_depth: width and layers of the encoder, which is also the width of the embedding.
        enc_cross_attn_layers: encoder layers that read the chunk, counted from 1; None is all.
        dec_dim, dec_depth: width and layers of the decoder.
        dec_cross_attn_layers: decoder layers that read neighbours, counted from 1.
        heads, dim_head: of every attention.
        enc_attn_dropout, enc_ff_dropout, dec_attn_dropout, dec_ff_dropout: shares of zeroed weights.
        chunk_size: m.
        pad_id: of padding.
        gated_rmsnorm: norms with a gate.
        use_deepnet: DeepNorm instead of pre-norm.
    """

    num_tokens: int = BERT_VOCABULARY
    max_seq_len: int = 2048
    enc_dim: int = 896
    enc_depth: int = 2
    enc_cross_attn_layers: Sequence[int] | None = None
    dec_dim: int = 768
    dec_depth: int = 12
    dec_cross_attn_layers: Sequence[int] = (1, 3, 6, 9)
    heads: int = 8
    dim_head: int = 64
    enc_attn_dropout: float = 0.0
    enc_ff_dropout: float = 0.0
    dec_attn_dropout: float = 0.0
    dec_ff_dropout: float = 0.0
    chunk_size: int = 64
    pad_id: int = 0
    gated_rmsnorm: bool = False
    use_deepnet: bool = False

    def config(self) -> RetroConfig:
        """The same model in our names; layers are counted from 0 there."""
        encoder_layers = self.enc_cross_attn_layers
        return RetroConfig(
            vocab_size=self.num_tokens,
            max_position_embeddings=self.max_seq_len,
            position_embedding="rotary+learned",
            encoder_hidden_size=self.enc_dim,
            num_encoder_layers=self.enc_depth,
            encoder_cross_attention_layers=None if encoder_layers is None else [n - 1 for n in encoder_layers],
            hidden_size=self.dec_dim,
            num_hidden_layers=self.dec_depth,
            cross_attention_layers=[n - 1 for n in self.dec_cross_attn_layers],
            num_attention_heads=self.heads,
            head_dim=self.dim_head,
            rotary_dim=min(self.dim_head, ROTATED),
            attention_dropout=self.dec_attn_dropout,
            hidden_dropout=self.dec_ff_dropout,
            encoder_attention_dropout=self.enc_attn_dropout,
            encoder_hidden_dropout=self.enc_ff_dropout,
            chunk_size=self.chunk_size,
            pad_token_id=self.pad_id,
            norm="gated_rms" if self.gated_rmsnorm else "layer" if self.use_deepnet else "rms",
            residual="deepnorm" if self.use_deepnet else "prenorm",
            head_bias=True,
        )


class RETRO(nn.Module):
    """A RetroForCausalLM, in `model`, called as the document calls it.

    Args:
        arguments: those of `RetroArguments`.

    Raises:
        TypeError: an argument has another name.
        StrictDataclassError: a size makes no model.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.model = RetroForCausalLM(RetroArguments(**arguments).config())

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.model.config.max_position_embeddings

    @property
    def pad_id(self) -> int:
        """Of padding."""
        return self.model.config.pad_token_id

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""
        return self.model.config.chunk_size

    def forward(self, seq: Tensor, retrieved: Tensor | None = None, return_loss: bool = False) -> Tensor:
        """Logits (batch, tokens, num_tokens), or with `return_loss` the mean loss of all tokens but the first.

        Args:
            seq: (batch, tokens) ids; with `return_loss` one more than the model reads.
            retrieved: (batch, chunks, neighbours, length) ids for the complete chunks of what is read; None: none.
            return_loss: padding is not scored.
        """
        if not return_loss:
            logits: Tensor = self.model(seq, retrieved=retrieved, use_cache=False).logits
            return logits
        hidden = self.model.model(seq[:, :-1], retrieved=retrieved, use_cache=False).last_hidden_state
        targets = seq[:, 1:].masked_fill(seq[:, 1:] == self.pad_id, IGNORED)
        head = self.model.lm_head
        return blocked_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten(), None)


DIABLOGPT = RETRO
