import pytest
from huggingface_hub.errors import StrictDataclassError

from graft.configuration.configuration_retro import RetroConfig

WRONG = {
    "chunk_size": ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
    "neighbour_length": ({"neighbour_length": 0}, "`neighbour_length` must be at least 1, got 0"),
    "a layer too many": ({"num_hidden_layers": 6, "cross_attention_layers": [1, 6]}, r"in \[0, 6\) .*got \[1, 6\]"),
    "a layer twice": ({"cross_attention_layers": [1, 1]}, r"`cross_attention_layers` must name different layers"),
    "no layer": ({"cross_attention_layers": []}, "`cross_attention_layers` must name at least one"),
    "an encoder layer too many": ({"encoder_cross_attention_layers": [2]}, "`encoder_cross_attention_layers` must"),
    "rotary_dim odd": ({"rotary_dim": 7}, "`rotary_dim` must be even and at most `head_dim` 64, got 7"),
    "rotary_dim too wide": ({"rotary_dim": 66}, "`rotary_dim` must be even and at most `head_dim` 64, got 66"),
    "tied widths": (
        {"tie_word_embeddings": True, "encoder_hidden_size": 96},
        "`tie_word_embeddings` needs `encoder_hidden_size` 96 equal to `hidden_size` 768",
    ),
    "shared heads": ({"num_key_value_heads": 5}, "`num_key_value_heads` must divide `num_attention_heads` 12, got 5"),
    "dropout": ({"attention_dropout": 1.0}, r"`attention_dropout` must lie in \[0, 1\), got 1.0"),
    "padding": ({"pad_token_id": 32000}, r"`pad_token_id` must lie in \[0, vocab_size 32000\)"),
    "retriever": ({"retriever": {"code": "x"}}, "`retriever` holds names of .*got .'code'."),
    "rope": ({"rope": "linear"}, "rope"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_makes_no_model_is_refused(case):
    fields, message = WRONG[case]
    with pytest.raises(StrictDataclassError, match=message):
        RetroConfig(**fields)


def test_a_misspelt_field_is_refused():
    with pytest.raises(ValueError, match="no field `neighbor_length`; did you mean `neighbour_length`"):
        RetroConfig(neighbor_length=12)


def test_widths_that_are_not_given_follow_from_the_others():
    config = RetroConfig(hidden_size=96, num_attention_heads=6, encoder_hidden_size=32, chunk_size=8)
    assert (config.head_dim, config.num_key_value_heads, config.rotary_dim) == (16, 6, 16)
    assert (config.intermediate_size, config.encoder_intermediate_size, config.neighbour_length) == (384, 128, 16)
    assert config.encoder_cross_attention_layers == [0, 1]


def test_a_config_is_itself_after_saving(tmp_path):
    config = RetroConfig(chunk_size=8, retriever={"corpus": "docs", "embedder": "minilm"}, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    assert RetroConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
