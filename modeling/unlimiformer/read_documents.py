"""Documents as they are given become a memory: checked, weighed against the budget, read, put behind what is there."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...configuration.configuration_unlimiformer import UnlimiformerConfig
from ..attachment import device_of
from .append_to_memory import check_appendable, grown, joined
from .families import encoder_width, has_scaled_positions, key_rotations, model_shape, trained_positions
from .given_documents import Padded, global_tokens, with_prefixes
from .index_recall import indexed
from .key_index import check_index
from .memory import Memory
from .memory_attentions import memory_attentions
from .memory_size import MemorySize, check_budget, memory_size, resolve_window
from .model_fingerprint import model_fingerprint
from .remember import (
    Documents,
    check_weights_in_place,
    real_tokens,
    remember_decoded,
    remember_encoded,
    stores_keys,
    vocabulary_size,
)


def remember(
    model: PreTrainedModel,
    config: UnlimiformerConfig,
    documents: Padded,
    progress: bool = False,
    prefix: tuple[Tensor | None, Tensor | None] = (None, None),
    global_attention_mask: Tensor | None = None,
) -> Memory:
    """Read documents with a model whose attention is served; `prefix` is as `documents`, one for each, or no ids."""
    check_weights_in_place(model)
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    real = Documents(ids, lengths, global_tokens=global_tokens(model, documents, global_attention_mask))
    prefix_ids, prefix_mask = prefix
    if prefix_ids is not None:
        window = resolve_window(model.config, config)
        tokens = real_tokens(prefix_ids, prefix_mask, vocabulary_size(model), "prefix_ids")
        real = with_prefixes(model, window, real, tokens)
    elif prefix_mask is not None:
        raise ValueError("`prefix_mask` says which of `prefix_ids` are real, but `prefix_ids` is None.")
    _check_index(model, config, real)
    return indexed(model, _read(model, config, real, progress), progress)


def append(
    model: PreTrainedModel,
    memory: Memory,
    config: UnlimiformerConfig,
    documents: Padded,
    progress: bool = False,
    global_attention_mask: Tensor | None = None,
) -> Memory:
    """The memory of what `memory` holds with `documents` behind it, one for each of its rows."""
    check_weights_in_place(model)
    check_appendable(memory, config, resolve_window(model.config, config), model_fingerprint(model))
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    more_global = global_tokens(model, documents, global_attention_mask)
    both = grown(memory, (ids.to(memory.input_ids.device), lengths), more_global)
    rotations = {} if memory.is_encoder_decoder else key_rotations(model)
    _check_index(model, memory.config, both)
    return indexed(model, joined(memory, _read(model, config, both, progress), both, rotations), progress)


def size_of(model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents) -> MemorySize:
    """What remembering `documents` will cost, adapters included."""
    return memory_size(model.config, documents, config, model.dtype, _keeps_keys(model, config))


def _check_index(model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents) -> None:
    """Refuse an index that cannot be built over these documents before they are read."""
    shape, keeps_keys = model_shape(model.config), _keeps_keys(model, config)
    dim = shape.head_dim if keeps_keys else encoder_width(model.config)
    check_index(config, resolve_window(model.config, config), documents.lengths.tolist(), dim)


def _keeps_keys(model: PreTrainedModel, config: UnlimiformerConfig) -> bool:
    return not model.config.is_encoder_decoder or stores_keys(config, memory_attentions(model, config)[0])


@torch.no_grad()
def _read(model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool) -> Memory:
    return read_documents(model, config, documents, progress)


def read_documents(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Documents, progress: bool = False
) -> Memory:
    """Read documents in windows, with gradient where it is enabled; `model` must be one whose attention is served."""
    window, encodes = resolve_window(model.config, config), bool(model.config.is_encoder_decoder)
    if config.max_bytes is not None:
        check_budget(size_of(model, config, documents), config, _keeps_keys(model, config), encodes)
    if encodes:
        return remember_encoded(model, memory_attentions(model, config)[0], config, window, documents, progress)
    trained, longest = trained_positions(model.config, "decoder") or 0, int(documents.lengths.max())
    if config.positions == "true" and longest > trained and not has_scaled_positions(model.config):
        raise ValueError(
            f'`positions` "true" places {longest} tokens, and the model was trained on {trained}: '
            'use "squeeze" or "origin".'
        )
    return remember_decoded(model, config, window, documents, progress)


def split_documents(
    model: PreTrainedModel, config: UnlimiformerConfig, documents: Padded, progress: bool = False
) -> tuple[Memory | None, Tensor, Tensor]:
    """Split each row of a decoder's input into a memory and the last `local_tokens`.

    Returns:
        The memory, None if no row is longer than `local_tokens`; the local tokens (rows, at most local_tokens),
        left-padded, and their mask.

    Raises:
        ValueError: some rows are longer than `local_tokens` and some are not.
    """
    ids, lengths = real_tokens(*documents, vocabulary_size(model))
    local = lengths.clamp(max=config.local_tokens)
    before = lengths - local
    device = device_of(model)
    ids = ids.to(device)
    width = int(local.max())
    columns = torch.arange(width) + (lengths - width)[:, None]
    mask = (torch.arange(width) >= (width - local)[:, None]).to(device, torch.long)
    question = ids.gather(1, columns.clamp(min=0).to(device)) * mask
    if int(before.max()) == 0:
        return None, question, mask
    if int(before.min()) == 0:
        raise ValueError(
            f"`input_ids` holds a document of {int(lengths.min())} tokens, no longer than `local_tokens` "
            f"{config.local_tokens}, beside one of {int(lengths.max())}: give them in separate calls."
        )
    longest = int(before.max())
    kept = (torch.arange(longest) < before[:, None]).to(device, torch.long)
    return remember(model, config, (ids[:, :longest], kept), progress), question, mask
