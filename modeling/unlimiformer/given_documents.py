"""What may be given beside the tokens of documents: a prefix of every window, and tokens with global attention."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import encoder_decoder_family
from .remember import Documents, joined_rows, real_tokens

Padded = tuple[Tensor, Tensor | None]
"""Ids (documents, longest), padded on either side, and their mask or None."""


def check_global(model: PreTrainedModel, global_attention_mask: Tensor | None) -> None:
    """Refuse global attention for an encoder that has none, or for a decoder."""
    encodes = model.config.is_encoder_decoder
    if global_attention_mask is not None and not (encodes and encoder_decoder_family(model.config).has_global_tokens):
        raise ValueError(
            f"`global_attention_mask` is for LED, whose encoder has global attention; {type(model).__name__} has none."
        )


def global_tokens(model: PreTrainedModel, documents: Padded, global_attention_mask: Tensor | None) -> Tensor | None:
    """Which real tokens have global attention, placed as `real_tokens` places their ids."""
    check_global(model, global_attention_mask)
    if global_attention_mask is None:
        return None
    ids, mask = documents
    if global_attention_mask.shape != ids.shape:
        raise ValueError(
            f"`global_attention_mask` must have the shape of `input_ids`, {tuple(ids.shape)}, got "
            f"{tuple(global_attention_mask.shape)}."
        )
    return real_tokens((global_attention_mask > 0).long(), mask, 2)[0].bool()


def with_prefixes(
    model: PreTrainedModel, window: int, documents: Documents, prefix: tuple[Tensor, Tensor]
) -> Documents:
    """The documents, each behind its prefix, which every window will repeat."""
    ids, lengths = prefix
    if not model.config.is_encoder_decoder:
        raise ValueError(
            "`prefix_ids` needs an encoder; a decoder is asked behind its memory, with `inputs(question)`."
        )
    if len(ids) != len(documents.ids):
        raise ValueError(f"`prefix_ids` must have a row for each of {len(documents.ids)} documents, got {len(ids)}.")
    if int(lengths.max()) >= window:
        raise ValueError(
            f"`prefix_ids` has {int(lengths.max())} tokens, and a window {window}: it must also hold some document."
        )
    both = (lengths, documents.lengths)
    seen = documents.global_tokens
    return Documents(
        joined_rows(ids, documents.ids, both),
        lengths + documents.lengths,
        tuple(lengths.tolist()),
        global_tokens=None if seen is None else joined_rows(torch.ones_like(ids, dtype=torch.bool), seen, both),
    )
