"""Whether a retro-fitted model reads what it retrieves, on documents held out of training and of the database.

python examples/retrofit_smollm2.py --run runs/retrofit --minutes 20
python benchmarks/retrofit_quality.py --run runs/retrofit

Scores every token that may read neighbours three ways: with the neighbours of its chunk ("true"), without ("none":
the frozen base), and with those of a row half the data set away ("random"). true < random is retrieval, random < none
is what the new weights learnt of the documents' style. Intervals are bootstrapped over rows. Tokens are also parted by
how much of their chunk, in 8-grams, stands in the neighbours that it reads: gains where nothing stands there are no
copies. Prints a table, times a forward pass with and without retrieval in turn, keeps all in benchmarks/results/.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from measuring import bootstrap, in_turn, keep, machine, ratio
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from graft.modeling.retro.retrofit import RetroFit
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.retrieval.corpus.retro_dataset import RetroDataset

KINDS = ("true", "none", "random")
GRAM = 8
BUCKETS = ((0.0, 0.0), (0.0, 0.25), (0.25, 1.0))


def token_losses(model, batch, kind: str, m: int) -> torch.Tensor:
    """(rows, chunks - 1, m) negative log-likelihoods of the tokens from the second chunk on; NaN where none is due."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if kind != "none":
        inputs["retrieved"] = batch[kind]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    losses = losses.masked_fill((labels == -100) | (batch["position_ids"][:, 1:] < m), torch.nan)
    return losses[:, m - 1 :].unflatten(1, (-1, m))


def grams(ids: list[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)}


def overlaps(batch, m: int) -> torch.Tensor:
    """(rows, chunks - 1): share of a chunk's 8-grams that stand in the neighbours which it reads."""
    rows = []
    for ids, neighbours in zip(batch["input_ids"].tolist(), batch["true"].tolist(), strict=True):
        found = []
        for chunk in range(1, len(ids) // m):
            own = grams(ids[chunk * m : (chunk + 1) * m])
            read = set().union(*(grams(neighbour) for neighbour in neighbours[chunk - 1]))
            found.append(len(own & read) / len(own))
        rows.append(found)
    return torch.tensor(rows)


def mean(losses: torch.Tensor) -> float:
    return float(losses.nanmean())


def interval(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Difference of mean losses, first - second, with a 95 % bootstrap interval over rows."""
    gap = (first - second).flatten(1)
    return bootstrap(gap.nansum(1).tolist(), gap.isfinite().sum(1).tolist())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--run", type=Path, default=Path("runs/retrofit"), help="of examples/retrofit_smollm2.py")
    parser.add_argument("--rows", type=int, default=40, help="held-out rows scored")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    arguments = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    handle = RetroFit.from_pretrained(model, arguments.run / "adapter")
    m = handle.config.chunk_size
    held_out = Corpus(arguments.run / "test")
    data, collate = RetroDataset(held_out), DataCollatorForRetro(held_out.pad_token_id)
    losses = {kind: [] for kind in KINDS}
    shares = []
    count = min(arguments.rows, len(data))
    for place in tqdm(range(count), desc="rows"):
        index = round(place * len(data) / count)
        batch = collate([data[index]])
        batch |= {
            "true": batch["retrieved"],
            "random": collate([data[(index + len(data) // 2) % len(data)]])["retrieved"],
        }
        shares.append(overlaps(batch, m))
        for kind in KINDS:
            losses[kind].append(token_losses(model, batch, kind, m))
    all_losses = {kind: torch.cat(parts) for kind, parts in losses.items()}
    share = torch.cat(shares)
    rows = [summary("all tokens that read", all_losses)]
    for low, high in BUCKETS:
        inside = (share == 0) if high == 0 else (share > low) & (share <= high)
        part = {kind: each.masked_fill(~inside[..., None], torch.nan) for kind, each in all_losses.items()}
        name = "no 8-gram in neighbours" if high == 0 else f"{low:.0%} < 8-grams in neighbours <= {high:.0%}"
        rows.append(summary(name, part))
    times = in_turn(
        {kind: lambda kind=kind: token_losses(model, batch, kind, m) for kind in ("true", "none")}, arguments.rounds
    )
    seconds = {kind: sorted(found)[len(found) // 2] for kind, found in times.items()}
    print(f"{handle}\n{'tokens':36}{'count':>7}{'true':>9}{'none':>9}{'random':>9}   true - random [95 %]")
    for row in rows:
        gap = row["true - random"]
        figures = "".join(f"{row[kind]:9.4f}" for kind in KINDS)
        print(
            f"{row['tokens']:36}{row['count']:7}{figures}   {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
        )
    cost = ratio(times["true"], times["none"])
    print(
        f"a forward pass of {data.sequence_length} tokens with retrieval takes {cost['median']} of one without {cost}"
    )
    figures = json.loads((arguments.run / "figures.json").read_text())
    settings = {
        "model": arguments.model,
        "options": {name: value for name, value in handle.config.to_dict().items() if value is not None},
        "trainable_share": round(handle.trainable_share, 4),
        "held_out_rows": count,
        "training": {name: figures[name] for name in ("training_rows", "steps", "curves")},
        "database_chunks": data.database.num_chunks,
    }
    timing = {"seconds": seconds, "with / without": cost}
    print(keep("retrofit_quality", settings, [*rows, {"forward": timing}], machine()))
    return 0


def summary(name: str, losses: dict[str, torch.Tensor]) -> dict:
    row = {"tokens": name, "count": int(losses["true"].isfinite().sum())}
    row |= {kind: round(mean(each), 4) for kind, each in losses.items()}
    row["true - random"] = interval(losses["true"], losses["random"])
    row["true - none"] = interval(losses["true"], losses["none"])
    return row


if __name__ == "__main__":
    sys.exit(main())
