"""A wrapping cache layer is the layer it wraps, in every operation and for every model that uses it."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from graft.modeling.cache_layers import CacheLayerWrapper
from graft.modeling.transformers_compat import CACHE_ARGUMENT, cache_argument

WIDTHS = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}


def tiny_model(sliding=False):
    torch.manual_seed(0)
    if sliding:
        return MistralForCausalLM(MistralConfig(**WIDTHS, **HEADS, sliding_window=4)).eval()
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, **HEADS)).eval()


class MarkedLayer(CacheLayerWrapper):
    """A wing's layer with a tensor of its own."""

    def __init__(self, inner, mark):
        super().__init__(inner)
        self.mark = mark


def wrap(cache, times=1):
    for _ in range(times):
        cache.layers = [MarkedLayer(layer, i) for i, layer in enumerate(cache.layers)]
    return cache


CACHES = {
    "dynamic": (lambda model: DynamicCache(config=model.config), False),
    "sliding": (lambda model: DynamicCache(config=model.config), True),
    "static": (lambda model: StaticCache(config=model.config, max_cache_len=24), False),
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_wrapped_cache_generates_what_the_cache_generates(kind, beams, times):
    make, sliding = CACHES[kind]
    model, ids = tiny_model(sliding), torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    expected = model.generate(ids, **cache_argument(make(model)), **options)
    found = model.generate(ids, **cache_argument(wrap(make(model), times)), **options)
    assert torch.equal(found, expected)


def filled(layer):
    layer.update(*torch.arange(2 * 3 * 2 * 6 * 4).view(2, 3, 2, 6, 4).float())
    return layer


INNER = {"dynamic": DynamicLayer, "sliding": lambda: DynamicSlidingWindowLayer(sliding_window=4)}


@pytest.mark.parametrize("kind", INNER)
def test_every_public_attribute_of_a_layer_is_answered_as_the_layer_answers(kind):
    inner = filled(INNER[kind]())
    wrapper = MarkedLayer(inner, 0)
    for name in dir(inner):
        if name.startswith("_") or callable(getattr(inner, name)):
            continue
        found, expected = getattr(wrapper, name), getattr(inner, name)
        assert found is expected or found == expected, name


@pytest.mark.parametrize("kind", INNER)
def test_every_public_method_of_a_layer_is_passed_on_and_not_inherited(kind):
    """A method that a wrapper inherits from transformers would work on keys of its own, which it has none of."""
    for name in dir(INNER[kind]()):
        if not name.startswith("_") and hasattr(CacheLayerMixin, name) and callable(getattr(CacheLayerMixin, name)):
            assert name in vars(CacheLayerWrapper), name


@pytest.mark.parametrize("kind", INNER)
def test_sizes_and_lengths_are_those_of_the_layer(kind):
    inner, wrapper = filled(INNER[kind]()), MarkedLayer(filled(INNER[kind]()), 0)
    assert wrapper.get_seq_length() == inner.get_seq_length()
    for length in (1, 2, 5):
        assert wrapper.get_mask_sizes(length) == inner.get_mask_sizes(length)


def test_tensors_set_through_a_wrapper_are_the_layers():
    wrapper = MarkedLayer(filled(DynamicLayer()), 0)
    wrapper.keys = wrapper.values = torch.zeros(1, 2, 3, 4)
    assert wrapper.inner.keys.shape == wrapper.inner.values.shape == (1, 2, 3, 4)


def test_a_deep_copy_of_a_wrapper_shares_no_tensor_and_keeps_its_own_ones():
    wrapper = MarkedLayer(filled(DynamicLayer()), torch.ones(2))
    twin = copy.deepcopy(wrapper)
    twin.keys.zero_()
    twin.mark.zero_()
    assert wrapper.keys.abs().sum() > 0
    assert wrapper.mark.sum() == 2


def test_an_attribute_that_neither_has_is_missed_by_name():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = MarkedLayer(DynamicLayer(), 0).no_such_thing


def test_a_wrapper_shows_what_it_wraps():
    assert repr(MarkedLayer(MarkedLayer(DynamicLayer(), 0), 1)).startswith("MarkedLayer(MarkedLayer(")


def test_a_wrapped_cache_is_returned_by_the_model_that_filled_it():
    model, cache = tiny_model(), wrap(DynamicCache(config=tiny_model().config))
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[5, 6, 7]]), **cache_argument(cache))
    assert output[CACHE_ARGUMENT] is cache
    assert [layer.mark for layer in cache.layers] == [0, 1]
    assert cache.get_seq_length() == 3
