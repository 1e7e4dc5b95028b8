"""Indexes over the keys of a memory against exact search: recall, softmax mass, time, bytes, what blocks could skip.

python benchmarks/memory_index.py --model .cache/smollm2-135m-instruct --document book.txt.gz
python benchmarks/memory_index.py --model .cache/smollm2-135m-instruct --document long.txt --sources 1048576

One store holds the keys of one key head of one layer, as a decoder's memory does; one step asks it the queries of the
heads that share it. The keys are those of a document read by the model, the queries those of the text behind it; with
--random, normal vectors. Each kind searches in turn with exact search (`exact_search.py`), on the threads torch has.
"mass" is the share of the softmax over all keys that the found ones hold; the exact best hold "most". "blocks" are the
bounds of Quest (Tang et al. 2024, arXiv 2406.10774) used exactly: the share of blocks whose upper bound reaches the
smallest score that is kept, so that they must be read, and the time of the bounds alone.

"step" is one step of attention as a memory does it, with its softmax and its sum of values: `knn_attention` over all
keys against `indexed_attention` over the candidates. --token times whole tokens of the model behind a memory of the
document, exact against indexed, every layer and key head with an index of its own:

python benchmarks/memory_index.py --token --model .cache/smollm2-135m-instruct --document book.txt.gz --kinds ivf_flat
"""

import argparse
import gzip
import statistics
import sys
from pathlib import Path

import torch
from measuring import in_turn, keep, machine, ratio, seconds
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from graft import UnlimiformerConfig, unlimiform
from graft.modeling.unlimiformer.indexed_attention import Search, indexed_attention
from graft.modeling.unlimiformer.key_index import CODED
from graft.modeling.unlimiformer.knn_attention import KeyChoice, knn_attention
from graft.retrieval.datastore import Datastore
from graft.retrieval.exact_search import inner_products, largest

KINDS = {
    "flat": ("flat", {}, {}),
    "ivf_flat, nprobe 16": ("ivf_flat", {}, {"nprobe": 16}),
    "ivf_flat, nprobe 64": ("ivf_flat", {}, {"nprobe": 64}),
    "ivf_flat, nprobe 256": ("ivf_flat", {}, {"nprobe": 256}),
    "ivf_pq, 16 bytes, nprobe 64": ("ivf_pq", {"code_size": 16}, {"nprobe": 64}),
    "hnsw, ef_search 128": ("hnsw", {}, {"ef_search": 128}),
    "scalar": ("scalar", {}, {}),
}
QUERIES = 192
"""Queries over which recall and mass are means."""


def real_keys(arguments) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys (source, head_dim) and scaled queries (steps, heads of the group, head_dim) by layer and length."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    first, last = min(arguments.layers), max(arguments.layers) + 1
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, num_hidden_layers=last).eval()
    ids = tokenizer(text_of(arguments.document), return_tensors="pt").input_ids
    window, steps = 1024, QUERIES // 3
    config = UnlimiformerConfig(window=window, overlap=0.0, positions="squeeze", first_layer=first, last_layer=last)
    found = {}
    for source in arguments.sources:
        if ids.shape[1] < source + 256:
            raise ValueError(f"--document has {ids.shape[1]} tokens, {source} and 256 behind them are asked for")
        with unlimiform(model, config) as unlimited:
            memory = unlimited.remember(ids[:, :source], progress=True)
        queries = queries_of(model, ids[:, source : source + 256], window)
        for layer in arguments.layers:
            group = queries[layer][0, :3, -steps:].transpose(0, 1)
            found[f"layer {layer}, {source}"] = memory.keys[layer][0, 0].contiguous(), group.contiguous()
    return found


def queries_of(model, ids: torch.Tensor, first_position: int) -> dict[int, torch.Tensor]:
    """The scaled queries (batch, heads, target, head_dim) of each layer, tokens placed from `first_position` on."""
    seen = {}

    def noting(module, query, *rest, **options):
        seen[module.layer_idx] = query * options["scaling"]
        return sdpa_attention_forward(module, query, *rest, **options)

    AttentionInterface.register("noting", noting)
    before = model.config._attn_implementation
    model.set_attn_implementation("noting")
    with torch.no_grad():
        model.model(ids, position_ids=torch.arange(ids.shape[1])[None] + first_position)
    model.set_attn_implementation(before)
    return seen


def random_keys(arguments) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Normal vectors of 64 dimensions; queries as long as to give scores of a standard deviation of 2."""
    torch.manual_seed(0)
    return {
        f"random, {source}": (torch.randn(source, 64), torch.randn(QUERIES // 3, 3, 64) / 4)
        for source in arguments.sources
    }


def exact(keys: torch.Tensor, queries: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step of attention searches: scores and ids (count, kept)."""
    return largest(inner_products(queries[None, None], keys[None, None])[0, 0], kept)


def quality(keys: torch.Tensor, queries: torch.Tensor, ids: torch.Tensor, kept: int) -> dict[str, float]:
    """Recall of the exact best, and the share of the softmax over all keys that the found ones hold."""
    weights = (queries @ keys.T).softmax(-1)
    best = weights.topk(kept, dim=-1)
    hit = (best.indices[:, :, None] == ids[:, None]).any(-1).float().mean()
    mass = weights.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).sum(-1).mean()
    return {
        "recall": round(float(hit), 4),
        "mass": round(float(mass), 4),
        "most": round(float(best.values.sum(-1).mean()), 4),
    }


def block_bounds(keys: torch.Tensor, queries: torch.Tensor, kept: int, size: int) -> dict[str, float]:
    """Share of blocks of `size` keys that an exact search must still read, and the milliseconds of their bounds."""
    blocks = keys[: len(keys) // size * size].unflatten(0, (-1, size))
    low, high = blocks.amin(1).T.contiguous(), blocks.amax(1).T.contiguous()

    def bounds(asked: torch.Tensor) -> torch.Tensor:
        return asked.clamp(min=0) @ high + asked.clamp(max=0) @ low

    least = (queries @ keys.T).topk(kept, dim=-1).values[:, -1:]
    read = (bounds(queries) >= least).float().mean()
    union = (bounds(queries) >= least).unflatten(0, (-1, 3)).any(1).float().mean()
    step = queries[:3]
    return {
        "blocks read of one query": round(float(read), 3),
        "blocks read of one step": round(float(union), 3),
        "bounds ms": round(1e3 * statistics.median(seconds(lambda: bounds(step)) for _ in range(20)), 3),
    }


def measure(name: str, keys: torch.Tensor, asked: torch.Tensor, arguments) -> list[dict]:
    """One row for each kind of index over one set of keys."""
    kept, rows = arguments.kept, []
    queries, step = asked.flatten(0, 1), asked[0]
    values, choice = torch.randn(1, 1, *keys.shape), KeyChoice(kept)
    everything = {"keys": name, "source": len(keys), "kept": kept}
    for size in (16, 64):
        rows.append({**everything, "what": f"block bounds of {size}", **block_bounds(keys, queries, kept, size)})
    for what, (kind, parameters, options) in KINDS.items():
        if kind not in arguments.kinds or (kind == "hnsw" and len(keys) > arguments.most_hnsw):
            continue
        store = Datastore(keys.shape[1], kind, **parameters)
        build = seconds(lambda store=store: store.add(keys))
        times = in_turn(
            {
                "exact": lambda: exact(keys, step, kept),
                "index": lambda store=store, options=options: store.search(step, kept, **options),
                "exact step": lambda: knn_attention(step[None, None], keys[None, None], values, choice),
                "step": lambda store=store, kind=kind, options=options: indexed_attention(
                    step[None, None], keys[None, None], values, choice, offers(store, kind, kept, options)
                ),
            },
            arguments.rounds,
        )
        rows.append(
            {
                **everything,
                "what": what,
                "build s": round(build, 2),
                "MB": round(store.nbytes / 1e6, 2),
                "exact ms": round(1e3 * statistics.median(times["exact"]), 3),
                "ms": round(1e3 * statistics.median(times["index"]), 3),
                "exact / index": ratio(times["exact"], times["index"]),
                "exact step ms": round(1e3 * statistics.median(times["exact step"]), 3),
                "step ms": round(1e3 * statistics.median(times["step"]), 3),
                "exact step / step": ratio(times["exact step"], times["step"]),
                **quality(keys, queries, store.search(queries, kept, **options)[1], kept),
            }
        )
    return rows


def offers(store: Datastore, kind: str, kept: int, options: dict[str, int]) -> tuple[Search, int]:
    """The search that a memory's index does, and how many candidates it is asked for."""
    count = kept * CODED.get(kind, 1)
    return lambda queries, count: store.search(queries[0, 0], count, **options)[1][None, None], count


@torch.no_grad()
def whole_tokens(arguments) -> list[dict]:
    """One row for each length and kind: one token of the model behind a memory, exact against indexed."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = tokenizer(text_of(arguments.document), return_tensors="pt").input_ids
    rows = []
    for source in arguments.sources:
        options = UnlimiformerConfig(
            window=1024, overlap=0.0, keys_per_query=arguments.kept, first_layer=arguments.first_layer
        )
        with unlimiform(model, options) as unlimited:
            memory = unlimited.remember(ids[:, :source], progress=True)
            asked = ids[:, source : source + 1]
            for what, (kind, parameters, of_search) in KINDS.items():
                if kind not in arguments.kinds:
                    continue
                built = {}
                build = seconds(lambda: built.update(it=unlimited.indexed(memory, kind, parameters | of_search)))  # noqa: B023
                found = built["it"]
                times = in_turn(
                    {
                        "exact": lambda: model(**memory.inputs(asked)),  # noqa: B023
                        "index": lambda: model(**found.inputs(asked)),  # noqa: B023
                    },
                    arguments.rounds,
                )
                rows.append(
                    {
                        "keys": f"layers from {arguments.first_layer} on, {source}",
                        "source": source,
                        "kept": arguments.kept,
                        "what": what,
                        "build s": round(build, 2),
                        "MB": round(found.index_nbytes / 1e6, 1),
                        "keys and values MB": round(found.nbytes / 1e6, 1),
                        "exact token ms": round(1e3 * statistics.median(times["exact"]), 2),
                        "token ms": round(1e3 * statistics.median(times["index"]), 2),
                        "exact / index": ratio(times["exact"], times["index"]),
                        "recall": round(found.recall, 4),
                    }
                )
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def text_of(document: Path) -> str:
    """The text of a file, possibly gzipped."""
    raw = document.read_bytes()
    return (gzip.decompress(raw) if document.suffix == ".gz" else raw).decode("utf-8", "replace")


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a Llama model, whose keys are searched")
    parser.add_argument("--document", type=Path, help="a text file, possibly gzipped, with enough tokens")
    parser.add_argument("--random", action="store_true", help="normal vectors instead")
    parser.add_argument("--token", action="store_true", help="whole tokens of the model behind a memory")
    parser.add_argument("--first-layer", type=int, default=0, help="from which on --token reads the memory")
    parser.add_argument("--kinds", nargs="+", default=sorted({kind for kind, *_ in KINDS.values()}))
    parser.add_argument("--sources", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 20])
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--most-hnsw", type=int, default=40000, help="keys for which an HNSW graph is still built")
    arguments = parser.parse_args(argv)
    if not arguments.random and (arguments.model is None or arguments.document is None):
        parser.error("--model and --document are needed without --random")
    return arguments


def main(argv=None) -> int:
    arguments = parse(argv)
    about = machine()
    rows = whole_tokens(arguments) if arguments.token else []
    found = {} if arguments.token else random_keys(arguments) if arguments.random else real_keys(arguments)
    for name, (keys, asked) in found.items():
        for row in measure(name, keys, asked, arguments):
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    longest = max(arguments.sources)
    long = f"-{longest}" if longest > 2**19 else ""
    suffix = "-random" if arguments.random else f"-token-{longest}" if arguments.token else long
    print("kept in", keep(f"memory_index{suffix}", settings, rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
