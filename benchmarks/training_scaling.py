"""A step of training in two gloo processes against one, in turn: the same rows in each, so twice as many in all.

python benchmarks/training_scaling.py --lengths 1024 4096

One thread in each process. The stock Trainer on the stock model reads the first 1024 tokens of a document, as our
"standard" does; "random" and "retrieval" read all of it, as in training_throughput.py, whose models and rows these
are. "efficiency" is one / two of the same round: 1 would be twice the rows in the same time. Each run starts anew; the
second of its two steps counts, and one run of each stands in front of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
from measuring import keep, machine, ratio
from training_throughput import REGIMES, SHAPES, WINDOW, train

PORT = "29511"


def timed(arguments, length, name, processes):
    """Seconds of a step, and the loss before the first, of a run in its own processes."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", PORT]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, "--shape", arguments.shape]
    command += ["--batch", str(arguments.batch), "--lengths", str(length), "--alone", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def alone(arguments):
    """What `timed` starts: train, and let the first process say how long a step took."""
    taken, losses = train(arguments, arguments.lengths[0], arguments.alone)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"step": taken["step"], "loss": losses[0]}), flush=True)


def measure(arguments, length):
    """A row for each system on documents of `length` tokens."""
    for name in ["stock", *(REGIMES if length > WINDOW else ["standard"])]:
        steps = {1: [], 2: []}
        for turn in range(arguments.rounds + 1):
            for processes, taken in steps.items():
                answer = timed(arguments, length, name, processes)
                if turn:
                    taken.append(answer["step"])
        read = length if name in ("random", "retrieval") else WINDOW
        middle = {processes: statistics.median(taken) for processes, taken in steps.items()}
        yield {
            "tokens of a document": length,
            "system": name,
            "ms a step, one process": round(1000 * middle[1], 1),
            "ms a step, two processes": round(1000 * middle[2], 1),
            "tokens read/s, one process": round(arguments.batch * read / middle[1], 1),
            "tokens read/s, two processes": round(2 * arguments.batch * read / middle[2], 1),
            "efficiency": ratio(steps[1], steps[2]),
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        return alone(arguments)
    torch.set_num_threads(1)  # which its processes have
    about = machine()
    print(about)
    rows = []
    for length in arguments.lengths:
        for row in measure(arguments, length):
            rows.append(row)
            print(row, flush=True)
    print(keep(f"training_scaling-{arguments.shape}", vars(arguments), rows, about))


if __name__ == "__main__":
    main()
