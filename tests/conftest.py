"""What every test runs under: no network, few threads, and hypothesis cases by profile; a Hub of our own."""

import os
import subprocess
import sys
import threading

# Both are read when transformers and huggingface_hub are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hub_server import HubServer
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and two test runs on one machine would fight for its cores.
torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=full, as in `make test-all`, tries many more cases.
_slow_is_fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, suppress_health_check=_slow_is_fine)
settings.register_profile("full", max_examples=200, deadline=None, suppress_health_check=_slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def hub(tmp_path):
    """A running server, and a function that runs a program with it as its Hub and a home of its own."""
    with HubServer(token="hf_a_secret") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def run(code, *arguments, home="home", succeeds=True):
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / home)}
            environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
            command = [sys.executable, "-c", code, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=tmp_path)
            assert (done.returncode == 0) is succeeds, done.stderr[-3000:]
            return done

        server.run = run
        yield server
        server.shutdown()
