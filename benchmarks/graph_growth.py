"""How time and memory of each graph variant grow with the length of the input.

python benchmarks/graph_growth.py --lengths 512 1024 2048
python benchmarks/graph_growth.py --lengths 4096 8192 --variants gin "cg, a level of 64"

One layer of each variant, forward and backward, batch 1. The exponent is the slope of log time, or log memory, over
log length between the two longest inputs. Peak memory is what a step adds in a process of its own. Prints the ratio to
the stock layer in the same round (quartiles, above 1 is slower).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measuring import in_turn, keep, machine, memory_kilobytes, ratio

from graft import LlamaForCausalLMWithGNN, LlamaGNNConfig

SPARSE = {"rank": 128, "dropout": 0.0}
VARIANTS = {
    "llama": {"attention": "llama"},
    "gin": {},
    "gin, relu": {"edges": {"transform": "relu"}},
    "pna": {"attention": "pna"},
    "sparse, dense": {"attention": "llama", "sparse": {**SPARSE, "storage": "dense"}},
    "sparse, stored edges": {"attention": "llama", "sparse": {**SPARSE, "storage": "sparse"}},
    "sparse, one pass": {"attention": "llama", "sparse": {**SPARSE, "storage": "sparse"}, "shares_scores": True},
    "sparse, per head": {"attention": "llama", "sparse": {"rank": 16, "per_head": True, "storage": "sparse"}},
    "sparse, pna": {"attention": "llama", "sparse": {**SPARSE, "layer": "pna", "storage": "sparse"}},
    "halfway_gin": {"attention": "llama", "mlp": "halfway_gin"},
    "multi_hop": {"attention": "llama", "mlp": "multi_hop"},
    "multi_aggregation": {"attention": "llama", "mlp": "multi_aggregation"},
    "cg, a level of 64": {"attention": "cg", "latent": {"tokens_per_latent": [64]}},
    "cg, three levels": {"attention": "cg"},
}


def build(variant, width):
    torch.manual_seed(0)
    return LlamaForCausalLMWithGNN(
        LlamaGNNConfig(
            vocab_size=100,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=8,
            intermediate_size=2 * width,
            initializer_range=0.1,
            max_position_embeddings=65536,
            gnn_config=VARIANTS[variant],
        )
    )


def step_of(model, length):
    ids = torch.randint(100, (1, length), generator=torch.Generator().manual_seed(1))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def check(model):
    """Refuse to time what is wrong: later tokens change no earlier logit."""
    ids = torch.randint(100, (1, 40), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 100
    with torch.no_grad():
        one, two = model.eval()(ids).logits, model(other).logits
    if not torch.equal(one[:, :30], two[:, :30]) or torch.equal(one[:, 30:], two[:, 30:]):
        raise AssertionError("A later token changed an earlier logit, or none.")


def run_alone(arguments):
    model, peaks = build(arguments.alone, arguments.width), []
    step_of(model, 16)()
    for length in arguments.lengths:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = memory_kilobytes("VmRSS")
        step_of(model, length)()
        peaks.append(max(0.1, round((memory_kilobytes("VmHWM") - before) / 1024, 1)))
    print(json.dumps(peaks))


def peak_megabytes(arguments, variant):
    """What a step adds, for each length."""
    command = [sys.executable, __file__, "--alone", variant, "--lengths", *map(str, sorted(arguments.lengths))]
    command += ["--width", str(arguments.width), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def exponent(values, lengths):
    """Slope between the two longest, on logarithmic axes."""
    return round(math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2]), 2)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="beside llama")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", choices=VARIANTS)
    return parser.parse_args()


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        run_alone(arguments)
        return
    about, lengths = machine(), sorted(arguments.lengths)
    names = ["llama", *(name for name in arguments.variants if name != "llama")]
    models = {name: build(name, arguments.width) for name in names}
    for model in models.values():
        check(model)
        model.train()
    rows = {name: {"variant": name, "ms": [], "over llama": []} for name in names}
    for length in lengths:
        times = in_turn({name: step_of(model, length) for name, model in models.items()}, arguments.rounds)
        for name, row in rows.items():
            row["ms"].append(round(1000 * statistics.median(times[name]), 1))
            row["over llama"].append(ratio(times[name], times["llama"]))
    for name, row in rows.items():
        row["peak MB"] = peak_megabytes(arguments, name)
        row["exponent of time"] = exponent(row["ms"], lengths)
        row["exponent of memory"] = exponent(row["peak MB"], lengths)
        print(
            f"{row['variant']:22} ms {row['ms']}  exponent {row['exponent of time']}   "
            f"MB {row['peak MB']}  exponent {row['exponent of memory']}   "
            f"{row['over llama'][-1]['median']} x llama",
            flush=True,
        )
    settings = {k: v for k, v in vars(arguments).items() if k != "alone"}
    suffix = "" if arguments.variants == list(VARIANTS) else f"-{lengths[-1]}"
    print(keep(f"graph_growth{suffix}", settings, list(rows.values()), about))


if __name__ == "__main__":
    main()
