"""FSDP2 on two gloo processes of this machine: a step's gradients are those of one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_sharding_processes_give_the_gradients_of_one_with_the_whole_batch():
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    worker = str(Path(__file__).with_name("sharded_step.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, worker], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"world"')))
    assert report["world"] == 2
    assert {"retro", "gin", "sparse"} <= set(report["found"])
    for kind, found in report["found"].items():
        assert found["without"] == [], kind
        assert found["gradient"] < 1e-8, kind
        assert found["loss"] < 1e-5, kind
