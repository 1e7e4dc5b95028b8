"""The mistakes that a user of `graft-train` can make: each is one line that names what is wrong, before training."""

import json

import pytest
import torch
from transformers import ByT5Tokenizer

from graft.scripts.run import main

CHUNKED = ["--data.train_view", "chunked"]
QUESTION = "who in the whole wide world sat on that old mat by the sea"
MISTAKES = {
    # what is given, task, what the error says
    "unknown key": (["--data.chunksize", "8"], "seq2seq", ["chunksize", "did you mean", "chunk_size"]),
    "a causal checkpoint for seq2seq": (
        ["--model.task", "seq2seq"],
        "causal",
        ["`model.task` is 'seq2seq'", "LlamaForCausalLM", "may be 'causal'"],
    ),
    "a seq2seq checkpoint for causal": (
        ["--model.task", "causal"],
        "seq2seq",
        ["`model.task` is 'causal'", "BartForConditionalGeneration", "may be 'seq2seq'"],
    ),
    "no room for a chunk": (
        [*CHUNKED, "--data.chunk_size", "8", "--data.prefix_column", "question"],
        "seq2seq",
        ["`chunk_size` 8 must exceed prefix and special tokens"],
    ),
    "overlap beyond the body": (
        [*CHUNKED, "--data.chunk_size", "12", "--data.chunk_overlap", "10"],
        "seq2seq",
        ["`chunk_overlap` must lie in [0, 10), got 10"],
    ),
    "offsets of a slow tokenizer": (
        [*CHUNKED, "--data.capture_raw_text", "true", "--model.from_config", "true"]
        + ["--model.config_overrides.vocab_size", "400", "--model.tokenizer", "slow"],
        "seq2seq",
        ["`capture_raw_text` needs the offsets of a fast tokenizer", "ByT5Tokenizer"],
    ),
    "missing column": (
        ["--data.target_column", "abstract"],
        "seq2seq",
        ["The split train has no column 'abstract'", "name, body, summary, question"],
    ),
    "empty target": (
        ["--data.train", "holes.jsonl"],
        "seq2seq",
        ["Row 17 (id 'train-17') of the split train has an empty target", "`data.on_empty_target: skip`"],
    ),
    "nothing to evaluate": (
        ["--data.validation", "null"],
        "seq2seq",
        ["`training.eval_strategy`", "add `data.validation`"],
    ),
    "unknown best metric": (
        ["--training.load_best_model_at_end", "true", "--training.metric_for_best_model", "rougeL"],
        "seq2seq",
        ["eval_truncated_rougeL", "got 'rougeL'"],
    ),
    "early stopping alone": (
        ["--training.early_stopping_patience", "2"],
        "seq2seq",
        ["`training.early_stopping_patience` needs `training.load_best_model_at_end`"],
    ),
    "sampling with beams": (
        ["--generation", '{"num_beams": 4, "do_sample": false, "top_k": 5}'],
        "seq2seq",
        ["Block `generation`", "top_k"],
    ),
    "published pickles": (
        ["--training.hub_strategy", "all_checkpoints"],
        "seq2seq",
        ["`training.hub_strategy` 'all_checkpoints' is refused", "pickles"],
    ),
    "shards of one process": (
        ["--training.fsdp", "true"],
        "seq2seq",
        ["`training.fsdp`", "one process", "torchrun"],
    ),
    "formats of a GPU that is not there": (
        ["--training.bf16", "true", "--training.use_cpu", "false"],
        "seq2seq",
        ["Block `training`", "bf16", "use_cpu"],
    ),
    "tf32 on a processor": (["--training.tf32", "true"], "seq2seq", ["Block `training`", "tf32"]),
    "memory that never acts": (
        ["--memory.training", "retrieval", "--data.max_source_length", "32", "--memory.window", "32"],
        "seq2seq",
        ["`memory.training` 'retrieval' would never act", "Raise `data.max_source_length`"],
    ),
    "memory that never acts by itself": (
        ["--memory.training", "random"],
        "seq2seq",
        ["`memory.training` 'random' would never act", "`memory.window` 128"],
    ),
    "a decoder's memory that never acts": (
        ["--memory.training", "retrieval", "--data.max_source_length", "40", "--data.target_column", "null"]
        + ["--no-generation", "--metrics", "perplexity", "--training.predict_with_generate", "false"],
        "causal",
        ["`memory.training` 'retrieval' would never act", "`memory.local_tokens` 256"],
    ),
}


@pytest.fixture
def given(make_run, tmp_path):
    def write(task):
        config = make_run(task)
        rows = [
            json.loads(line) | {"question": QUESTION} for line in (tmp_path / "train.jsonl").read_text().splitlines()
        ]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows[17]["summary"] = None
        (tmp_path / "holes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(config)

    return write


def placed(options, folder):
    """The options, with names of the test's own files as paths."""
    return [str(folder / option) if option in ("holes.jsonl", "slow") else option for option in options]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_training(given, tmp_path, capsys, mistake):
    if "GPU" in mistake and torch.cuda.is_available():
        pytest.skip("this machine has one")
    options, task, said = MISTAKES[mistake]
    config = given(task)
    if "slow" in options:
        ByT5Tokenizer().save_pretrained(tmp_path / "slow")  # plain Python, in every version of transformers
    capsys.readouterr()
    assert main([config, *placed(options, tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("graft-train")]
    assert len(lines) == 1
    for words in said:
        assert words in lines[0], lines[0]
    assert not (tmp_path / "out" / "run.json").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
