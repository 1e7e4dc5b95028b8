"""Whether graphs help an adapter: the same frozen model, the same text in the same order, equal trainable parameters.

python benchmarks/graph_adapter_quality.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Each arm trains one adapter on the beginnings of documents, one a step, with each of the learning rates; the rate that
is best on validation documents trains the other seeds. Test documents then give the loss of all tokens, and of those
that name an entity which the document has named before. Arms without a graph from outside: LoRA, and sparse-GIN whose
edges are the token itself (what the paper's code computes) or attention's. With one: random earlier tokens, as many as
attention's graph keeps; chunks that share entities, alone or added to attention's edges; the same with the entities
of chunks shuffled inside the document; each row's weights moved to random earlier chunks. Each finished run is a file
in --run, so a stopped benchmark goes on. Differences come with a 95 % bootstrap interval over test documents.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import torch
from measuring import bootstrap, keep, machine
from peft import LoraConfig, get_peft_model
from sparse_gin import edges_per_row
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import ChunkGraph, SparseGINConfig, TokenEdges
from graft.atomic_files import write_json
from graft.graphs.knowledge_graph.chunk_sources import chunks_of_text
from graft.graphs.knowledge_graph.chunk_weights import chunk_weights
from graft.graphs.knowledge_graph.entity_extractors import extractor_by_name
from graft.graphs.knowledge_graph.entity_names import EntityMerger
from graft.graphs.knowledge_graph.mentions import TextChunk, place

LORA_RANK, GRAPH_RANK = 10, 31  # 38.4 and 38.9 thousand parameters a layer of SmolLM2-135M
CHUNK = 300  # characters at most


@dataclasses.dataclass(frozen=True)
class Document:
    """The beginning of a document: ids (tokens,), the chunk of each, its mentions, and entities of chunks."""

    name: str
    ids: torch.Tensor
    chunk_ids: torch.Tensor
    known: torch.Tensor
    """(tokens,), whether the token stands in a mention of an entity that was mentioned before."""
    entities: list[list[list[int]]]


def read_document(name: str, text: str, tokenizer, tokens: int) -> Document:
    """Cut to `tokens` tokens, then into chunks; a token belongs to the chunk and mention of its first character."""
    encoded = tokenizer(text[: 8 * tokens], return_offsets_mapping=True, truncation=True, max_length=tokens)
    starts = torch.tensor([start for start, _ in encoded.offset_mapping])
    text = text[: encoded.offset_mapping[-1][1]]
    extractor, merger = extractor_by_name("keyphrase"), EntityMerger()
    chunks, seen, entities = list(chunks_of_text(name, text, CHUNK)), set(), []
    known = torch.zeros(len(starts), dtype=torch.bool)
    for chunk in chunks:
        sentences: dict[int, list[int]] = {}
        for mention in place(TextChunk(name, 0, chunk.text), extractor.extract(chunk.text)):
            entity = merger.entity(mention.surface, "")
            if entity in seen:
                known |= (starts >= chunk.start + mention.start) & (starts < chunk.start + mention.end)
            seen.add(entity)
            sentences.setdefault(mention.sentence, []).append(entity)
        entities.append(list(sentences.values()))
    borders = torch.tensor([chunk.start for chunk in chunks[1:]])
    chunk_ids = torch.searchsorted(borders, starts, right=True)
    return Document(name, torch.tensor(encoded.input_ids), chunk_ids, known, entities)


# Graphs of a document; `draw` is of the document and the seed of the run. -----------------------------------------


def entity_graph(document: Document, draw: random.Random, degree: int) -> ChunkGraph:
    """Chunks read earlier ones that share entities with them, and their own past."""
    return ChunkGraph(document.chunk_ids[None], torch.from_numpy(chunk_weights(document.entities))[None])


def shuffled_graph(document: Document, draw: random.Random, degree: int) -> ChunkGraph:
    """The same, had the chunks stood in another order: as many entities, in wrong places."""
    mixed = draw.sample(document.entities, len(document.entities))
    return ChunkGraph(document.chunk_ids[None], torch.from_numpy(chunk_weights(mixed))[None])


def rewired_graph(document: Document, draw: random.Random, degree: int) -> ChunkGraph:
    """The same weights in each row, on random earlier chunks."""
    weights = chunk_weights(document.entities)
    for row in range(1, len(weights)):
        weights[row, :row] = draw.sample(weights[row, :row].tolist(), row)
    return ChunkGraph(document.chunk_ids[None], torch.from_numpy(weights)[None])


def random_edges(document: Document, draw: random.Random, degree: int) -> TokenEdges:
    """Each token reads `degree` different earlier tokens or itself, fewer at the beginning; they weigh 1 together."""
    pairs = [(0, i, j) for i in range(len(document.ids)) for j in draw.sample(range(i + 1), min(degree, i + 1))]
    counts = torch.bincount(torch.tensor(pairs)[:, 1])
    return TokenEdges(torch.tensor(pairs), (1 / counts)[torch.tensor(pairs)[:, 1]])


Graph = Callable[[Document, random.Random, int], ChunkGraph | TokenEdges]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained: LoRA of a rank, a graph network of a rank, or both, and the graph that is given."""

    lora: int = 0
    rank: int = 0
    edge_mode: str = "causal"
    graph: Graph | None = None


ARMS = {
    "LoRA": Arm(lora=LORA_RANK),
    "itself only": Arm(rank=GRAPH_RANK, edge_mode="self_only"),
    "attention": Arm(rank=GRAPH_RANK),
    "random tokens": Arm(rank=GRAPH_RANK, edge_mode="external_only", graph=random_edges),
    "entities": Arm(rank=GRAPH_RANK, edge_mode="external_only", graph=entity_graph),
    "LoRA + attention": Arm(lora=LORA_RANK // 2, rank=15),
    "attention + entities": Arm(rank=GRAPH_RANK, graph=entity_graph),
    "attention + shuffled entities": Arm(rank=GRAPH_RANK, graph=shuffled_graph),
    "attention + rewired entities": Arm(rank=GRAPH_RANK, graph=rewired_graph),
}
PAIRS = [
    *(("LoRA", "base"), ("itself only", "LoRA"), ("attention", "LoRA"), ("attention", "itself only")),
    *(("random tokens", "LoRA"), ("LoRA + attention", "LoRA")),
    *(("attention", "random tokens"), ("entities", "random tokens")),
    *(("attention + entities", "attention"), ("attention + entities", "attention + shuffled entities")),
    ("attention + entities", "attention + rewired entities"),
]


def adapted(base, arm: Arm):
    """The model with the arm's new weights, and these weights."""
    graph = SparseGINConfig(task_type="CAUSAL_LM", rank=max(arm.rank, 1), edge_mode=arm.edge_mode, dropout=0.0)
    model = base
    if arm.lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(task_type="CAUSAL_LM", r=arm.lora, lora_alpha=2 * arm.lora, target_modules=targets)
        model = get_peft_model(base, lora, adapter_name="lora")
    if arm.rank:
        model = get_peft_model(model.get_base_model() if arm.lora else base, graph, adapter_name="default")
    new = [weight for name, weight in model.named_parameters() if "lora_" in name or "sparse_gin" in name]
    for weight in new:
        weight.requires_grad_(True)
    return model, new


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a finished run depends on."""

    arm: str
    seed: int
    rate: float
    steps: int
    tokens: int

    def path(self, folder: Path) -> Path:
        return folder / f"{self.arm.replace(' ', '_')}-{self.seed}-{self.rate:g}-{self.steps}-{self.tokens}.json"


class Duel:
    """The model and the documents of all arms."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        counts = {"train": arguments.steps, "validation": arguments.validation, "test": arguments.test}
        self.documents = {split: self.read(split, count) for split, count in counts.items()}
        self.degree = self.edges_of_attention()

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.float32)

    def read(self, split: str, count: int) -> list[Document]:
        table = pandas.read_parquet(self.arguments.documents / f"documents-{split}.parquet")
        rows = table.sort_values("id").sample(frac=1, random_state=0).head(count)
        pairs = zip(rows.id, rows.text, strict=True)
        return [
            read_document(name, text, self.tokenizer, self.arguments.tokens)
            for name, text in tqdm(pairs, total=len(rows), desc=split)
        ]

    def edges_of_attention(self) -> int:
        model, _ = adapted(self.base(), ARMS["attention"])
        with torch.no_grad():
            counted = edges_per_row(model, lambda: model(input_ids=self.documents["train"][0].ids[None]))
        return max(1, round(counted["mean"]))

    def inputs(self, arm: Arm, document: Document, seed: int) -> dict:
        draw = random.Random(f"{document.name} {seed}")
        graph = {} if arm.graph is None else {"graph": arm.graph(document, draw, self.degree)}
        return {"input_ids": document.ids[None], **graph}

    def losses(self, model, arm: Arm, document: Document, seed: int) -> torch.Tensor:
        """(tokens - 1,) negative log-likelihoods in nats."""
        logits = model(**self.inputs(arm, document, seed), use_cache=False).logits[0, :-1]
        return cross_entropy(logits.float(), document.ids[1:], reduction="none")

    def train(self, run: Run) -> dict:
        """Train one arm once; what it lost on each document of both other splits, all tokens and known mentions."""
        torch.manual_seed(run.seed)
        arm = ARMS[run.arm]
        model, weights = adapted(self.base(), arm)
        optimizer = torch.optim.AdamW(weights, lr=run.rate, weight_decay=0.0)
        order = random.Random(run.seed).sample(self.documents["train"], len(self.documents["train"]))
        curve, began = [], time.monotonic()
        model.train()
        for step, document in enumerate(tqdm(order, desc=f"{run.arm}, seed {run.seed}, rate {run.rate:g}")):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * min(1.0, (step + 1) / (0.1 * run.steps), 1.1 - step / run.steps)
            loss = self.losses(model, arm, document, run.seed).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            curve.append(round(loss.item(), 4))
        seconds = (time.monotonic() - began) / run.steps
        found = {split: self.evaluate(model.eval(), arm, split, run.seed) for split in ("validation", "test")}
        trained = sum(weight.numel() for weight in weights)
        return {
            **dataclasses.asdict(run),
            "trained": trained,
            "seconds a step": round(seconds, 2),
            "curve": curve,
            **found,
        }

    @torch.no_grad()
    def evaluate(self, model, arm: Arm, split: str, seed: int) -> list[dict[str, float]]:
        rows = []
        for document in tqdm(self.documents[split], desc=split, leave=False):
            losses, known = self.losses(model, arm, document, seed), document.known[1:]
            sums = {"loss": losses.sum(), "known loss": losses[known].sum()}
            counts = {"tokens": len(losses), "known": int(known.sum())}
            rows.append({name: round(float(value), 4) for name, value in sums.items()} | counts)
        return rows

    def finished(self, run: Run) -> dict:
        """The run's file, made if it is not there."""
        path = run.path(self.arguments.run)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.train(run))
        return json.loads(path.read_text(encoding="utf-8"))


def mean(rows: list[dict[str, float]], known: bool = False) -> float:
    """Nats per token."""
    loss, count = ("known loss", "known") if known else ("loss", "tokens")
    return sum(row[loss] for row in rows) / max(1, sum(row[count] for row in rows))


def difference(first: list[list[dict]], second: list[list[dict]], known: bool) -> dict[str, float]:
    """first - second in nats per token, mean over seeds, with a 95 % bootstrap interval over documents."""
    loss, count = ("known loss", "known") if known else ("loss", "tokens")
    lost = [np.array([[row[loss] for row in rows] for rows in runs]).mean(0) for runs in (first, second)]
    return bootstrap(lost[0] - lost[1], [row[count] for row in first[0]])


def row_of(name: str, runs: list[dict]) -> dict:
    """One line of the table: the mean over seeds, and each seed."""
    losses = [mean(run["test"]) for run in runs]
    curve = [statistics.mean(run["curve"][-len(run["curve"]) // 4 :]) for run in runs if run["curve"]]
    return {
        "arm": name,
        "trained": runs[0]["trained"],
        "rate": runs[0]["rate"],
        "test loss": round(statistics.mean(losses), 4),
        "of each seed": [round(loss, 4) for loss in losses],
        "known mentions": round(statistics.mean(mean(run["test"], known=True) for run in runs), 4),
        "validation loss": round(statistics.mean(mean(run["validation"]) for run in runs), 4),
        "training loss at the end": round(statistics.mean(curve), 4) if curve else None,
        "seconds a step": round(statistics.mean(run["seconds a step"] for run in runs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--documents", type=Path, default=Path(".cache/documentation"))
    parser.add_argument("--run", type=Path, default=Path("runs/graph_adapter"), help="where finished runs are kept")
    parser.add_argument("--results", default="graph_adapter_quality", help="name of the file of results")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2], help="tried with seed 0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of one document")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document")
    parser.add_argument("--validation", type=int, default=16, help="documents")
    parser.add_argument("--test", type=int, default=40, help="documents")
    given = parser.parse_args()
    duel, about = Duel(given), machine()
    base = duel.base().eval()
    nothing = {split: duel.evaluate(base, Arm(), split, 0) for split in ("validation", "test")}
    runs = {"base": [{"trained": 0, "rate": None, "seconds a step": 0.0, "curve": [], **nothing}]}
    for seed in range(given.seeds):
        for arm in given.arms:
            rates = given.rates if seed == 0 else [runs[arm][0]["rate"]]
            tried = [duel.finished(Run(arm, seed, rate, given.steps, given.tokens)) for rate in rates]
            runs.setdefault(arm, []).append(min(tried, key=lambda run: mean(run["validation"])))
        rows = [row_of(name, found) for name, found in runs.items()]
        tests = {name: [run["test"] for run in found] for name, found in runs.items()}
        for first, second in PAIRS:
            if first in tests and second in tests:
                gaps = {"all tokens": False, "known mentions": True}
                found = {name: difference(tests[first], tests[second], known) for name, known in gaps.items()}
                rows.append({"difference": f"{first} - {second}", **found})
        for row in rows:
            print(row)
        settings = {
            name: value for name, value in vars(given).items() if name not in ("model", "documents", "run", "results")
        }
        settings["seeds"] = seed + 1
        known = sum(row["known"] for row in nothing["test"]) / sum(row["tokens"] for row in nothing["test"])
        settings |= {"degree of random tokens": duel.degree, "share of known mentions": round(known, 3)}
        print(keep(given.results, settings, rows, about))


if __name__ == "__main__":
    main()
