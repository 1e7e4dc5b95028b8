"""`graft-train examples/tiny.json`, as docs/training.md says it, with no network and empty caches."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
OFFLINE = """
import socket, sys

tried = []
connect = socket.socket.connect


def refuse(*where, **options):
    tried.append(where)
    raise OSError("there is no network")


socket.getaddrinfo = refuse
socket.socket.connect = lambda self, to: connect(self, to) if self.family == socket.AF_UNIX else refuse(to)
from graft.scripts.run import main

code = main(sys.argv[1:])
assert not tried, tried
raise SystemExit(code)
"""


def test_the_tiny_example_trains_on_these_pages_and_is_evaluated_with_memory_without_a_network(tmp_path):
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OFFLINE, "examples/tiny.json", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert {"eval_truncated_perplexity", "eval_full_perplexity", "eval_context_perplexity"} <= {
        line.split()[0] for line in done.stdout.splitlines() if line.startswith("eval_")
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.get_output_embeddings().weight.equal(load_file(out / "model.safetensors")["lm_head.weight"])
    assert tokenizer.decode(tokenizer("graft")["input_ids"], skip_special_tokens=True) == "graft"
