"""What happens before each forward pass of a retro-fitted model: it is told what it will read.

A pre-hook of the model takes `retrieved` out of its keywords, or asks the retriever that travels in the cache when a
chunk is complete, and puts the pass's ForwardRetrieval into a keyword. Without either, the model is called as it was.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..attachment import Attachment
from ..cache_layers import CacheLayerWrapper, wrappers_of
from ..residual_tap import tap_residual, tappable_layers
from ..transformers_compat import CACHE_ARGUMENT, cache_of, take_cache
from .retrieval_cache import OpenChunk, RetrievalCacheLayer, retrieval_layers
from .retrieval_pass import begin_pass, is_packed
from .retriever import Retriever, retrieve_completed
from .retrofit_adapter import KEYWORD, ForwardRetrieval, RetroFitAdapter


class RetrieverLayer(CacheLayerWrapper):
    """A cache layer that says whom a generation asks for neighbours."""

    def __init__(self, inner: Any, retriever: Retriever) -> None:
        super().__init__(inner)
        self.retriever = retriever


def reads_neighbours(cache: Any) -> bool:
    """Whether a cache has retrieval layers."""
    layers = getattr(cache, "layers", ())
    return any(isinstance(wrapper, RetrievalCacheLayer) for layer in layers for wrapper in wrappers_of(layer))


def retriever_of(cache: Any) -> Retriever | None:
    """Whom the generation of `cache` asks, if anyone."""
    for layer in getattr(cache, "layers", ()):
        for wrapper in wrappers_of(layer):
            if isinstance(wrapper, RetrieverLayer):
                return wrapper.retriever
    return None


class RetrievalHook:
    """The pre-hook of one model.

    Args:
        adapter: the new weights.
        model: the decoder they are for.
        is_active: whether the adapter is to be used now.
    """

    def __init__(self, adapter: RetroFitAdapter, model: PreTrainedModel, is_active: Callable[[], bool]) -> None:
        self.adapter, self.is_active = adapter, is_active
        self.names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return new arguments of the model, or None to leave them.

        Raises:
            TypeError, ValueError: `retrieved`, what the retriever returned, or the cache does not fit.
        """
        if not self.is_active():
            return None
        kwargs = dict(kwargs)
        retrieved = kwargs.pop("retrieved", None)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if retrieved is None and not reads_neighbours(cache_of(given)):
            return args, kwargs
        if given.get("input_ids") is None:
            raise ValueError("`input_ids` must be given to retrieve: chunks are made of tokens, not `inputs_embeds`.")
        cache = self._cache(model, given, kwargs)
        kwargs[KEYWORD] = self._begin(model, given, cache, retrieved)
        return args, kwargs

    def _begin(
        self, model: PreTrainedModel, given: dict[str, Any], cache: Cache | None, retrieved: Tensor | None
    ) -> ForwardRetrieval:
        config, ids = self.adapter.config, given["input_ids"]
        layers = None if cache is None else retrieval_layers(cache, config.cross_attention_layers, config.chunk_size)
        chunk = None if layers is None else next(iter(layers.values())).chunk
        masks = _local_mask(given.get("attention_mask"), ids, chunk), given.get("position_ids")
        retriever = retriever_of(cache)
        if retrieved is None and retriever is not None:
            retrieved = retrieve_completed(retriever, config, ids, masks, chunk)
        reading = begin_pass(config, ids, masks, retrieved, layers)
        if self.adapter.training != model.training:  # where the adapter is no part of the model
            self.adapter.train(model.training)
        return ForwardRetrieval(self.adapter, model.get_input_embeddings(), reading, layers)

    def _cache(self, model: PreTrainedModel, given: dict[str, Any], kwargs: dict[str, Any]) -> Cache | None:
        """The cache of this pass: the one given, or made here where the model would make one.

        None is made for packed rows, whose documents a base finds only without a cache, and while training, which
        has no use for it. Where layers are checkpointed the base drops any: computed again, they would complete
        chunks again.
        """
        first = tappable_layers(model)[self.adapter.config.cross_attention_layers[0]]
        if first.gradient_checkpointing and model.training and torch.is_grad_enabled():
            return None
        cache: Cache | None = cache_of(given)
        if cache is not None:
            return cache
        if given.get("use_cache") is None:
            packed = is_packed(given.get("attention_mask"), given.get("position_ids"))
            kwargs["use_cache"] = bool(model.config.use_cache) and not model.training and not packed
        if not kwargs.get("use_cache", given.get("use_cache")):
            return None
        take_cache(kwargs)
        kwargs[CACHE_ARGUMENT] = DynamicCache(config=model.config)
        return kwargs[CACHE_ARGUMENT]


def _local_mask(mask: Any, ids: Tensor, chunk: OpenChunk | None) -> Tensor | None:
    """The columns of a mask that stand for tokens, without those of a memory in front of them.

    Masks that `generate` prepared for a static cache stay as they are: the positions tell what is padding then. Where
    layers differ there is one for each kind, by name; any will do.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None or mask.dim() != 2:
        return mask
    columns: Tensor = mask[:, mask.shape[1] - ids.shape[1] - (0 if chunk is None else chunk.past) :]
    return columns


def has_retrieval(model: nn.Module) -> bool:
    """Whether a model is retro-fitted."""
    return any(isinstance(hook, RetrievalHook) for hook in model._forward_pre_hooks.values())


def install_retrieval(
    attachment: Attachment, model: PreTrainedModel, adapter: RetroFitAdapter, is_active: Callable[[], bool]
) -> None:
    """Let `model` read neighbours with `adapter` until `attachment` is removed."""
    for index in adapter.config.cross_attention_layers:
        tap_residual(attachment, model, index, partial(adapter.read, index))  # copied with a copy of the model
    attachment.before(model, RetrievalHook(adapter, model, is_active))
