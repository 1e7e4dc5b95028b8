"""What all classes with a memory for good do: load stock checkpoints, save, load, copy; Auto classes know them."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig

from graft import (
    UnlimiformerBart,
    UnlimiformerConfig,
    UnlimiformerLlamaForCausalLM,
    UnlimiformerQwen3ForCausalLM,
    UnlimiformerT5ForConditionalGeneration,
    unlimiform,
)

LENGTH = 45
OPTIONS = {"window": 16, "keys_per_query": 4, "local_tokens": 6}
SEVEN_KEYS = {**OPTIONS, "keys_per_query": 7}
PERMANENT = {
    "bart": UnlimiformerBart,
    "llama": UnlimiformerLlamaForCausalLM,
    "qwen3": UnlimiformerQwen3ForCausalLM,
    "t5": UnlimiformerT5ForConditionalGeneration,
}
FAMILIES = pytest.mark.parametrize("family", PERMANENT)


@pytest.fixture
def permanent(tiny):
    """Builds a stock model and a permanent one of the same weights."""

    def build(family, **options):
        return tiny.permanent(family, PERMANENT[family], {**OPTIONS, **options})

    return build


@torch.no_grad()
def logits(model, tiny):
    """Of two long inputs."""
    answers = {"labels": tiny.ids(2, 5, seed=2)} if model.config.is_encoder_decoder else {}
    return model(input_ids=tiny.ids(2, LENGTH), **answers).logits


def auto_class(model):
    return getattr(transformers, model.auto_classes[0])


@pytest.mark.parametrize("given", [SEVEN_KEYS, UnlimiformerConfig(**SEVEN_KEYS)])
@FAMILIES
def test_a_stock_checkpoint_loads_unchanged_with_options_as_dictionary_or_object(
    permanent, tiny, tmp_path, family, given
):
    stock, expected = permanent(family, keys_per_query=7)
    stock.save_pretrained(tmp_path)
    options = {"unlimiformer_config": given, "output_loading_info": True}
    model, report = PERMANENT[family].from_pretrained(tmp_path, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.unlimiformer_config == UnlimiformerConfig(**SEVEN_KEYS)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, tiny), logits(expected, tiny))


@pytest.mark.parametrize("through", ["class", "auto"])
@FAMILIES
def test_a_saved_model_gives_the_same_logits_and_tokens(permanent, tiny, tmp_path, family, through):
    _, model = permanent(family, first_layer=1)
    model.save_pretrained(tmp_path)
    loaded = (type(model) if through == "class" else auto_class(model)).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.unlimiformer_config == model.config.unlimiformer_config
    assert torch.equal(logits(loaded, tiny), logits(model, tiny))
    ids = tiny.ids(2, LENGTH)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))


@FAMILIES
def test_the_auto_classes_know_the_config_and_the_model(permanent, family):
    _, model = permanent(family)
    config = AutoConfig.for_model(model.config.model_type, unlimiformer_config=OPTIONS)
    assert type(config) is type(model.config)
    assert type(auto_class(model).from_config(model.config)) is type(model)


@FAMILIES
def test_weights_saved_by_ours_load_into_the_stock_model(permanent, tmp_path, family):
    stock, model = permanent(family)
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in again.state_dict().items())


@FAMILIES
def test_a_deep_copy_reads_by_itself(permanent, tiny, family):
    _, model = permanent(family)
    twin, expected = copy.deepcopy(model), logits(model, tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, tiny), expected)
    twin.set_attn_implementation("eager")
    torch.testing.assert_close(logits(twin, tiny), expected, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_a_second_memory_on_a_permanent_class_is_refused(permanent, family):
    with pytest.raises(RuntimeError, match="has a memory already"):
        unlimiform(permanent(family)[1], UnlimiformerConfig(**OPTIONS))
