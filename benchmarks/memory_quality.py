"""What memory recovers of what a short window loses: a real pretrained model, real documents, the same tokens scored.

python benchmarks/memory_quality.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Of each document the next `scored` tokens after `memory` + `local` are scored several ways: after the local tokens
only, after a window of tokens, after everything (full context, up to the trained length), and after the local tokens
with everything before them in memory, by several rules. The rows "auto" choose, for each document, one of the memories
or the local tokens alone: by `calibrate` on the document's own end, by the second half of the local tokens, or by
both, with a margin in standard errors; "mixture" weighs the probabilities of the local tokens alone and of the way
that auto took by how they did on all tokens before. Prints perplexities, the share of the gap from local to full that
each closes with a bootstrap interval over documents, and in how many documents it was worse than local tokens only, by
how much, and by more than two standard errors over tokens; after each document, benchmarks/results/ has all numbers.
With `--layers` also, for each memory of few keys and each layer that reads it: the mass, which is the share of the
softmax over all remembered keys that the kept ones hold, the recall, which is the share of the exact best keys that an
index found (1 without one), and the share of attention that fell on the memory rather than on local tokens.
"""

import argparse
import dataclasses
import itertools
import json
import math
import platform
import random
import sys
from pathlib import Path

import pandas
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import Memory, UnlimiformerConfig, unlimiform
from graft.modeling.unlimiformer.attach import Unlimited
from graft.modeling.unlimiformer.calibration import as_read, next_token_losses, ranked
from graft.modeling.unlimiformer.report import AttentionReport

Losses = torch.Tensor
"""Negative log-likelihood in nats, one number a token."""


@dataclasses.dataclass
class Scored:
    """What one way of reading lost on one document: on the end of its memory, near the scored tokens, on them."""

    end: Losses | None
    near: Losses
    scored: Losses

    def known(self, by: str) -> Losses:
        """What is known before the scored tokens: "end", "near", or "both"."""
        return {"end": self.end, "near": self.near, "both": torch.cat([self.end, self.near])}[by]


class LayerReport(AttentionReport):
    """Of each layer, what its kept keys hold of all: means over heads and tokens, of one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.by_layer: dict[int, dict[str, float]] = {}

    def add(self, call, blocks, share) -> None:
        super().add(call, blocks, share)
        parts = {"mass": [block[3] for block in blocks]}
        if len(blocks[0]) > 4:
            parts["recall"] = [block[4] for block in blocks]
        means = {name: float(torch.cat(part, dim=2).float().mean()) for name, part in parts.items()}
        self.by_layer[call.layer] = {
            "recall": 1.0,
            **means,
            "on memory": 1.0 if share is None else float(share.mean()),
        }


CHOICES = [(by, margin) for by in ("end", "near", "both") for margin in (0.0, 1.0, 2.0)]


def measure(
    unlimited: Unlimited, memory: Memory, ids: torch.Tensor, local: int, arguments, layers: dict[str, list]
) -> dict[str, Scored]:
    """Every way of scoring the end of one document, (1, memory + local + scored); adds to `layers` what was read."""
    model, scored, near = unlimited.model, arguments.scored, local // 2

    def found(inputs: dict, end: Losses | None = None) -> Scored:
        losses = next_token_losses(model, inputs, near + scored)
        return Scored(end, losses[:near], losses[near:])

    candidates = rules_of(memory, arguments)
    trials = unlimited.calibrate(
        memory, candidates=list(candidates.values()), local_tokens=local, tokens=arguments.calibrated
    ).trials
    ends = {str(trial.config): trial.losses for trial in trials}
    text = ids[:, -scored - local :]
    ways = {"local": found({"input_ids": text}, ends["None"])}
    if local < arguments.window:
        ways[f"window {arguments.window}"] = found({"input_ids": ids[:, -scored - arguments.window :]})
    if ids.shape[1] <= model.config.max_position_embeddings:
        ways["full context"] = found({"input_ids": ids})
    for name, config in candidates.items():
        report = LayerReport() if arguments.layers and config.keys_per_query is not None else None
        ways[name] = found(as_read(model, memory, config).inputs(text, record=report), ends[str(config)])
        if report is not None:
            layers.setdefault(name, []).append(report.by_layer)
    return ways | automatic(ways["local"], {name: (config, ways[name]) for name, config in candidates.items()})


def rules_of(memory: Memory, arguments: argparse.Namespace) -> dict[str, UnlimiformerConfig]:
    """The ways of reading a memory that are tried, by name."""
    layers = memory.model_config.num_hidden_layers
    found = {}
    for rule, (first, keys) in itertools.product(arguments.positions, arguments.rules):
        kept = None if keys == "all" else int(keys)
        config = dataclasses.replace(
            memory.config, positions=rule, keys_per_query=kept, first_layer=int(first * layers)
        )
        found[f"memory, {rule}, layers {config.first_layer}-{layers - 1}, keys {keys}"] = config
    return found


def automatic(local: Scored, memories: dict[str, tuple[UnlimiformerConfig, Scored]]) -> dict[str, Scored]:
    """The ways that choose among the local tokens alone and the memories, by what is known before the scored ones."""
    by_config = {str(config): found for config, found in memories.values()} | {"None": local}
    ways = {}
    for by, margin in CHOICES:
        losses = [(config, found.known(by)) for config, found in memories.values()]
        chosen = by_config[str(ranked(local.known(by), losses, margin)[0].config)]
        ways[f"auto by {by}, margin {margin:g}"] = chosen
        if margin == 0:
            ways[f"mixture, {by}"] = dataclasses.replace(local, scored=mixture(local, chosen))
    return ways


def mixture(*ways: Scored) -> Losses:
    """Losses of the Bayesian mixture of ways, whose weights follow the losses of all tokens from the near ones on.

    Its sum over tokens is above that of the best way by at most log(number of ways).
    """
    losses = torch.stack([torch.cat([way.near, way.scored]) for way in ways]).double()
    before = losses.cumsum(1) - losses
    mixed = (-before).logsumexp(0) - (-before - losses).logsumexp(0)
    return mixed[-len(ways[0].scored) :]


def lost(found: Scored, local: Scored) -> tuple[float, float]:
    """Mean of what a way lost more than the local tokens alone, and its standard error over tokens."""
    more = found.scored - local.scored
    return float(more.mean()), float(more.std() / len(more) ** 0.5)


def summarise(documents: list[dict[str, Scored]], seed: int = 0) -> list[dict[str, float | str | list[float]]]:
    """Perplexity of each way, and the share of the gap it closes with a 95 % bootstrap interval over documents."""
    rows = [{name: float(found.scored.mean()) for name, found in document.items()} for document in documents]
    draw = random.Random(seed)
    samples = [draw.choices(range(len(rows)), k=len(rows)) for _ in range(2000)]

    def share(name: str, chosen) -> float:
        if "full context" not in rows[0]:
            return math.nan
        lost, won = (sum(rows[i]["local"] - rows[i][other] for i in chosen) for other in ("full context", name))
        return won / lost if lost else math.nan

    table = []
    for name in rows[0]:
        shares = sorted(share(name, chosen) for chosen in samples)
        table.append(
            {
                "how": name,
                "perplexity": math.exp(sum(row[name] for row in rows) / len(rows)),
                "gap closed": share(name, range(len(rows))),
                "interval": [shares[50], shares[-51]],
                "better than local": sum(row[name] < row["local"] for row in rows),
                "worse than local": sum(row[name] > row["local"] for row in rows),
                "worse by two errors": sum(
                    more > 2 * error for more, error in (lost(d[name], d["local"]) for d in documents)
                ),
                "worst loss to local": max(row[name] - row["local"] for row in rows),
            }
        )
    return table


def layer_table(documents: list[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """Means over documents of what each layer's kept keys hold."""
    return {
        layer: {name: sum(each[layer][name] for each in documents) / len(documents) for name in found}
        for layer, found in sorted(documents[0].items())
    }


def rule(text: str) -> tuple[float, str]:
    """ "0.5:8" as (0.5, "8"): the upper half of the layers keeps 8 keys for each query."""
    first, keys = text.split(":")
    return float(first), keys


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=Path, required=True, help="folder of graft's documentation data set")
    parser.add_argument("--count", type=int, default=12, help="documents, at most two of a package")
    parser.add_argument("--memory", type=int, default=3072)
    parser.add_argument("--local", nargs="+", type=int, default=[256])
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument(
        "--calibrated", type=int, default=256, help="tokens at the memory's end that calibration scores"
    )
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--positions", nargs="+", default=["squeeze", "true", "origin"])
    parser.add_argument(
        "--rules",
        nargs="+",
        type=rule,
        default=[(first, keys) for first in (0.0, 0.5) for keys in ("32", "64", "512", "all")],
        help="depth at which layers begin to read the memory and keys per query, as in 0.5:8 or 0:all",
    )
    parser.add_argument("--layers", action="store_true", help="also measure recall and mass of each layer")
    return parser.parse_args(argv)


def choose_documents(arguments: argparse.Namespace, tokenizer) -> list[tuple[str, torch.Tensor]]:
    """The first documents that are long enough, at most two of a package; the model was trained on no split."""
    needed = arguments.memory + max(arguments.local) + arguments.scored
    table = pandas.concat(
        pandas.read_parquet(arguments.documents / f"documents-{split}.parquet")
        for split in ("test", "validation", "train")
    )
    chosen, taken = [], {}
    for row in table.itertuples():
        ids = tokenizer(row.text, return_tensors="pt").input_ids[:, :needed]
        if ids.shape[1] == needed and taken.get(row.package, 0) < 2 and len(chosen) < arguments.count:
            taken[row.package] = taken.get(row.package, 0) + 1
            chosen.append((row.id, ids))
    return chosen


def main(argv=None) -> int:
    arguments = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    documents = choose_documents(arguments, tokenizer)
    found: dict[int, list[dict[str, Scored]]] = {local: [] for local in arguments.local}
    layers: dict[int, dict[str, list]] = {local: {} for local in arguments.local}
    config = UnlimiformerConfig(window=arguments.window, overlap=arguments.overlap, positions=arguments.positions[0])
    with unlimiform(model, config) as unlimited:
        for _, ids in tqdm(documents, unit="document"):
            memory = unlimited.remember(ids[:, : arguments.memory])
            for local, rows in found.items():
                until = arguments.memory + local + arguments.scored
                rows.append(measure(unlimited, memory, ids[:, :until], local, arguments, layers[local]))
                keep(arguments, local, documents, rows, layers[local])
    for local, rows in found.items():
        show(arguments, local, rows)
        for name, of_documents in layers[local].items():
            print(f"{name}, by layer:")
            for layer, values in layer_table(of_documents).items():
                print(f"  layer {layer:2}  " + "   ".join(f"{what} {value:.3f}" for what, value in values.items()))
    return 0


def _json_value(value):
    """JSON knows no NaN: where there is no full context there is no gap to close."""
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def show(arguments: argparse.Namespace, local: int, rows: list[dict[str, Scored]]) -> None:
    """Print the table of one number of local tokens."""
    print(f"{len(rows)} documents; {arguments.memory} tokens in memory, {local} local, {arguments.scored} scored")
    for row in summarise(rows):
        low, high = row["interval"]
        print(
            f"{row['how']:44} perplexity {row['perplexity']:7.3f}   gap closed {row['gap closed']:6.2f} "
            f"[{low:.2f}, {high:.2f}]   worse than local in {row['worse than local']} of {len(rows)} "
            f"({row['worse by two errors']} by two errors), at worst by {row['worst loss to local']:+.3f} nats"
        )


def keep(
    arguments: argparse.Namespace, local: int, documents: list, rows: list[dict[str, Scored]], layers: dict[str, list]
) -> None:
    """Write the table of one number of local tokens, and the means of every document, to benchmarks/results/."""
    output = Path(__file__).parent / "results" / f"memory_quality-{arguments.memory}-{local}-calibrated.json"
    if arguments.layers:
        output = output.with_name(output.name.replace("calibrated", "layers"))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    means = [
        {
            "document": name,
            **{
                how: {
                    "end": None if found.end is None else round(float(found.end.mean()), 4),
                    "near": round(float(found.near.mean()), 4),
                    "scored": round(float(found.scored.mean()), 4),
                    "more than local, and its error": [round(value, 4) for value in lost(found, row["local"])],
                }
                for how, found in row.items()
            },
        }
        for (name, _), row in zip(documents, rows, strict=False)
    ]
    result = {
        "settings": settings,
        "documents": len(rows),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
        "table": [{name: _json_value(value) for name, value in row.items()} for row in summarise(rows)],
        "mean losses in nats": means,
    }
    if layers:
        result["by layer"] = {name: layer_table(of_documents) for name, of_documents in layers.items()}
    output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
