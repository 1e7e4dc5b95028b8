"""A forged config.json runs nothing: every place that loads a model refuses it in one line."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from graft.scripts.generate import main as generate
from graft.scripts.inspect_graph import main as inspect
from graft.scripts.merge import main as merge
from graft.trainer.arguments import ModelArguments
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.kernel_repositories import refuse_kernel_repositories, warn_of_unpinned_code
from graft.trainer.loading import load_config, load_model

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


def test_the_inspection_of_graphs_refuses_it_too(forged, tmp_path, capsys):
    assert inspect([forged("attn_implementation"), "--text", "a text", "--output", str(tmp_path / "page.html")]) == 2
    assert "stranger/kernel" in capsys.readouterr().err


FORGERIES = {
    "code of another repository": {"auto_map": {"AutoModelForCausalLM": "stranger/other--evil.Model"}},
    "code of a path that leaves the folder": {"auto_map": {"AutoModelForCausalLM": "../evil.Model"}},
    "code and trust in it": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True},
    "code of a config": {"auto_map": {"AutoConfig": "evil.Model"}, "model_type": "unheard_of"},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_code_that_a_config_names_does_not_run_without_trust(forged, tmp_path, forgery):
    """A model that transformers knows is loaded as what it is; one that it does not know is refused."""
    folder = Path(forged("ignored"))
    for place in (folder, tmp_path):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FORGERIES[forgery]))
    arguments = ModelArguments(task="causal", name=str(folder))
    if "model_type" in FORGERIES[forgery]:
        with pytest.raises(ConfigurationError, match="cannot be loaded"):
            load_config(arguments)
    else:
        assert type(load_model(arguments, load_config(arguments))) is LlamaForCausalLM
    assert generate([str(folder), "--prompt", "a text", "--max_new_tokens", "2"]) == 2  # there is no tokenizer
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("revision", "warns"), [(None, True), ("main", True), ("0" * 40, False)])
def test_code_that_no_commit_pins_warns(caplog, revision, warns):
    config = LlamaConfig(auto_map={"AutoModelForCausalLM": "code.Model"})
    warn_of_unpinned_code(config, "me/model", revision, True)
    assert ("pin the revision" in caplog.text) == warns
    caplog.clear()
    warn_of_unpinned_code(LlamaConfig(), "me/model", revision, True)  # brings no code
    warn_of_unpinned_code(config, "me/model", revision, False)  # which then does not run
    assert not caplog.records


def test_configs_inside_a_config_are_looked_at():
    outer = AutoConfig.for_model("llava")
    refuse_kernel_repositories(outer, "a folder", False)
    outer.text_config._attn_implementation_internal = "stranger/kernel"
    with pytest.raises(ConfigurationError, match="stranger/kernel"):
        refuse_kernel_repositories(outer, "a folder", False)
