"""What memory recovers of what a short window loses: a real pretrained model, real documents, the same tokens scored.

python benchmarks/memory_quality.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Of each document the next `scored` tokens after `memory` + `local` are scored five ways: after the local tokens only,
after a window of local tokens, after everything (full context), and after the local tokens with everything before
them in memory, by several rules. Prints perplexities and the share of the gap from local to full that each closes,
with a bootstrap interval over documents, and keeps every number in benchmarks/results/.
"""

import argparse
import dataclasses
import itertools
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

from graft import UnlimiformerConfig, unlimiform

logger = logging.getLogger(__name__)


def likelihood(model, inputs: dict, scored: int) -> float:
    """Mean negative log-likelihood of the last `scored` tokens."""
    with torch.no_grad():
        logits = model(**inputs).logits[0, -scored - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, -scored:]))


def measure(model, ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Every way of scoring the end of one document, (1, memory + local + scored)."""
    local, scored = arguments.local, arguments.scored
    plain = {
        "local": local,
        f"window {arguments.window}": arguments.window,
        "full context": arguments.memory + local,
    }
    found = {
        name: likelihood(model, {"input_ids": ids[:, -scored - context :]}, scored) for name, context in plain.items()
    }
    question = ids[:, -scored - local :]
    layers = model.config.num_hidden_layers
    for positions in arguments.positions:
        config = UnlimiformerConfig(window=arguments.window, overlap=arguments.overlap, positions=positions)
        with unlimiform(model, config) as unlimited:
            memory = unlimited.remember(ids[:, : arguments.memory])
            for first, keys in itertools.product(arguments.first_layers, arguments.keys):
                options = dataclasses.replace(
                    config, keys_per_query=None if keys == "all" else int(keys), first_layer=int(first * layers)
                )
                changed = dataclasses.replace(memory, config=options)
                name = f"memory, {positions}, layers {int(first * layers)}-{layers - 1}, keys {keys}"
                found[name] = likelihood(model, changed.inputs(question), scored)
    return found


def summarise(rows: list[dict[str, float]], seed: int = 0) -> list[dict[str, float | str | list[float]]]:
    """Perplexity of each way, and the share of the gap it closes with a 95 % bootstrap interval over documents."""
    draw = random.Random(seed)
    samples = [draw.choices(range(len(rows)), k=len(rows)) for _ in range(2000)]

    def share(name: str, chosen) -> float:
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
            }
        )
    return table


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", type=Path, required=True, help="folder of graft's documentation data set")
    parser.add_argument("--count", type=int, default=12, help="documents, at most two of a package")
    parser.add_argument("--memory", type=int, default=3072)
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--positions", nargs="+", default=["squeeze", "true", "origin"])
    parser.add_argument("--first-layers", nargs="+", type=float, default=[0.0, 0.5], help="shares of the depth")
    parser.add_argument("--keys", nargs="+", default=["32", "64", "512", "all"])
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def choose_documents(arguments: argparse.Namespace, tokenizer) -> list[tuple[str, torch.Tensor]]:
    """The first documents of the test and validation splits that are long enough, at most two of a package."""
    needed = arguments.memory + arguments.local + arguments.scored
    table = pandas.concat(
        pandas.read_parquet(arguments.documents / f"documents-{split}.parquet") for split in ("test", "validation")
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
    rows = [measure(model, ids, arguments) for _, ids in tqdm(documents, unit="document")]
    table = summarise(rows)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}; {len(rows)} documents")
    print(f"tokens: {arguments.memory} in memory, {arguments.local} local, {arguments.scored} scored")
    for row in table:
        low, high = row["interval"]
        print(
            f"{row['how']:48} perplexity {row['perplexity']:7.3f}   gap closed {row['gap closed']:6.2f} "
            f"[{low:.2f}, {high:.2f}]   better than local in {row['better than local']} of {len(rows)}"
        )
    name = f"memory_quality-{arguments.memory}-{arguments.local}.json"
    output = arguments.output or Path(__file__).parent / "results" / name
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    by_document = [{"document": name, **row} for (name, _), row in zip(documents, rows, strict=True)]
    result = {"settings": settings, "torch": torch.__version__, "table": table, "documents": by_document}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    logger.info("kept in %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
