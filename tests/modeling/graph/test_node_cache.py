"""Nodes follow every operation on the cache that holds them."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

from graft.modeling.cache_layers import CacheLayerWrapper
from graft.modeling.graph.node_cache import NodeCacheLayer, node_cache_layer


def filled(length=5, batch=2):
    cache = DynamicCache()
    layer = node_cache_layer(cache, 1)
    states = torch.arange(batch * length, dtype=torch.float32).view(batch, 1, length, 1)
    for index in range(2):
        cache.update(states, states, index)
    layer.append_nodes(0, states[:, 0])
    layer.append_nodes(1, -states[:, 0])
    return cache, layer


def agree(cache):
    """Whether nodes and keys, which begin as the same numbers, still are."""
    layer = cache.layers[1]
    if not layer.get_seq_length():  # reset
        return layer.nodes == {}
    return torch.equal(layer.nodes[0], layer.keys[:, 0]) and torch.equal(layer.nodes[1], -layer.keys[:, 0])


OPERATIONS = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "reset": lambda cache: cache.reset(),
    "offload": lambda cache: [cache.layers[1].offload(), cache.layers[1].prefetch()],
    "nothing": lambda cache: None,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nodes_follow_the_cache(operation):
    cache, layer = filled()
    OPERATIONS[operation](cache)
    assert cache.layers[1] is layer
    assert agree(cache)


def test_nodes_are_appended_by_graph_layer():
    _, layer = filled()
    joined = layer.append_nodes(1, torch.ones(2, 1, 1))
    assert (joined.shape, layer.nodes[0].shape) == ((2, 6, 1), (2, 5, 1))


def test_a_layer_is_wrapped_once_and_found_below_other_wrappers():
    cache, layer = filled()
    assert node_cache_layer(cache, 1) is layer
    cache.layers[1] = CacheLayerWrapper(layer)
    assert node_cache_layer(cache, 1) is layer
    assert isinstance(layer, NodeCacheLayer)


def test_a_cache_with_tokens_of_unknown_nodes_is_refused():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    with pytest.raises(RuntimeError, match="holds 3 tokens that this model's graph layers have not seen"):
        node_cache_layer(cache, 0)


def test_caches_that_do_not_keep_all_tokens_or_have_a_fixed_room_are_refused():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    static = StaticCache(LlamaConfig(**sizes), max_cache_len=8)
    sliding = DynamicCache(config=MistralConfig(**sizes, sliding_window=4))
    for cache, name in ((static, "StaticLayer"), (sliding, "DynamicSlidingWindowLayer")):
        with pytest.raises(ValueError, match=f"needs a dynamic cache that keeps all tokens, got a {name}"):
            node_cache_layer(cache, 0)
