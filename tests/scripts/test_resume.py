"""A run that was killed with SIGKILL goes on and gives the losses and weights of a run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer

from graft.scripts.run import main
from graft.trainer.trainer import GraftSeq2SeqTrainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
OPTIONS = {"max_steps": 14, "save_steps": 3, "eval_strategy": "no", "do_train": True, "do_eval": True}


def start(config: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(config), "--training.output_dir", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at_step(config: Path, out: Path, step: int) -> None:
    """Start the run and kill it once it has logged `step`."""
    process = start(config, out)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        log = out / "metrics.jsonl"
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "the run ended before it was killed"


def set_status(out: Path, status: str) -> None:
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"status": status}))


def assert_equal_runs(out: Path, straight: Path, losses_of) -> None:
    assert losses_of(out) == losses_of(straight)
    weights = load_file(straight / "model.safetensors")
    assert all(load_file(out / "model.safetensors")[name].equal(weight) for name, weight in weights.items())
    results = [json.loads((folder / "run.json").read_text())["results"] for folder in (out, straight)]
    assert results[0] == results[1]


def test_resumed_run_equals_a_straight_one_after_a_kill(make_run, tmp_path, losses_of):
    config = make_run("seq2seq", **OPTIONS)
    assert main([str(config)]) == 0
    kill_at_step(config, tmp_path / "killed", 8)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    assert main(["--resume", str(tmp_path / "killed")]) == 0
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert record["training"]["resumed_from"] in ("checkpoint-3", "checkpoint-6")
    assert_equal_runs(tmp_path / "killed", tmp_path / "out", losses_of)


def test_a_partial_checkpoint_is_passed_over(make_run, tmp_path, losses_of):
    config = make_run("causal", **OPTIONS)
    assert main([str(config)]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    set_status(tmp_path / "cut", "running")
    weights = tmp_path / "cut" / "checkpoint-14" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "cut" / "checkpoint-12" / "trainer_state.json").unlink()
    assert main([str(config), "--training.output_dir", str(tmp_path / "cut")]) == 0
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record["training"]["resumed_from"] == "checkpoint-9"
    assert_equal_runs(tmp_path / "cut", tmp_path / "out", losses_of)


@pytest.mark.parametrize("status", ["running", "trained", "complete"])
def test_what_was_trained_to_its_end_is_not_trained_again(make_run, tmp_path, losses_of, status):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.5}
    config = make_run("causal", **OPTIONS | best | {"metric_for_best_model": "eval_truncated_loss"})
    assert main([str(config)]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    set_status(tmp_path / "again", status)  # "running": killed between its last step and the final save
    assert main([str(config), "--training.output_dir", str(tmp_path / "again")]) == 0
    assert not (tmp_path / "again" / "checkpoint-15").exists()
    record = json.loads((tmp_path / "again" / "run.json").read_text())
    assert (record["status"], record["training"]["steps"]) == ("complete", 14)
    assert_equal_runs(tmp_path / "again", tmp_path / "out", losses_of)


def test_a_run_told_to_end_saves_stops_and_goes_on_from_there(make_run, tmp_path, losses_of, monkeypatch):
    config = make_run("seq2seq", **OPTIONS | {"save_strategy": "no", "eval_strategy": "epoch"})
    assert main([str(config)]) == 0
    out, steps, before = tmp_path / "told", [], signal.getsignal(signal.SIGTERM)

    def step(trainer, *arguments, **options):
        steps.append(trainer.state.global_step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return Seq2SeqTrainer.training_step(trainer, *arguments, **options)

    monkeypatch.setattr(GraftSeq2SeqTrainer, "training_step", step, raising=False)
    assert main([str(config), "--training.output_dir", str(out)]) == 143
    record = json.loads((out / "run.json").read_text())
    assert signal.getsignal(signal.SIGTERM) is before
    assert (record["status"], len(steps)) == ("interrupted", 5)
    assert "results" not in record
    assert main(["--resume", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["training"]["resumed_from"]) == ("complete", "checkpoint-5")
    assert_equal_runs(out, tmp_path / "out", losses_of)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_resumed_run_equals_a_straight_one_after_kills_at_random_moments(make_run, tmp_path, losses_of, seed):
    options = OPTIONS | {"train_sampling_strategy": "group_by_length"} if seed % 2 else OPTIONS
    config = make_run("seq2seq" if seed < 3 else "causal", **options)
    assert main([str(config)]) == 0
    rng = random.Random(seed)
    for _ in range(2):
        out = tmp_path / "killed"
        done = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").is_file() else 0
        kill_at_step(config, out, rng.randint(min(done + 1, 13), 13))
    assert main(["--resume", str(out)]) == 0
    assert_equal_runs(out, tmp_path / "out", losses_of)


@pytest.mark.slow
def test_one_run_killed_five_times_equals_a_straight_one(make_run, tmp_path, losses_of):
    config = make_run("causal", **OPTIONS | {"max_steps": 60, "save_steps": 4})
    assert main([str(config)]) == 0
    rng, out = random.Random(5), tmp_path / "killed"
    for kill in range(5):
        kill_at_step(config, out, 10 * kill + rng.randint(3, 8))
        assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert main(["--resume", str(out)]) == 0
    assert json.loads((out / "run.json").read_text())["training"]["resumed_from"] >= "checkpoint-40"
    assert_equal_runs(out, tmp_path / "out", losses_of)
