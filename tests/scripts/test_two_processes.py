"""Two processes on the CPU give what one gives: rows in order, the same losses, the same gradients.

`accelerate launch --cpu --num_processes 2` starts one process, silently; so the world's size is asserted first.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
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


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def predictions_of(folder: Path, view: str = "truncated") -> list[dict]:
    lines = (folder / "predictions" / f"eval_{view}-step-000004.jsonl").read_text().splitlines()
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
        order += ["--memory.training", "retrieval", "--memory.store", "hidden", "--memory.window", "32"]
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
    blocks["data"] = data | {"eval_views": ["retrieved", "without", "random"]}
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


ABILITIES = {
    "graph": ["--graph.attention", "gin", "--graph.mlp_dropout", "0.0"],
    "lora": ["--adapter.r", "2", "--memory.window", "32", "--memory.local_tokens", "8", "--data.eval_views", "full"],
    "sparse_gin": [
        *("--adapter.type", "sparse_gin", "--adapter.options"),
        '{"rank": 4, "scale_first": 0.5, "dropout": 0.0}',
    ],
    "knowledge graph": [
        *("--graph.attention", "llama", "--graph.sparse", '{"rank": 4, "scale_first": 0.5, "dropout": 0.0}'),
        *("--graph.knowledge_graph.chunk_size", "6", "--graph.knowledge_graph.extractor", "keyphrase"),
        *("--data.eval_views", "context"),
    ],
}
"""Of a causal model on text; the block `retrieval` has a test of its own below."""


@pytest.mark.slow
@pytest.mark.parametrize("ability", ABILITIES)
def test_two_processes_learn_what_one_learns_with_each_ability(make_run, tmp_path, losses_of, ability):
    sizes = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
    sizes |= {"predict_with_generate": False, "do_train": True, "do_eval": True, "optim": "sgd", "learning_rate": 0.1}
    config = str(make_run("causal", **sizes))
    text = ["--data.target_column", "null", "--data.max_source_length", "40", "--data.scored_tokens", "8"]
    options = [*text, "--no-generation", "--metrics", "bits_per_byte", *ABILITIES[ability]]
    assert main([config, *options]) == 0
    wide = ["--training.per_device_train_batch_size", "2", "--training.output_dir", str(tmp_path / "wide")]
    run_twice_as_wide(torchrun(), config, *options, *wide)
    one, two = record_of(tmp_path / "out"), record_of(tmp_path / "wide")
    assert two["world_size"] == 2
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-4)
    assert two["results"] == pytest.approx(one["results"], rel=1e-4)
    view = {"lora": "full", "knowledge graph": "context"}.get(ability, "truncated")
    rows = [predictions_of(tmp_path / name, view) for name in ("out", "wide")]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]] == [f"validation-{n}" for n in range(5)]
    weights = [load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("out", "wide")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():  # the sum of four steps' gradients, of every weight that trains
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_go_on_after_one_of_them_was_killed(make_run, tmp_path, losses_of):
    steps = {"max_steps": 14, "save_steps": 3, "eval_strategy": "no", "do_train": True, "do_eval": True}
    config = str(make_run("causal", **steps))
    run_twice_as_wide(torchrun(), config)
    killed = ["--training.output_dir", str(tmp_path / "killed")]
    command = [sys.executable, *torchrun(), str(SCRIPT), config, *killed]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) >= 8):
        time.sleep(0.002)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(120) != 0  # torchrun ends the other one
    assert record_of(tmp_path / "killed")["status"] in ("running", "interrupted")
    run_twice_as_wide(torchrun(), "--resume", str(tmp_path / "killed"))
    one, two = record_of(tmp_path / "out"), record_of(tmp_path / "killed")
    assert (two["world_size"], two["status"]) == (2, "complete")
    assert two["training"]["resumed_from"].startswith("checkpoint-")
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "out")
    assert two["results"] == one["results"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "killed")]
    assert all(weights[1][name].equal(weight) for name, weight in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("told", ["the launcher", "one process"])
def test_two_processes_told_to_end_save_the_same_step_once_and_go_on_from_there(make_run, tmp_path, losses_of, told):
    steps = {"max_steps": 40, "save_strategy": "no", "eval_strategy": "no", "do_train": True, "do_eval": True}
    config = str(make_run("causal", **steps))
    run_twice_as_wide(torchrun(), config)
    out = tmp_path / "told"
    command = [sys.executable, *torchrun(), str(SCRIPT), config, "--training.output_dir", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.002)
    os.kill(process.pid if told == "the launcher" else children_of(process.pid)[1], signal.SIGTERM)
    assert process.wait(120) != 0
    assert record_of(out)["status"] == "interrupted"
    saved = [path.name for path in out.glob("checkpoint-*")]
    assert len(saved) == 1
    assert len(list((out / saved[0]).glob("rng_state_*.pth"))) == 2, "each process has its own"
    run_twice_as_wide(torchrun(), "--resume", str(out))
    assert record_of(out)["training"]["resumed_from"] == saved[0]
    assert losses_of(out) == losses_of(tmp_path / "out")
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "out", out)]
    assert all(weights[1][name].equal(weight) for name, weight in weights[0].items())
