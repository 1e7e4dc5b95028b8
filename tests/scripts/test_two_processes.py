"""Two processes on the CPU give what one gives: rows in order, the same losses, the same gradients.

`accelerate launch --cpu --num_processes 2` starts one process, silently; so the world's size is asserted first.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graft.scripts.run import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]


def accelerate() -> list[str]:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    return ["-m", "accelerate.commands.launch", *options]


def run_twice_as_wide(launcher: list[str], *options: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def predictions_of(folder: Path) -> list[dict]:
    lines = (folder / "predictions" / "eval_truncated-step-000004.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


@pytest.mark.parametrize(
    ("launcher", "task"),
    [(torchrun, "seq2seq"), pytest.param(accelerate, "causal", marks=pytest.mark.slow)],
)
def test_two_processes_give_what_one_gives(make_run, tmp_path, losses_of, launcher, task):
    sizes = {"per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
    config = str(make_run(task, **sizes, do_train=True, do_eval=True, optim="sgd", learning_rate=0.1))
    # Equal batches need an order that does not depend on how many share it.
    order = ["--training.train_sampling_strategy", "sequential"]
    if task == "seq2seq":
        order += ["--model.config_overrides.dropout", "0.0"]  # each process draws its own
        order += ["--memory.training", "retrieval", "--memory.store", "hidden"]
    assert main([config, *order]) == 0
    wide = ["--training.per_device_train_batch_size", "2", "--training.output_dir", str(tmp_path / "wide")]
    run_twice_as_wide(launcher(), config, *order, *wide)
    one, two = record_of(tmp_path / "out"), record_of(tmp_path / "wide")
    assert two["world_size"] == 2
    assert one["effective_batch_size"] == two["effective_batch_size"] == 4
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-4)
    assert [line["id"] for line in predictions_of(tmp_path / "wide")] == [f"validation-{n}" for n in range(5)]
    assert two["results"] == pytest.approx(one["results"], rel=1e-4)


def test_five_rows_stay_in_order_on_two_processes_when_training_groups_by_length(make_run, tmp_path):
    config = str(make_run("seq2seq", train_sampling_strategy="group_by_length", do_train=True, do_eval=True))
    run_twice_as_wide(torchrun(), config)
    assert record_of(tmp_path / "out")["world_size"] == 2
    assert [line["id"] for line in predictions_of(tmp_path / "out")] == [f"validation-{n}" for n in range(5)]


@pytest.mark.slow
def test_two_processes_read_the_neighbours_that_one_reads(corpora, tmp_path, losses_of):
    """The view `random` is left out: it takes neighbours of the same batch, which two processes cut differently."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_encoder_layers": 1}
    sizes |= {"vocab_size": 320, "cross_attention_layers": [0, 1], "chunk_size": 8, "pad_token_id": 1}
    dropouts = ("attention_dropout", "residual_dropout", "encoder_attention_dropout", "encoder_hidden_dropout")
    overrides = sizes | {"bos_token_id": 0, "eos_token_id": 2} | dict.fromkeys(dropouts, 0.0)
    tokenizer = str(corpora / "corpus" / "tokenizer")
    model = {"task": "causal", "from_config": True, "config": "graft_retro", "tokenizer": tokenizer}
    data = {"train": str(corpora / "corpus"), "validation": str(corpora / "held-out")}
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "logging_steps": 1, "use_cpu": True}
    training |= {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential", "disable_tqdm": True}
    training |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "do_eval": True, "do_train": True}
    blocks = {"model": model | {"config_overrides": overrides}, "retrieval": {}, "training": training}
    blocks["data"] = data | {"eval_views": ["retrieved", "without"]}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(blocks))
    assert main([str(config)]) == 0
    wide = ["--training.per_device_train_batch_size", "2", "--training.output_dir", str(tmp_path / "wide")]
    run_twice_as_wide(torchrun(), str(config), *wide)
    one, two = record_of(tmp_path / "out"), record_of(tmp_path / "wide")
    assert two["world_size"] == 2
    assert one["effective_batch_size"] == two["effective_batch_size"] == 4
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-4)
    assert one["results"]["eval_retrieved_loss"] != one["results"]["eval_without_loss"]
    assert two["results"] == pytest.approx(one["results"], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():  # the sum of four steps' gradients, of every weight
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4, msg=name)
