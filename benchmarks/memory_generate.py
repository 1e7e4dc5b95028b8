"""Generation from a long document: ours, the stock model, and the original in its own environment, in turn.

python benchmarks/memory_generate.py --sources 2048 8192 32768
python benchmarks/memory_generate.py --original PATH/unlimiformer --original-python ENV/bin/python
python benchmarks/memory_generate.py --shape llama

Real sizes, random weights, greedy, batch 1; every case in a process of its own. The original runs from a checkout the
user has, in an environment with a transformers it still starts under (4.35.2 here). Prints seconds to read the
document, milliseconds a token and memory above the loaded model, and ratios to our hidden store in the same round.
"faster" is ours under `graft.decode_faster`, as the permanent classes decode by themselves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import keep, machine

WORKER = Path(__file__).parent / "generation_worker.py"
OURS = {
    "bart": ["ours-hidden", "ours-hidden-bf16", "ours-keys_values", "ours-hidden-faster", "ours-keys_values-faster"],
    "llama": ["ours-keys_values", "ours-keys_values-faster"],
}
STOCK = {"bart": ["stock-full", "stock-truncated"], "llama": ["stock-full"]}


def run(system: str, source: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One case in a fresh process."""
    original = system.startswith("original")
    command = [arguments.original_python if original else sys.executable, str(WORKER)]
    command += ["--system", system, "--shape", arguments.shape, "--source", str(source)]
    command += ["--tokens", str(arguments.tokens), "--beams", str(arguments.beams), "--kept", str(arguments.kept)]
    command += ["--overlap", str(arguments.overlap)]
    if arguments.processor_time:
        command.append("--processor-time")
    if arguments.layers is not None:
        command += ["--layers", str(arguments.layers)]
    if original:
        command += ["--original", str(arguments.original)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{system} failed at {source}:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(source, system, figures, file=sys.stderr)
    return figures


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["bart", "llama"], default="bart")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--sources", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="seconds of the processor instead of the wall clock: with OMP_NUM_THREADS=1, on a machine others use too",
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", help="of ours and stock, all by default; ratios to the first")
    parser.add_argument("--original", type=Path, help="checkout of abertsch72/unlimiformer")
    parser.add_argument("--original-python", default="python", help="python of its environment")
    parser.add_argument("--original-systems", nargs="+", default=["original", "original-flat"])
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse(argv)
    systems = arguments.systems or OURS[arguments.shape] + STOCK[arguments.shape]
    if arguments.original is not None:
        systems += arguments.original_systems
    about = machine()
    print(about)
    rows = []
    for source in arguments.sources:
        rounds = [{system: run(system, source, arguments) for system in systems} for _ in range(arguments.rounds)]
        ours = systems[0]
        for system in systems:
            row = {"source": source, "system": system}
            for figure in rounds[0][system]:
                row[figure] = statistics.median(round_[system][figure] for round_ in rounds)
                ratios = [round_[system][figure] / max(round_[ours][figure], 1e-9) for round_ in rounds]
                row[f"{figure} / {ours}"] = round(statistics.median(ratios), 2)
            rows.append(row)
            print(
                f"{source:7} {system:18} read {row['read s']:8.1f} s   {row['ms per token']:8.1f} ms/token "
                f"(x{row[f'ms per token / {ours}']:.2f})   extra {row['extra MB']:8.0f} MB "
                f"(x{row[f'extra MB / {ours}']:.2f})",
                flush=True,
            )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings.pop("original_python")
    settings["original"] = "abertsch72/unlimiformer" if arguments.original else None
    print("kept in", keep(f"memory_generate-{arguments.shape}", settings, rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
