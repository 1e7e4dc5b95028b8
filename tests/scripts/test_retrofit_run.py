"""`adapter.type` "retrofit" of scripts/run.py: a tiny Llama learns to read neighbours, is saved, loaded, resumed."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import graft.registration  # noqa: F401
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.scripts.run import main

OPTIONS = {"chunk_size": 8, "cross_attention_layers": [1], "num_encoder_layers": 1}


@pytest.fixture
def make_config(corpora, tmp_path, write_short_run):
    """A function that writes a tiny Llama and a configuration with these blocks changed, None for no block."""

    def write(**changes) -> str:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes, **special))
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(corpora / "corpus" / "tokenizer").save_pretrained(tmp_path / "model")
        blocks = {
            "model": {"task": "causal", "name": str(tmp_path / "model")},
            "adapter": {"type": "retrofit", "options": OPTIONS},
            "data": {"train": str(corpora / "corpus"), "validation": str(corpora / "held-out")},
            "retrieval": {},
            "training": {"eval_steps": 4},
        }  # fmt: skip
        return write_short_run(blocks, changes)

    return write


def naive_loss(model, corpus, neighbours: bool) -> float:
    """Mean loss of all rows, each document of a row alone and without padding behind it."""
    rows, total, count = RetroDataset(corpus), 0.0, 0
    for number in range(len(rows)):
        batch = DataCollatorForRetro(corpus.pad_token_id)([rows[number]])
        starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            piece = {"input_ids": batch["input_ids"][:, start:end]}
            if neighbours:
                piece["retrieved"] = batch["retrieved"][:, start // 8 : end // 8]
            labels = batch["labels"][0, start + 1 : end]
            with torch.no_grad():
                logits = model(**piece).logits
            losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum", ignore_index=-100)
            total, count = total + float(losses), count + int((labels != -100).sum())
    return total / count


def test_new_weights_train_alone_and_are_loaded_again(make_config, held_out, tmp_path):
    assert main([make_config()]) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    saved = load_file(out / "adapter_model.safetensors")
    assert record["parameters"]["trained"] == sum(weight.numel() for weight in saved.values())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert record["results"]["eval_without_loss"] == pytest.approx(naive_loss(base, held_out, False), rel=1e-4)
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    assert record["results"]["eval_retrieved_loss"] == pytest.approx(naive_loss(loaded, held_out, True), rel=1e-4)
    assert len({record["results"][f"eval_{view}_loss"] for view in ("retrieved", "without", "random")}) == 3
    card = (out / "README.md").read_text()
    assert "adapted (retrofit) from" in card
    assert "`cross_attention_layers=[1]`" in card
    assert card.count("@inproceedings{borgeaud2022retro") == 1


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config, tmp_path, losses_of, interrupt):
    assert main([make_config()]) == 0
    out = tmp_path / "out"
    whole = losses_of(out)
    interrupt(out)
    assert main(["--resume", str(out)]) == 0
    assert losses_of(out) == whole
    assert json.loads((out / "run.json").read_text())["training"]["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--no-retrieval"], "'retrofit' learns to read neighbours, but there is no block `retrieval`"),
        (
            {"adapter": {"options": {"chunk": 8}}},
            [],
            "`adapter.options` has no 'chunk'; 'retrofit' takes .*chunk_size",
        ),
        ({"adapter": {"options": {"chunk_size": 0}}}, [], "`adapter.options`: `chunk_size` must be at least 1, got 0"),
        ({"adapter": {"options": {"chunk_size": 4}}}, [], "`chunk_size` of the model is 4"),
        ({"adapter": {"options": {"cross_attention_layers": [7]}}}, [], r"must lie in \[0, 2\) for this model, got"),
        ({"adapter": {"options": {**OPTIONS, "pad_token_id": 3}}}, [], "`pad_token_id` of the model is 3"),
        (
            {"adapter": {"r": 4}},
            [],
            "`adapter.r` is of `adapter.type` 'lora'; 'retrofit' takes its fields in `adapter.options`",
        ),
        ({}, ["--no-adapter"], "needs a model that reads neighbours.*a llama.*`adapter.type` 'retrofit'"),
        ({"model": {"task": "seq2seq"}}, ["--no-retrieval"], "'retrofit' is for `model.task` 'causal', got 'seq2seq'"),
    ],
)
def test_mistakes_are_one_line(make_config, tmp_path, capsys, changes, options, message):
    if options == ["--no-retrieval"]:
        options = [*options, "--data.eval_views", "truncated"]
    assert main([make_config(**changes), *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last
    assert not (tmp_path / "out" / "run.json").exists()
