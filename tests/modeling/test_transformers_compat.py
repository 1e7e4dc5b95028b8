"""The cache reaches the model's forward under whatever name this transformers has for it."""

import pytest
import torch
from packaging.version import Version
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    __version__,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from graft.modeling.transformers_compat import (
    ASSISTED_SINCE,
    ASSISTS_FROM_A_CACHE,
    CACHE_ARGUMENT,
    cache_argument,
    cache_of,
    take_cache,
    without_cache,
)

WIDTHS = {"vocab_size": 61, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def decoder():
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **WIDTHS)
    return LlamaForCausalLM(config).eval()


def encoder_decoder():
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(d_model=16, **sizes, **heads, **WIDTHS)).eval()


def spy(module, seen):
    """Note the cache that every call of `module` receives."""
    return module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(cache_of(kwargs)), with_kwargs=True)


def test_the_body_and_every_attention_of_a_decoder_receive_the_cache_it_was_given():
    model, cache, seen = decoder(), DynamicCache(), []
    for module in (model, model.model, *(layer.self_attn for layer in model.model.layers)):
        spy(module, seen)
    model(input_ids=torch.tensor([[5, 6, 7]]), **cache_argument(cache))
    assert len(seen) == 4
    assert all(each is cache for each in seen)
    assert cache.get_seq_length() == 3


def test_every_step_of_generate_receives_the_cache_it_was_given():
    model, cache, seen = decoder(), DynamicCache(), []
    spy(model.model, seen)
    model.generate(torch.tensor([[5, 6, 7]]), **cache_argument(cache), max_new_tokens=3, min_new_tokens=3)
    assert len(seen) == 3
    assert all(each is cache for each in seen)


def test_the_decoder_and_every_cross_attention_of_an_encoder_decoder_receive_the_cache_it_was_given():
    model, cache, seen = encoder_decoder(), EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    decoder_layers = model.model.decoder.layers
    for module in (model, model.model.decoder, *(layer.encoder_attn for layer in decoder_layers)):
        spy(module, seen)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, decoder_input_ids=ids, use_cache=True, **cache_argument(cache))
    assert len(seen) == 4
    assert all(each is cache for each in seen)


def test_the_cache_goes_by_a_name_that_this_version_takes_without_a_warning(recwarn):
    decoder()(input_ids=torch.tensor([[5]]), **cache_argument(DynamicCache()))
    assert not [each for each in recwarn if CACHE_ARGUMENT in str(each.message)]
    assert Version("5.24") > Version(__version__) or CACHE_ARGUMENT == "cache"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_and_taken_under_either_name(name):
    cache = DynamicCache()  # empty, so false where its length is asked
    arguments = {name: cache, "use_cache": True}
    assert cache_of(arguments) is cache
    assert take_cache(arguments) is cache
    assert arguments == {"use_cache": True}


def test_no_cache_is_none_and_both_names_are_taken():
    assert cache_of({"cache": None}) is None
    assert take_cache({}) is None
    cache, arguments = DynamicCache(), {"cache": None, "past_key_values": None}
    assert take_cache(arguments) is None
    assert arguments == {}
    assert cache_of({"cache": None, "past_key_values": cache}) is cache


def test_an_output_without_its_cache_keeps_everything_else():
    model, ids = decoder(), torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids, use_cache=True, output_hidden_states=True, labels=ids)
    less = without_cache(output)
    assert isinstance(less, CausalLMOutputWithPast)
    assert set(output) - set(less) == {CACHE_ARGUMENT} & set(output)
    assert cache_of(dict(less)) is None
    assert less.logits is output.logits
    as_tuple = model(input_ids=ids, return_dict=False)
    assert without_cache(as_tuple) is as_tuple


def test_assisted_decoding_from_a_cache_is_allowed_from_the_named_version_on():
    assert (Version(__version__) >= Version(ASSISTED_SINCE)) == ASSISTS_FROM_A_CACHE
