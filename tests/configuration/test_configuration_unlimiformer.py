"""Options of the memory are checked by name, value and range; configs that hold them refuse what they do not know."""

import dataclasses
import json
import logging

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import BartConfig, LlamaConfig, MistralConfig, Qwen3Config, T5Config

from graft.configuration.configuration_unlimiformer import (
    UnlimiformerBartConfig,
    UnlimiformerConfig,
    UnlimiformerLlamaConfig,
    UnlimiformerQwen3Config,
    UnlimiformerT5Config,
)

EXTENDED = {  # the stock config that each of ours extends
    UnlimiformerBartConfig: BartConfig,
    UnlimiformerLlamaConfig: LlamaConfig,
    UnlimiformerQwen3Config: Qwen3Config,
    UnlimiformerT5Config: T5Config,
}
HOLDERS = list(EXTENDED)
REFUSED = (ValueError, TypeError, StrictDataclassError)


@pytest.mark.parametrize("overlap", [1.0, 1, -0.1, 2.5, float("nan"), float("inf")])
def test_overlap_outside_its_range_is_refused_with_the_value(overlap):
    with pytest.raises(REFUSED, match=rf"`overlap` must lie in \[0, 1\), got {overlap}"):
        UnlimiformerConfig(overlap=overlap)


@pytest.mark.parametrize(
    "name", ["keys_per_query", "window", "local_tokens", "reserve", "windows_per_batch", "max_bytes"]
)
@pytest.mark.parametrize("value", [0, -5])
def test_counts_below_one_are_refused_with_name_and_value(name, value):
    with pytest.raises(REFUSED, match=rf"`{name}` must be at least 1, got {value}"):
        UnlimiformerConfig(**{name: value})


WRONG_TYPES = {
    "keys_per_query": [2.5, "all", [3]],
    "window": [2.5, "128", "window"],
    "overlap": ["half", None, [0.5]],
    "store": ["disk", 1, None],
    "first_layer": [1.0, None, "0"],
    "last_layer": [1.5, "all"],
    "heads": [3, "all", [1.5], [None]],
    "exclude_window": ["yes", None],
    "first_step": ["both", None],
    "positions": ["relative", None],
    "local_tokens": [None, 1.5, "all"],
    "sinks": [None, 0.5],
    "reserve": [None, 0.5, "all"],
    "memory_dtype": ["float64", "bf16"],
    "windows_per_batch": [None, "all", 1.5],
    "max_bytes": [1.5, "1GB"],
    "index": ["annoy", None, 1],
    "index_parameters": [{"nprobe": 1.5}, {1: 2}, "nprobe"],
    "index_recall": ["most", [0.9]],
    "index_refine": [1.5, "all"],
    "training": ["oracle", None],
    "memory_gradient": ["yes", None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_values_of_another_type_or_choice_are_refused_with_the_name(name, value):
    with pytest.raises(REFUSED, match=name):
        UnlimiformerConfig(**{name: value})


def test_every_field_is_among_those_whose_types_are_tested():
    assert WRONG_TYPES.keys() == {field.name for field in dataclasses.fields(UnlimiformerConfig)}


@pytest.mark.parametrize("heads", [[], [-1], [0, 0], [2, 1, 2]])
def test_heads_that_are_none_negative_or_repeated_are_refused_with_the_value(heads):
    with pytest.raises(REFUSED, match=r"`heads` must name different heads from 0 on, or be None"):
        UnlimiformerConfig(heads=heads)


@pytest.mark.parametrize(("sinks", "keys_per_query"), [(-1, 4), (5, 4), (-1, None), (-2, "window")])
def test_sinks_that_are_negative_or_more_than_the_keys_are_refused_with_both(sinks, keys_per_query):
    with pytest.raises(
        REFUSED, match=rf"`sinks` must lie in \[0, `keys_per_query`\], got {sinks} of {keys_per_query}"
    ):
        UnlimiformerConfig(sinks=sinks, keys_per_query=keys_per_query)


def test_more_sinks_than_a_given_window_has_keys_are_refused():
    """With "window" a query keeps as many keys as the window has tokens, and sinks are among them."""
    with pytest.raises(REFUSED, match="`sinks`"):
        UnlimiformerConfig(sinks=9, keys_per_query="window", window=8)


def test_a_misspelt_option_is_refused_with_its_name():
    with pytest.raises(TypeError, match="top_k"):
        UnlimiformerConfig(top_k=4)


def test_a_wrong_value_set_later_is_refused_as_one_given_at_the_start():
    config = UnlimiformerConfig()
    with pytest.raises(REFUSED, match="overlap"):
        config.overlap = "half"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keys_per_query": None, "window": 128, "overlap": 0, "store": "hidden"},
        {"keys_per_query": 10**9, "heads": [3, 1], "first_layer": -2, "last_layer": -1, "sinks": 4},
        {"memory_dtype": "bfloat16", "windows_per_batch": 3, "positions": "origin", "first_step": "window"},
    ],
)
def test_options_survive_their_dictionary_and_json(options):
    config = UnlimiformerConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())
    assert UnlimiformerConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_dictionary_of_options_shares_no_list_with_its_config():
    config = UnlimiformerConfig(heads=[1, 2])
    config.to_dict()["heads"].append(3)
    assert config.heads == [1, 2]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    "given", [{"keys_per_query": 7, "heads": [1]}, UnlimiformerConfig(keys_per_query=7, heads=[1])]
)
def test_a_model_config_takes_options_as_a_dictionary_or_an_object(holder, given):
    config = holder(unlimiformer_config=given)
    assert config.unlimiformer_config == UnlimiformerConfig(keys_per_query=7, heads=[1])


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_model_config_without_options_has_the_defaults(holder):
    assert holder().unlimiformer_config == UnlimiformerConfig()
    assert holder().unlimiformer_config is not holder().unlimiformer_config


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_model_config_survives_saving(holder, tmp_path):
    config = holder(unlimiformer_config={"keys_per_query": 7, "memory_dtype": "bfloat16"}, vocab_size=77)
    config.save_pretrained(tmp_path)
    loaded = holder.from_pretrained(tmp_path)
    assert loaded.unlimiformer_config == config.unlimiformer_config
    assert loaded.to_dict() == config.to_dict()
    assert (
        json.loads((tmp_path / "config.json").read_text())["unlimiformer_config"]
        == config.unlimiformer_config.to_dict()
    )


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("given", [{"keys_per_query": 7}, UnlimiformerConfig(keys_per_query=7)])
def test_options_given_while_loading_replace_the_saved_ones(holder, given, tmp_path):
    holder(unlimiformer_config={"keys_per_query": 3}).save_pretrained(tmp_path)
    assert holder.from_pretrained(tmp_path, unlimiformer_config=given).unlimiformer_config == UnlimiformerConfig(
        keys_per_query=7
    )


@pytest.mark.parametrize(("holder", "stock"), EXTENDED.items())
def test_options_given_while_loading_join_a_stock_config(holder, stock, tmp_path):
    stock(vocab_size=77).save_pretrained(tmp_path)
    loaded = holder.from_pretrained(tmp_path, unlimiformer_config={"keys_per_query": 7})
    assert loaded.vocab_size == 77
    assert loaded.unlimiformer_config == UnlimiformerConfig(keys_per_query=7)
    assert loaded.model_type == holder.model_type


@pytest.mark.parametrize(
    ("holder", "other", "warns"),
    [
        *((ours, stock, False) for ours, stock in EXTENDED.items()),
        (UnlimiformerLlamaConfig, MistralConfig, True),
    ],
)
def test_a_checkpoint_of_the_stock_model_causes_no_warning_unlike_a_strangers(
    holder, other, warns, tmp_path, caplog, monkeypatch
):
    other().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    holder.from_pretrained(tmp_path)
    assert ("You are using a model of type" in caplog.text) == warns


@pytest.mark.parametrize("holder", HOLDERS)
def test_unknown_options_in_a_model_config_are_refused_with_those_known(holder):
    with pytest.raises(
        REFUSED, match=r"`unlimiformer_config` has no field \['keys', 'top_k'\]; it has .*keys_per_query"
    ):
        holder(unlimiformer_config={"top_k": 4, "keys": 1})


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("given", [3, "window", [1], LlamaConfig()])
def test_options_of_another_kind_in_a_model_config_are_refused_with_their_type(holder, given):
    with pytest.raises(
        REFUSED, match=rf"`unlimiformer_config` must be an UnlimiformerConfig.*got {type(given).__name__}"
    ):
        holder(unlimiformer_config=given)


@pytest.mark.parametrize("holder", HOLDERS)
def test_options_set_on_a_model_config_later_are_checked_as_well(holder):
    config = holder()
    with pytest.raises(REFUSED, match="top_k"):
        config.unlimiformer_config = {"top_k": 4}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_model_config_says_its_own_model_type(holder):
    assert holder().to_dict()["model_type"] == holder.model_type
    assert holder.model_type.startswith("graft_unlimiformer_")
