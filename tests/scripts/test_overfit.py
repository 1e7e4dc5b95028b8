"""A run of each kind learns eight documents by heart: what it trains is what it reads."""

import json

import pytest

from graft.scripts.run import main

OPTIONS = {
    "max_steps": 400,
    "eval_strategy": "no",
    "save_strategy": "no",
    "do_train": True,
    "do_eval": False,
    "do_predict": False,
}
OPTIONS |= {"learning_rate": 0.003, "per_device_train_batch_size": 8, "predict_with_generate": False}
OPTIONS |= {"logging_steps": 50}
PLAIN = ["--no-generation", "--metrics", "perplexity", "--data.max_train_samples", "8"]
TEXT = ["--data.target_column", "null", "--data.max_source_length", "48"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
BART = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "dropout": 0.0}
KINDS = {
    "memory": ("seq2seq", BART, ["--memory.training", "retrieval", "--memory.window", "32"]),
    "graph": ("causal", SIZES, [*TEXT, "--graph.attention", "gin", "--graph.mlp_dropout", "0.0"]),
}


def last_loss(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line][-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_documents_are_learnt_by_heart(make_run, tmp_path, kind):
    task, sizes, options = KINDS[kind]
    model = ["--model.from_config", "true", "--model.config_overrides", json.dumps(sizes)]
    assert main([str(make_run(task, **OPTIONS)), *PLAIN, *model, *options]) == 0
    assert last_loss(tmp_path / "out") < 0.1


@pytest.mark.slow
def test_eight_documents_and_their_neighbours_are_learnt_by_heart(corpora, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_encoder_layers": 1}
    sizes |= {"vocab_size": 320, "cross_attention_layers": [1], "chunk_size": 8, "pad_token_id": 1}
    dropouts = ("attention_dropout", "residual_dropout", "encoder_attention_dropout", "encoder_hidden_dropout")
    overrides = sizes | {"bos_token_id": 0, "eos_token_id": 2} | dict.fromkeys(dropouts, 0.0)
    model = {"task": "causal", "from_config": True, "config": "graft_retro", "config_overrides": overrides}
    data = {"train": str(corpora / "corpus"), "max_train_samples": 8}
    training = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True} | OPTIONS
    blocks = {"model": model | {"tokenizer": str(corpora / "corpus" / "tokenizer")}, "data": data}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(blocks | {"retrieval": {}, "training": training}))
    assert main([str(config)]) == 0
    assert last_loss(tmp_path / "out") < 0.1
