"""A linear map in float32 on a CPU, by the number of rows it meets: torch's against ours, in turn.

python benchmarks/cpu_linear.py

Weights lie beside enough others that none is in the caches when its turn comes, as in a model. A row says what each
took, alone or with the gradients of rows and weight, how often a machine that only read the weight would have been
done in our time, and at which share of the machine's rate ours multiplies. Exits with 1 where the two give different
numbers.
"""

import argparse
import itertools
import statistics
import sys

import torch
from measuring import in_turn, keep, machine, processor_kind, ratio
from torch.nn import functional

from graft.modeling.cpu_linear import linear

WEIGHTS_BYTES = 200 * 2**20
FUNCTIONS = {"torch": functional.linear, "ours": linear}


def calls_of(inputs: int, outputs: int, rows: int, learn: bool) -> dict[str, object]:
    """name -> one product, each time with the next weight; with `learn` also its gradients."""
    count = max(1, WEIGHTS_BYTES // (4 * inputs * outputs))
    made = (torch.randn(outputs, inputs).div_(inputs**0.5).requires_grad_(learn) for _ in range(count))
    weights = itertools.cycle(list(made))
    x, bias = torch.randn(rows, inputs, requires_grad=learn), torch.randn(outputs)

    def call(function):
        weight = next(weights)
        made = function(x, weight, bias)
        if learn:
            torch.autograd.grad(made, [x, weight], made.detach())
        return made

    return {name: lambda function=function: call(function) for name, function in FUNCTIONS.items()}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "768x3072", "3072x768", "2048x8192", "768x50265"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 5, 16, 64, 256, 1024])
    parser.add_argument("--learn-rows", nargs="+", type=int, default=[256, 1024], help="with gradients")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse(argv)
    about = machine()
    print(about)
    torch.manual_seed(0)
    result = []
    cases = [(rows, False) for rows in arguments.rows] + [(rows, True) for rows in arguments.learn_rows]
    for shape, (rows, learn) in itertools.product(arguments.shapes, cases):
        inputs, outputs = map(int, shape.split("x"))
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).div_(inputs**0.5)
        if not torch.allclose(linear(x, weight), functional.linear(x, weight), rtol=1e-4, atol=1e-4):
            print(f"{shape}, {rows} rows: torch's and our products differ", file=sys.stderr)
            return 1
        times = in_turn(calls_of(inputs, outputs, rows, learn), arguments.rounds)
        ours, compared = statistics.median(times["ours"]), ratio(times["torch"], times["ours"])
        reading = 4 * inputs * outputs / (about["read GB/s"] * 1e9)
        multiplying = 2 * rows * inputs * outputs * (3 if learn else 1) / (about["GEMM Gflop/s"] * 1e9)
        result.append(
            {
                "inputs x outputs": shape,
                "rows": rows,
                "with gradients": learn,
                "ms": round(1e3 * ours, 3),
                "torch ms": round(1e3 * statistics.median(times["torch"]), 3),
                "torch / ours": compared,
                "times reading the weight": round(ours / reading, 2),
                "share of GEMM rate": round(multiplying / ours, 2),
            }
        )
        print(
            f"{shape:>10} {rows:5} rows{' and gradients' if learn else '':14} {1e3 * ours:8.2f} ms   torch "
            f"{result[-1]['torch ms']:8.2f} ms   ratio {compared['median']:.2f} [{compared['low']:.2f}, "
            f"{compared['high']:.2f}]   {result[-1]['times reading the weight']:.1f} x reading   "
            f"{result[-1]['share of GEMM rate']:.2f} of the GEMM rate",
            flush=True,
        )
    print("kept in", keep(f"cpu_linear-{processor_kind()}", vars(arguments), result, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
