"""What every test runs under: no network, few threads, and hypothesis cases by profile."""

import os

# Both are read when transformers and huggingface_hub are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from threads, and two test runs on one machine would fight for its cores.
torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=full, as in `make test-all`, tries many more cases.
_slow_is_fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, suppress_health_check=_slow_is_fine)
settings.register_profile("full", max_examples=200, deadline=None, suppress_health_check=_slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
