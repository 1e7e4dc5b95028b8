"""Decoding with graph layers: milliseconds per token with a cache and without, and bytes of the cache, by length.

python benchmarks/graph_decoding.py --lengths 256 1024 --variants gin pna sparse
python benchmarks/graph_decoding.py --original PATH/src --original-python ENV/bin/python

Random weights; the rival is a plain Llama of the same sizes with its cache, in turn with ours. First the logits of
cached and uncached decoding are compared. Cache bytes stand beside what the table of each variant promises. The
original cannot decode with a cache (it crashes): with --original its uncached step is timed in its own environment,
which graph_models.py describes.

`--adapted` times a sparse-GIN adapter beside its base, in the shapes of two models that people have; weights are
random. "shared" makes attention's answer of the adapter's weights.
"""

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from measuring import in_turn, keep, machine, ratio
from peft import get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from worker_process import Worker, standing

from graft import LlamaForCausalLMWithGNN, LlamaGNNConfig, SparseGINConfig
from graft.modeling.transformers_compat import cache_argument

MODEL_WORKER = Path(__file__).parent / "graph_model_worker.py"
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}
RANK = 64
LATENT = 32
VARIANTS = {
    "gin": {},
    "gin relu": {"edges": {"transform": "relu"}},
    "gin differential": {"differential": True},
    "pna": {"attention": "pna"},
    "sparse": {"attention": "llama", "sparse": {"rank": RANK}},
    "sparse per head": {"attention": "llama", "sparse": {"rank": 8, "per_head": True}},
    "cg": {"attention": "cg", "latent": {"tokens_per_latent": [LATENT]}},
    "halfway gin": {"attention": "llama", "mlp": "halfway_gin"},
}


ADAPTED = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def promised(name: str, length: int) -> int | None:
    """Numbers that the cache of one layer holds after `length` tokens; None where groups make it uneven."""
    groups, heads, width, inner = 4, 8, SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = groups * width // heads
    each = {
        "gin": keys + width,
        "gin relu": keys + width,
        "gin differential": 2 * keys + width,
        "pna": 2 * keys,
        "sparse": 2 * keys + RANK,
        "sparse per head": 2 * keys + heads * 8,
        "halfway gin": 2 * keys + inner,
        "plain": 2 * keys,
    }
    return each[name] * length if name in each else None


def tensors_of(thing, seen: set[int]) -> int:
    """Bytes of all tensors that a cache holds, each storage once."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        key = thing.untyped_storage().data_ptr()
        if key in seen:
            return 0
        seen.add(key)
        return thing.numel() * thing.element_size()
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else None
    if parts is None:
        if type(thing).__module__.startswith(("graft", "transformers.cache_utils")):
            parts = vars(thing).values()
        else:
            return 0
    return sum(tensors_of(part, seen) for part in parts)


def build(options: dict | None):
    torch.manual_seed(0)
    if options is None:
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return LlamaForCausalLMWithGNN(LlamaGNNConfig(**SIZES, gnn_config=options)).eval()


def filled(model, ids: torch.Tensor) -> SimpleNamespace:
    """A cache with all of `ids` in it, and a step that decodes one more token and takes it out again."""
    cache = DynamicCache(config=model.config)
    model(ids, **cache_argument(cache), use_cache=True)
    after = tensors_of(cache, set())

    def step() -> torch.Tensor:
        logits = model(ids[:, -1:], **cache_argument(cache), use_cache=True).logits[:, -1]
        cache.crop(-1)
        return logits

    return SimpleNamespace(step=step, bytes=after)


@torch.no_grad()
def row(name: str, length: int, rounds: int, original: Worker | None = None) -> dict:
    """One variant at one length: ours cached, uncached, the plain model cached and the original, in turn."""
    ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    model, plain = build(VARIANTS[name]), build(None)
    ours, rival = filled(model, ids), filled(plain, ids)
    torch.testing.assert_close(ours.step(), model(longer, use_cache=False).logits[:, -1], atol=1e-3, rtol=1e-3)
    calls = {"ours": ours.step, "plain": rival.step, "uncached": lambda: model(longer, use_cache=False)}
    if original is not None:
        calls["original"] = lambda: original.ask("fwd")
    times = in_turn(calls, rounds)
    numbers = promised(name, length)
    found = {
        "variant": name,
        "length": length,
        "ms cached": round(1e3 * statistics.median(times["ours"]), 2),
        "ms uncached": round(1e3 * statistics.median(times["uncached"]), 2),
        "ms plain cached": round(1e3 * statistics.median(times["plain"]), 2),
        "uncached / cached": ratio(times["uncached"], times["ours"]),
        "cached / plain": ratio(times["ours"], times["plain"]),
        "cache bytes": ours.bytes,
        "promised bytes": None if numbers is None else 4 * numbers * SIZES["num_hidden_layers"],
    }
    if original is not None:
        found["ms original"] = round(1e3 * statistics.median(times["original"]), 2)
        found["original / cached"] = ratio(times["original"], times["ours"])
    return found


@torch.no_grad()
def adapted_row(name: str, length: int, rounds: int) -> dict:
    """A stock Llama of that shape alone, with an adapter, and with one that shares scores, in turn."""
    ids = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(length))
    calls = {}
    for system in ("base", "adapter", "shared"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**ADAPTED[name], tie_word_embeddings=True)).eval()
        if system != "base":
            model = get_peft_model(model, SparseGINConfig(shares_scores=system == "shared")).eval()
        calls[system] = filled(model, ids).step
    torch.testing.assert_close(calls["shared"](), calls["adapter"](), atol=1e-3, rtol=1e-3)
    times = in_turn(calls, rounds)
    found = {"variant": f"adapter on the shape of {name}", "length": length}
    for system, taken in times.items():
        found[f"ms {system}"] = round(1e3 * statistics.median(taken), 2)
        if system != "base":
            found[f"{system} / base"] = ratio(taken, times["base"])
    return found


def original_of(arguments: argparse.Namespace, length: int) -> Worker:
    """The original's GIN model, which can only read the whole text again for each token."""
    sizes = {**SIZES, "num_key_value_heads": SIZES["num_attention_heads"]}  # it crashes with fewer
    options = {"system": "original", "variant": "gin", "tokens": length + 1, "sizes": json.dumps(sizes)}
    return Worker(arguments.original_python, MODEL_WORKER, options | {"original": arguments.original})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--adapted", nargs="*", default=[], choices=list(ADAPTED))
    parser.add_argument("--result", default="graph_decoding", help="name of the file of results")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--original", type=Path, help="folder that holds the original's package xgpt")
    parser.add_argument("--original-python", default=sys.executable, help="with transformers 4.46.3")
    arguments = parser.parse_args(argv)
    about, rows = machine(), []
    print(about)
    for length in arguments.lengths:
        for name in arguments.variants:
            with contextlib.ExitStack() as stack:
                original = None
                if arguments.original is not None and name == "gin":
                    original = original_of(arguments, length)
                    stack.enter_context(standing({"original": original}))
                found = row(name, length, arguments.rounds, original)
            rows.append(found)
            print(json.dumps(found), flush=True)
        for name in arguments.adapted:
            rows.append(adapted_row(name, length, arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
    settings = {**SIZES, "adapted": {name: ADAPTED[name] for name in arguments.adapted}}
    settings |= {"rounds": arguments.rounds, "dtype": "float32", "batch": 1}
    print("kept in", keep(arguments.result, settings, rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
