"""What memory recovers of what a short window loses: a real pretrained model, real documents, the same tokens scored.

python benchmarks/memory_quality.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Of each document the next `scored` tokens after `memory` + `local` are scored several ways: after the local tokens
only, after a window of tokens, after everything (full context, up to the trained length), and after the local tokens
with everything before them in memory, by several rules. "calibrated" takes, for each document, the way (local only or
one of the memories) that best predicts the second half of the local tokens. Prints perplexities, the share of the gap
from local to full that each closes with a bootstrap interval over documents, and in how many documents it was worse
than local tokens only; keeps every number in benchmarks/results/.
"""

import argparse
import dataclasses
import json
import logging
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
from graft.modeling.unlimiformer.families import key_rotations
from graft.modeling.unlimiformer.positions import memory_positions, rotate

logger = logging.getLogger(__name__)


CALIBRATED = "calibrated"
Losses = tuple[float, float]
"""Mean negative log-likelihood of the tokens of the calibration and of the scored ones."""


def losses(model, inputs: dict, local: int, scored: int) -> Losses:
    """Losses of the second half of the last `local` tokens before the scored ones, and of the last `scored` tokens."""
    with torch.no_grad():
        logits = model(**inputs).logits[0, -scored - local // 2 - 1 : -1].float()
    each = torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -len(logits) :], reduction="none")
    return float(each[:-scored].mean()), float(each[-scored:].mean())


def measure(model, memories: dict[str, Memory], ids: torch.Tensor, local: int, arguments) -> dict[str, Losses]:
    """Every way of scoring the end of one document, (1, memory + local + scored); `memories` by rule of positions."""
    scored = arguments.scored
    plain = {"local": local}
    if local < arguments.window:
        plain[f"window {arguments.window}"] = arguments.window
    if ids.shape[1] <= model.config.max_position_embeddings:
        plain["full context"] = arguments.memory + local
    found = {
        name: losses(model, {"input_ids": ids[:, -scored - context :]}, local, scored)
        for name, context in plain.items()
    }
    layers = model.config.num_hidden_layers
    for rule, memory in memories.items():
        for first, keys in arguments.rules:
            kept = None if keys == "all" else int(keys)
            options = dataclasses.replace(memory.config, keys_per_query=kept, first_layer=int(first * layers))
            changed = dataclasses.replace(memory, config=options)
            name = f"memory, {rule}, layers {options.first_layer}-{layers - 1}, keys {keys}"
            found[name] = losses(model, changed.inputs(ids[:, -scored - local :]), local, scored)
    candidates = [name for name in found if name == "local" or name.startswith("memory")]
    found[CALIBRATED] = found[min(candidates, key=lambda name: found[name][0])]
    return found


def remember(unlimited: Unlimited, ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Memory]:
    """The memory of a document under each rule of positions, read once."""
    memory = unlimited.remember(ids)
    config, model = memory.config, unlimited.model
    places = {rule: memory_positions(ids.shape[1], arguments.window, rule)[0] for rule in arguments.positions}
    rotations = key_rotations(model)
    memories = {}
    for rule, targets in places.items():
        moves = targets - places[config.positions]
        keys = {layer: rotate(tensor, moves, rotations.get(layer)) for layer, tensor in memory.keys.items()}
        options = dataclasses.replace(config, positions=rule)
        memories[rule] = dataclasses.replace(memory, config=options, keys=keys if bool(moves.any()) else memory.keys)
    return memories


def summarise(rows: list[dict[str, float]], seed: int = 0) -> list[dict[str, float | str | list[float]]]:
    """Perplexity of each way, and the share of the gap it closes with a 95 % bootstrap interval over documents."""
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
                "worst loss to local": max(row[name] - row["local"] for row in rows),
            }
        )
    return table


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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    documents = choose_documents(arguments, tokenizer)
    found: dict[int, list[dict[str, Losses]]] = {local: [] for local in arguments.local}
    config = UnlimiformerConfig(window=arguments.window, overlap=arguments.overlap, positions=arguments.positions[0])
    with unlimiform(model, config) as unlimited:
        for _, ids in tqdm(documents, unit="document"):
            memories = remember(unlimited, ids[:, : arguments.memory], arguments)
            for local, rows in found.items():
                until = arguments.memory + local + arguments.scored
                rows.append(measure(model, memories, ids[:, :until], local, arguments))
    for local, rows in found.items():
        report(arguments, local, [name for name, _ in documents], rows)
    return 0


def _json_value(value):
    """JSON knows no NaN: where there is no full context there is no gap to close."""
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def report(arguments: argparse.Namespace, local: int, names: list[str], rows: list[dict[str, Losses]]) -> None:
    """Print the table of one number of local tokens, and keep it."""
    table = summarise([{how: loss for how, (_, loss) in row.items()} for row in rows])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}; {len(rows)} documents")
    print(f"tokens: {arguments.memory} in memory, {local} local, {arguments.scored} scored")
    for row in table:
        low, high = row["interval"]
        print(
            f"{row['how']:44} perplexity {row['perplexity']:7.3f}   gap closed {row['gap closed']:6.2f} "
            f"[{low:.2f}, {high:.2f}]   worse than local in {row['worse than local']} of {len(rows)}, "
            f"at worst by {row['worst loss to local']:+.3f} nats"
        )
    output = Path(__file__).parent / "results" / f"memory_quality-{arguments.memory}-{local}.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    result = {
        "settings": settings,
        "versions": versions,
        "table": [{name: _json_value(value) for name, value in row.items()} for row in table],
        "losses of the calibration and of the scored tokens": [
            {"document": name, **row} for name, row in zip(names, rows, strict=True)
        ],
    }
    output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    logger.info("kept in %s", output)


if __name__ == "__main__":
    sys.exit(main())
