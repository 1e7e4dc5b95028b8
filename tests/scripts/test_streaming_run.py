"""Runs over a stream: the losses of loaded rows; on after a stop as if there had been none; two processes as one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from graft.scripts.run import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
OPTIONS = {"max_steps": 14, "save_steps": 7, "eval_strategy": "no", "do_train": True, "do_eval": True}
"""Two rows a step of 24: the second pass begins with step 13."""
STREAM = ["--data.streaming", "true"]
IN_ORDER = ["--training.train_sampling_strategy", "sequential"]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_stream_in_order_trains_as_loaded_rows_do(make_run, tmp_path, losses_of):
    config = str(make_run("causal", **OPTIONS))
    assert main([config, *IN_ORDER]) == 0
    assert main([config, *IN_ORDER, *STREAM, "--training.output_dir", str(tmp_path / "stream")]) == 0
    assert losses_of(tmp_path / "stream") == losses_of(tmp_path / "out")
    assert record_of(tmp_path / "stream")["results"] == record_of(tmp_path / "out")["results"]
    assert "train" not in record_of(tmp_path / "stream")["rows"], "nobody has counted them"


@pytest.mark.parametrize("saved", [7, 13])
def test_a_shuffled_stream_goes_on_as_if_there_had_been_no_stop(make_run, tmp_path, losses_of, saved):
    config = str(make_run("causal", **OPTIONS | {"save_steps": saved}))
    shuffled = [config, *STREAM, "--data.shuffle_buffer", "5"]
    assert main(shuffled) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-14")
    (tmp_path / "stopped" / "run.json").write_text(json.dumps(record_of(tmp_path / "out") | {"status": "running"}))
    assert main([*shuffled, "--training.output_dir", str(tmp_path / "stopped")]) == 0
    assert record_of(tmp_path / "stopped")["training"]["resumed_from"] == f"checkpoint-{saved}"
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "out")
    assert record_of(tmp_path / "stopped")["results"] == record_of(tmp_path / "out")["results"]


def test_the_plan_shows_a_streamed_row(make_run, capsys):
    assert main([str(make_run("causal", **OPTIONS)), *STREAM, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "train: a stream tried" in plan
    assert "example    row train-" in plan


def test_a_bad_row_in_the_middle_of_a_stream_ends_the_run_with_its_name(make_run, tmp_path, capsys):
    config = str(make_run("causal", **OPTIONS))
    row = {"name": "the bad one", "body": "a text", "summary": ""}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("".join(json.dumps(row | {"summary": "cat"}) + "\n" for _ in range(64)) + json.dumps(row) + "\n")
    assert main([config, *IN_ORDER, *STREAM, "--training.max_steps", "60"]) == 2
    assert "Row 88 (id 'the bad one') of the split train has an empty target" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_read_a_stream_as_one_does(make_run, tmp_path, losses_of):
    sizes = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1}
    config = str(make_run("causal", **OPTIONS | sizes))
    assert main([config, *STREAM]) == 0
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    wide = ["--training.per_device_train_batch_size", "2", "--training.output_dir", str(tmp_path / "wide")]
    command = [sys.executable, *launcher, str(SCRIPT), config, *STREAM, *wide]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert record_of(tmp_path / "wide")["world_size"] == 2
    assert losses_of(tmp_path / "wide") == pytest.approx(losses_of(tmp_path / "out"), abs=1e-4)
    assert record_of(tmp_path / "wide")["results"] == pytest.approx(record_of(tmp_path / "out")["results"], rel=1e-4)
