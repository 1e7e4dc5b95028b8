"""Whole graph-aware language models: ours, Llama with eager attention and with sdpa, and the original, in turn.

python benchmarks/graph_models.py --tokens 256 1024 4096
python benchmarks/graph_models.py --original PATH/src --original-python ENV/bin/python

The sizes of the original's README (560 wide, 6 layers; a sparse network beside a frozen base: 512 wide, 8 layers),
random weights, float32, one forward pass and one with backward; a JSON for each variant and length. PATH/src holds
the original's package xgpt, of lamm-mit/Graph-Aware-Transformers; its environment needs transformers 4.46.3 and
torch_geometric. GIN reads the original's weights and must give its logits first; the others' numbers differ on purpose
(docs/graphs.md says where). Ratios are theirs / ours of the same round: above 1, ours is faster. At 4,096 tokens two
layers are timed: the original's memory allows no more.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from graph_model_worker import VARIANTS
from measuring import keep, machine
from worker_process import Worker, difference, measured, standing, text_of

WORKER = Path(__file__).parent / "graph_model_worker.py"
SAME_NUMBERS = ("gin", "gin relu")


def workers_of(case: dict[str, Any], weights: Path, arguments: argparse.Namespace) -> dict[str, Worker]:
    """Processes of all systems of a case; ours begins when the original's weights are there."""
    workers = {}
    if arguments.original is not None and case["tokens"] <= arguments.original_limit.get(case["variant"], 4096):
        given = {**case, "system": "original", "original": arguments.original}
        if case["variant"] in SAME_NUMBERS:
            given["weights"] = weights
        workers["original"] = Worker(arguments.original_python, WORKER, given)
        workers["original"].ask("probe")
    given = {**case, "system": "ours"}
    if "original" in workers and case["variant"] in SAME_NUMBERS:
        given["weights"] = weights
    ours = {"ours": Worker(sys.executable, WORKER, given)}
    stock = {name: Worker(sys.executable, WORKER, {**case, "system": name}) for name in ("sdpa", "eager")}
    return ours | stock | workers


def compare(case: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All systems of a case in turn. Refuses a fast wrong answer."""
    with tempfile.TemporaryDirectory() as folder, standing({}) as workers:
        workers |= workers_of(case, Path(folder) / "weights.safetensors", arguments)
        if "original" in workers and case["variant"] in SAME_NUMBERS:
            off = difference(workers, "ours", "original")
            if not off < 1e-3 or math.isnan(off):
                raise RuntimeError(f"logits of ours and of the original differ by {off} at {case}")
        figures = measured(workers, arguments.rounds)
    rows = [{**case, "system": system, **found} for system, found in figures.items()]
    for row in rows:
        place = f"{row['variant']:15} S {row['tokens']:5} B {row['batch']} layers {row['layers'] or '-'}"
        print(f"{place} {row['system']:9} {text_of(row)}", flush=True)
    return rows


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of a batch, if a row is shorter")
    parser.add_argument("--rounds", type=int, default=7, help="0: peaks of memory alone")
    parser.add_argument("--original", type=Path, help="folder that holds the original's package xgpt")
    parser.add_argument("--original-python", default="python", help="python of its environment")
    arguments = parser.parse_args(argv)
    # Of 24 GB, PNA takes 5 for a layer's 1,024 tokens; latent tables of CG grow with the length.
    arguments.original_limit = {"pna": 1024, "pna_vector": 1024, "cg": 1024}
    return arguments


def main(argv=None) -> int:
    arguments = parse(argv)
    about = machine()
    print(about)
    settings = {"rounds": arguments.rounds, "dtype": "float32", "original": arguments.original is not None}
    for tokens in arguments.tokens:
        case = {
            "tokens": tokens,
            "batch": max(1, arguments.batch_tokens // tokens),
            "layers": 0 if tokens < 4096 else 2,
        }
        for variant in arguments.variants:
            rows = compare({"variant": variant, **case}, arguments)
            print("kept in", keep(f"graph_models-{variant.replace(' ', '_')}-{tokens}", settings, rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
