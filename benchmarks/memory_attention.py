"""One attention step over a memory, against stock attention over the same keys and against reading the memory once.

python benchmarks/memory_attention.py --sources 8192 32768

BART-base shape by default: 12 heads of 64, hidden size 768, random vectors, one query per head and beam. A row says
what our step took, what stock attention over the same keys took, and how often the memory could have been read.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from measuring import in_turn, keep, machine, processor_kind, ratio

from graft.modeling.unlimiformer.knn_attention import KeyChoice, knn_attention
from graft.retrieval.exact_search import gathered_sums, inner_products, largest, weighted_sums


def kernels(source: int, hidden: int, heads: int, kept: int) -> dict[str, dict[str, object]]:
    """The steps of the hidden store, each beside the stock operation: name -> {"stock": call, "ours": call}."""
    states = torch.randn(1, 1, source, hidden)
    queries = torch.randn(1, 1, heads, hidden)
    scores = queries @ states.transpose(-1, -2)
    best, ids = scores.topk(kept, dim=-1, sorted=False)
    weights = best.softmax(-1)
    dense = torch.zeros_like(scores).scatter(-1, ids, weights)
    return {
        "scores": {
            "stock": lambda: queries @ states.transpose(-1, -2),
            "ours": lambda: inner_products(queries, states),
        },
        "top-k": {
            "stock": lambda: scores.topk(kept, dim=-1, sorted=False),
            "ours": lambda: largest(scores, kept),
        },
        "gather": {
            "stock": lambda: weights.unsqueeze(-2) @ states[0, 0][ids[0, 0]],
            "ours": lambda: gathered_sums(weights, ids, states),
        },
        "dense instead of gather": {"stock": lambda: dense @ states, "ours": lambda: weighted_sums(dense, states)},
    }


def steps(source: int, hidden: int, heads: int, kept: int, beams: int) -> dict[str, dict[str, object]]:
    """Whole attention steps: ours over hidden states and over keys and values, beside sdpa over the same keys."""
    head_dim = hidden // heads
    states = torch.randn(1, 1, source, hidden)
    keys, values = torch.randn(1, heads, source, head_dim), torch.randn(1, heads, source, head_dim)
    folded = torch.randn(1, 1, heads * beams, hidden) * hidden**-0.5
    query = torch.randn(1, heads, beams, head_dim) * head_dim**-0.5
    choice, half = KeyChoice(kept), states.bfloat16()

    def stock() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)

    return {
        "keys_values": {"stock": stock, "ours": lambda: knn_attention(query, keys, values, choice)},
        "keys_values, all keys": {"stock": stock, "ours": lambda: knn_attention(query, keys, values, KeyChoice())},
        "hidden": {"stock": stock, "ours": lambda: knn_attention(folded, states, states, choice)},
        "hidden, bf16 memory": {"stock": stock, "ours": lambda: knn_attention(folded, half, half, choice)},
    }


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", type=int, default=[2048, 8192, 32768, 262144])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kept", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse(argv)
    about = machine()
    print(about)
    rows = []
    for source in arguments.sources:
        shape = (source, arguments.hidden, arguments.heads, min(arguments.kept, source))
        cases = {f"kernel: {name}": calls for name, calls in kernels(*shape).items()}
        for beams in (1, 4):
            cases |= {f"step, {beams} beams: {name}": calls for name, calls in steps(*shape, beams).items()}
        read_once = 4 * source * arguments.hidden / (about["read GB/s"] * 1e9)
        for name, calls in cases.items():
            times = in_turn(calls, arguments.rounds)
            ours = statistics.median(times["ours"])
            compared = ratio(times["stock"], times["ours"])
            bytes_read = read_once * (2 if "keys_values" in name else 0.5 if "bf16" in name else 1)
            rows.append(
                {
                    "source": source,
                    "what": name,
                    "ms": round(1e3 * ours, 3),
                    "stock ms": round(1e3 * statistics.median(times["stock"]), 3),
                    "stock / ours": compared,
                    "times reading once": round(ours / bytes_read, 2),
                }
            )
            print(
                f"{source:7} {name:42} {rows[-1]['ms']:9.2f} ms   stock {rows[-1]['stock ms']:9.2f} ms   ratio "
                f"{compared['median']:.2f} [{compared['low']:.2f}, {compared['high']:.2f}]   "
                f"{rows[-1]['times reading once']:.1f} x reading once"
            )
    name = f"memory_attention-{processor_kind()}"
    print("kept in", keep(name, vars(arguments), rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
