"""What gin_attention.py and pna_attention.py share: every case in a process of its own, systems in turn, ratios."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from measuring import keep, machine
from worker_process import Worker, difference, measured, standing, text_of

WORKER = Path(__file__).parent / "attention_worker.py"


def worker(system: str, case: dict[str, Any], arguments: argparse.Namespace) -> Worker:
    """One system of one case."""
    options = {"system": system, **case, "mlp-ratio": arguments.mlp_ratio}
    options |= {"width": arguments.width, "heads": arguments.heads}
    if system != "original":
        return Worker(sys.executable, WORKER, options)
    return Worker(arguments.original_python, WORKER, options | {"original": arguments.original})


def flops(case: dict[str, Any], arguments: argparse.Namespace) -> float:
    """Of a forward pass of ours: projections, causal scores and sums, and the MLP of each head."""
    s, width, d = case["tokens"], arguments.width, arguments.width // arguments.heads
    projected = width + case["groups"] * d if case["attention"] == "gin" else 2 * width + 2 * case["groups"] * d
    read = 1 if case["attention"] == "gin" else 2  # values, and their squares
    inner = (2 if case["attention"] == "gin" else 5) * d * max(1, int(arguments.mlp_ratio * d)) * arguments.heads
    return 2 * case["batch"] * s * (width * projected + s / 2 * (1 + read) * width + inner)


def compare(case: dict[str, Any], systems: list[str], arguments: argparse.Namespace, limit: float) -> list[dict]:
    """All systems of a case in turn; rows with medians and their ratios to ours. Refuses a fast wrong answer."""
    checked = [each for each in ("kept", "original") if each in systems]
    if case["attention"] != "gin":  # the original's largest value is the token's own: nothing to compare
        checked = [each for each in checked if each != "original"]
    with standing({system: worker(system, case, arguments) for system in systems}) as workers:
        for other in checked:
            off = difference(workers, "ours", other)
            if not off < 1e-3 or math.isnan(off):
                raise RuntimeError(f"ours and {other} differ by {off} at {case}")
        figures = measured(workers, arguments.rounds)
    rows = []
    for system in systems:
        row: dict[str, Any] = {**case, "system": system, **figures[system]}
        if system == "ours":
            row["% of GEMM"] = round(100 * flops(case, arguments) / (1e-3 * row["fwd ms"]) / (limit * 1e9), 1)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One case, for the reader."""
    share = f" {row['% of GEMM']:5.1f}% GEMM" if "% of GEMM" in row else ""
    place = f"{row['attention']:10} {row['transform']:8} S {row['tokens']:5} B {row['batch']} G {row['groups']}"
    return f"{place} {row['system']:9} {text_of(row)}{share}"


def parse(argv, description: str, attentions: list[str], transforms: list[str], mlp_ratio: float):
    """Arguments of a benchmark, with the attentions and edge transforms it times by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attentions", nargs="+", default=attentions)
    parser.add_argument("--transforms", nargs="+", default=transforms)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 2], help="key heads: 8 of 8, and shared by four")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of a batch, if a row is shorter")
    parser.add_argument("--width", type=int, default=560)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--mlp-ratio", type=float, default=mlp_ratio)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kept-limit", type=int, default=2048, help="longest rows whose weights are also all kept")
    parser.add_argument("--original", type=Path, help="folder that holds the original's package xgpt")
    parser.add_argument("--original-python", default="python", help="python of its environment")
    return parser.parse_args(argv)


def measure(name: str, arguments: argparse.Namespace) -> int:
    """All cases, one line each, and the JSON."""
    about = machine()
    print(about)
    rows = []
    for attention in arguments.attentions:
        for transform in arguments.transforms:
            for tokens in arguments.tokens:
                for groups in arguments.groups:
                    case = {"attention": attention, "transform": transform, "tokens": tokens, "groups": groups}
                    case["batch"] = max(1, arguments.batch_tokens // tokens)
                    systems = ["ours", "sdpa"]
                    if tokens <= arguments.kept_limit and (attention, transform) != ("pna", "none"):
                        systems.append("kept")
                    if arguments.original is not None and groups == arguments.heads:  # it crashes with shared keys
                        systems.append("original")
                    rows += compare(case, systems, arguments, about["GEMM Gflop/s"])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings.pop("original_python")
    settings["original"] = "lamm-mit/Graph-Aware-Transformers" if arguments.original else None
    print("kept in", keep(name, settings, rows, about))
    return 0
