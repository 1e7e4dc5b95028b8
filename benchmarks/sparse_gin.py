"""A graph network beside attention: what it costs over the base, by how edges are stored and scores are made.

python benchmarks/sparse_gin.py --length 1024

The base is a Llama of random weights with sdpa. "adapter, ..." is SparseGINConfig on it, base frozen, against a base
whose backward pass reaches its embeddings; "model, ..." the graph-aware Llama of the same sizes, all weights trained,
against a base that is trained. "one pass" makes attention and graph of the same weights. Prints milliseconds, ratios
to the base in the same round (quartiles, above 1 is slower), edges per row, and the peak of memory that a step adds,
each measured in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys

import torch
from measuring import in_turn, keep, machine, memory_kilobytes, ratio
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from graft import LlamaForCausalLMWithGNN, LlamaGNNConfig, SparseGINConfig
from graft.modeling.graph.attention_edges import ScoredPairs

VOCABULARY = 2000


def sizes(arguments):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 11 * arguments.width // 4,
        "initializer_range": 0.1,  # sharper attention than at the start of training: rows have edges to keep
        "max_position_embeddings": 65536,
        "attn_implementation": "sdpa",
    }


def base_model(arguments):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes(arguments)))


def frozen_base(arguments):
    base = base_model(arguments).requires_grad_(False)
    base.enable_input_require_grads()
    return base


def adapter(arguments, **options):
    torch.manual_seed(1)
    config = SparseGINConfig(task_type="CAUSAL_LM", rank=arguments.rank, dropout=0.0, **options)
    return get_peft_model(frozen_base(arguments), config)


def model(arguments, storage, shares_scores):
    torch.manual_seed(0)
    sparse = {"rank": arguments.rank, "dropout": 0.0, "storage": storage}
    options = {"attention": "llama", "sparse": sparse, "shares_scores": shares_scores}
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**sizes(arguments), gnn_config=options))


SYSTEMS = {
    "base, frozen": frozen_base,
    "base, trained": base_model,
    "adapter, dense": lambda a: adapter(a, storage="dense"),
    "adapter, stored edges": lambda a: adapter(a, storage="sparse"),
    "adapter, dense, one pass": lambda a: adapter(a, storage="dense", shares_scores=True),
    "adapter, stored edges, one pass": lambda a: adapter(a, storage="sparse", shares_scores=True),
    "adapter, dense, trained edges": lambda a: adapter(a, storage="dense", trains_adjacency=True),
    "adapter, stored edges, trained": lambda a: adapter(a, storage="sparse", trains_adjacency=True),
    "model, dense": lambda a: model(a, "dense", False),
    "model, stored edges": lambda a: model(a, "sparse", False),
    "model, dense, one pass": lambda a: model(a, "dense", True),
    "model, stored edges, one pass": lambda a: model(a, "sparse", True),
}


def ids_of(arguments):
    rng = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (arguments.batch, arguments.length), generator=rng)


def calls_of(arguments, system):
    """Forward, and forward with backward."""
    ids = ids_of(arguments)

    def forward():
        with torch.no_grad():
            return system(input_ids=ids).logits

    def both():
        system(input_ids=ids, labels=ids).loss.backward()
        system.zero_grad()

    return {"forward": forward, "forward + backward": both}


def check(arguments, systems):
    """Refuse to time what is wrong: ways of one system agree, and a disabled adapter is the base.

    A weight that lies at the cut is an edge or none by its rounding, so one token in a hundred may differ.
    """
    found = {name: calls_of(arguments, system)["forward"]() for name, system in systems.items()}
    for kind in ("adapter", "model"):
        names = [name for name in found if name.startswith(kind)]
        for name in names[1:]:
            differs = ((found[name] - found[names[0]]).abs() > 2e-3).any(-1)
            if differs.float().mean() > 0.01:
                raise AssertionError(f"{name!r} and {names[0]!r} differ at {int(differs.sum())} tokens.")
    with systems["adapter, dense"].disable_adapter():
        torch.testing.assert_close(calls_of(arguments, systems["adapter, dense"])["forward"](), found["base, frozen"])


def edges_per_row(system, forward):
    """Mean and most edges of a row in one forward pass, over all layers, read where the adapter makes them."""
    counts, updates = [], system.base_model.sparse_gin.adapters["default"].layers
    for update in updates.values():
        made = update.edges

        def counting(pairs: ScoredPairs, made=made):
            edges = made(pairs)
            counts.append((edges.whole().weight != 0).sum(-1))
            return edges

        update.edges = counting
    forward()
    for update in updates.values():
        del update.edges
    joined = torch.cat([count.flatten() for count in counts])
    return {"mean": round(float(joined.float().mean()), 1), "most": int(joined.max())}


def run_alone(arguments):
    system = SYSTEMS[arguments.alone](arguments)
    before = memory_kilobytes("VmRSS")
    calls_of(arguments, system)["forward + backward"]()
    print((memory_kilobytes("VmHWM") - before) / 1024)


def peak_megabytes(arguments, name):
    """Of one step in a fresh process, above what it had before the step."""
    command = [sys.executable, __file__, "--alone", name]
    for option in ("length", "batch", "width", "layers", "rank", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout.strip().splitlines()[-1]), 1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 1024), ("batch", 1), ("width", 512), ("layers", 4), ("rank", 155)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", choices=SYSTEMS)
    return parser.parse_args()


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        run_alone(arguments)
        return
    about, systems = machine(), {name: make(arguments) for name, make in SYSTEMS.items()}
    for system in systems.values():
        system.eval()
    check(arguments, systems)
    rows = []
    for passes in ("forward", "forward + backward"):
        times = in_turn({n: calls_of(arguments, s)[passes] for n, s in systems.items()}, arguments.rounds)
        for name, seconds in times.items():
            milliseconds = round(1000 * statistics.median(seconds), 1)
            rival = "base, trained" if name.startswith("model") else "base, frozen"
            over = ratio(seconds, times[rival])
            rows.append({"system": name, "passes": passes, "ms": milliseconds, "over base": over})
            print(f"{name:32} {passes:20} {milliseconds:9.1f} ms   {over['median']:6.2f} x {rival}", flush=True)
    for row in rows[len(systems) :]:
        row["peak MB"] = peak_megabytes(arguments, row["system"])
        print(f"{row['system']:32} peak {row['peak MB']:8.1f} MB", flush=True)
    edges = edges_per_row(systems["adapter, dense"], calls_of(arguments, systems["adapter, dense"])["forward"])
    print(f"edges per row: {edges}")
    settings = {k: v for k, v in vars(arguments).items() if k != "alone"} | {"edges per row": edges}
    print(keep(f"sparse_gin-{arguments.length}", settings, rows, about))


if __name__ == "__main__":
    main()
