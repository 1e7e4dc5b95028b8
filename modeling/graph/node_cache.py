"""The states of earlier tokens' nodes in a generation's cache: rows of a causal graph never change."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..cache_layers import CacheLayerWrapper, innermost, wrap_innermost, wrappers_of


class NodeCacheLayer(CacheLayerWrapper):
    """Keys, values, and what tokens send to later ones in one decoder layer.

    `nodes`: by graph layer, or by what is sent, (batch, ..., source, width).
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.nodes: dict[int | str, Tensor] = {}

    def append_nodes(self, depth: int | str, nodes: Tensor) -> Tensor:
        """Take in new nodes (batch, ..., new, width) of graph layer `depth`; return them behind all earlier ones.

        Raises:
            RuntimeError: earlier nodes have another width, so they are another network's.
        """
        known = self.nodes.get(depth)
        if known is not None and known.shape[-1] != nodes.shape[-1]:
            raise RuntimeError(
                f"The cache holds nodes of width {known.shape[-1]}, this graph network's have {nodes.shape[-1]}: it "
                "was filled by another one. Give a fresh cache."
            )
        self.nodes[depth] = nodes if known is None else torch.cat([known, nodes], dim=-2)
        return self.nodes[depth]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.inner.get_seq_length()  # what the argument means differs between versions; the outcome does not
        self.nodes = {depth: nodes[..., :length, :] for depth, nodes in self.nodes.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.nodes = {depth: nodes.index_select(0, beam_idx.to(nodes.device)) for depth, nodes in self.nodes.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.nodes = {depth: nodes[indices.to(nodes.device)] for depth, nodes in self.nodes.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.nodes = {depth: nodes.repeat_interleave(repeats, dim=0) for depth, nodes in self.nodes.items()}

    def reset(self) -> None:
        super().reset()
        if self.inner.get_seq_length():  # before 5.24, a dynamic layer keeps its length and its states turn 0
            self.nodes = {depth: torch.zeros_like(nodes) for depth, nodes in self.nodes.items()}
        else:
            self.nodes = {}

    def offload(self) -> None:
        super().offload()
        self.nodes = {depth: nodes.to("cpu", non_blocking=True) for depth, nodes in self.nodes.items()}

    def prefetch(self) -> None:
        super().prefetch()
        if self.inner.is_initialized:
            self.nodes = {depth: nodes.to(self.inner.device) for depth, nodes in self.nodes.items()}


def node_cache_layer(cache: Cache, index: int, may_slide: bool = False) -> NodeCacheLayer:
    """The node layer of `cache` for decoder layer `index`; its innermost layer is wrapped when first asked for.

    Args:
        may_slide: whether the layer may forget all but a window of keys. The nodes of all tokens are kept.

    Raises:
        RuntimeError: the cache holds tokens whose nodes are unknown.
        ValueError: the layer is not dynamic.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    for wrapper in wrappers_of(cache.layers[index]):
        if isinstance(wrapper, NodeCacheLayer):
            return wrapper
    layer = innermost(cache.layers[index])
    if not isinstance(layer, DynamicLayer) or (layer.is_sliding and not may_slide):
        raise ValueError(
            f"The sparse graph network needs a dynamic cache that keeps all tokens, got a {type(layer).__name__}."
        )
    if layer.get_seq_length():
        raise RuntimeError(
            f"The cache holds {layer.get_seq_length()} tokens that this model's graph layers have not seen: give a "
            "fresh cache."
        )
    return wrap_innermost(cache.layers, index, NodeCacheLayer)
