"""A forged config.json runs nothing: every place that loads a model refuses it in one line."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from graft.scripts.generate import main as generate
from graft.scripts.merge import main as merge
from graft.trainer.arguments import ModelArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import refuse_kernel_repositories
from graft.trainer.loading import load_config

KEYS = ["attn_implementation", "_attn_implementation"]


@pytest.fixture
def forged(tmp_path):
    """A function that saves a tiny Llama whose config.json names a repository under a key, and returns the folder."""

    def forge(key):
        config = LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: "stranger/kernel"}))
        return str(tmp_path / "model")

    return forge


@pytest.mark.parametrize("key", KEYS)
def test_a_run_refuses_a_forged_config_before_a_model_is_made(forged, key):
    folder = forged(key)
    with pytest.raises(ConfigurationError, match="'stranger/kernel', a repository whose code would run"):
        load_config(ModelArguments(task="causal", name=folder))
    assert load_config(ModelArguments(task="causal", name=folder), trust_remote_code=True) is not None


def test_the_commands_refuse_it_too(forged, tmp_path, capsys):
    folder = forged("attn_implementation")
    assert generate([folder, "--prompt", "a text", "--max_new_tokens", "2"]) == 2
    assert "stranger/kernel" in capsys.readouterr().err
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert merge([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", folder]) == 2
    assert "stranger/kernel" in capsys.readouterr().err


def test_configs_inside_a_config_are_looked_at():
    outer = AutoConfig.for_model("llava")
    refuse_kernel_repositories(outer, "a folder", False)
    outer.text_config._attn_implementation_internal = "stranger/kernel"
    with pytest.raises(ConfigurationError, match="stranger/kernel"):
        refuse_kernel_repositories(outer, "a folder", False)
