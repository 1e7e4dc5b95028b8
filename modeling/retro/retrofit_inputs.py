"""What a retro-fitted model's `generate` is given: tokens, and a cache that says whom to ask for neighbours."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..transformers_compat import cache_argument, take_cache
from .retrieval_cache import retrieval_layers
from .retriever import Retriever, check_retriever
from .retrofit_adapter import RetroFitAdapter
from .retrofit_hook import RetrieverLayer


def retrieval_inputs(
    model: PreTrainedModel,
    adapter: RetroFitAdapter,
    tokens: tuple[Tensor, Tensor | None],
    retriever: Retriever | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of `model.generate` whose cache says whom to ask; see `RetroFit.inputs`.

    Raises:
        TypeError: `others` has what is neither a cache nor `position_ids`.
    """
    input_ids, attention_mask = tokens
    cache: Cache | None = take_cache(others)
    if unknown := sorted(set(others) - {"position_ids"}):
        raise TypeError(f"`inputs` takes tokens, a retriever, a cache and `position_ids`, got {unknown}.")
    if input_ids.dim() != 2:
        raise ValueError(f"`input_ids` must be (batch, prompt), got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
    check_retriever(retriever)
    if retriever is None:
        return inputs | ({} if cache is None else cache_argument(cache))
    cache = DynamicCache(config=model.config) if cache is None else cache
    layers = adapter.config.cross_attention_layers
    retrieval_layers(cache, layers, adapter.config.chunk_size)
    cache.layers[layers[0]] = RetrieverLayer(cache.layers[layers[0]], retriever)
    return inputs | cache_argument(cache)
