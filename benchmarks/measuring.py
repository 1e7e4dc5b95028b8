"""What every benchmark needs: seconds of a call, ratios measured in turn, intervals, the machine's limits, a JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times in turn so that a noisy machine disturbs all alike; one warm-up round."""
    return wall_and_processor(calls, rounds)[0]


def wall_and_processor(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """As `in_turn`, and beside it processor seconds, of all threads: what others do on the machine is not in them."""
    for call in calls.values():
        call()
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            wall[name].append(seconds(call))
            processor[name].append(time.process_time() - began)
    return wall, processor


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Quartiles of theirs / ours, pair by pair: above 1, ours is faster."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)
    return {"low": round(low, 3), "median": round(middle, 3), "high": round(high, 3)}


def bootstrap(sums: Sequence[float], counts: Sequence[int], draws: int = 2000) -> dict[str, float]:
    """sum(sums) / sum(counts), with a 95 % bootstrap interval over the documents or rows that they are of."""
    total, count = np.asarray(sums), np.asarray(counts)
    drawn = np.random.default_rng(0).integers(0, len(count), (draws, len(count)))
    low, high = np.quantile(total[drawn].sum(1) / np.maximum(count[drawn].sum(1), 1), [0.025, 0.975])
    figures = {"mean": total.sum() / max(count.sum(), 1), "low": low, "high": high}
    return {name: round(float(figure), 4) for name, figure in figures.items()}


def memory_kilobytes(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process; `getrusage` would begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def read_limit(rounds: int = 5) -> float:
    """Bytes per second at which torch reads memory: the sum of 256 MB."""
    block = torch.ones(64 * 2**20)
    return block.numel() * 4 / min(seconds(block.sum) for _ in range(rounds))


def gemm_limit(dtype: torch.dtype = torch.float32, size: int = 1536, rounds: int = 3) -> float:
    """Floating-point operations per second of a square matrix product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(rounds))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "read GB/s": round(read_limit() / 1e9, 1),
        "GEMM Gflop/s": round(gemm_limit() / 1e9, 1),
    }


def processor_kind() -> str:
    """Which kernels torch takes on this processor, for the name of a result: who is faster hangs on it.

    "avx2"; "avx512" on Intel's processors, "avx512-amd" on AMD's.
    """
    from graft.cpu import AVX512_MAKER

    return torch.backends.cpu.get_cpu_capability().lower() + ("-amd" if AVX512_MAKER == "AMD" else "")


def keep(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write one benchmark's rows to benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path
