"""Memory, retro-fit, sparse-GIN and LoRA on one model: what each gives alone, and all together, on the same tokens.

python benchmarks/composition.py --model .cache/smollm2-135m-instruct --documents .cache/documentation

Trains three adapters of a frozen model, one document a step, each alone and all in one model; each is saved as a
folder of PEFT's and loaded from there. Then the last tokens of held-out documents are scored, after the same local
tokens before them: by the base, by each ability alone, by all of them, with adapters that were trained alone and that
were trained together. Memory holds what lies before the local tokens; neighbours come from documents that are neither
trained on nor scored. Two rows tell what a gain is worth: neighbours of another document, and the base with
all tokens in its context. Differences come with a 95 % bootstrap interval over documents. Adapters and scores of
documents are files in --run, so a stopped benchmark goes on.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import pandas
import torch
from measuring import bootstrap, keep, machine
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import RetroFitConfig, SparseGINConfig, UnlimiformerConfig, retrofit, unlimiform
from graft.atomic_files import write_json
from graft.modeling.retro.retriever import CachingRetriever
from graft.modeling.retro.retrofit import RetroFit
from graft.modeling.unlimiformer.calibration import next_token_losses
from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus_retriever import CorpusRetriever
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder, minilm_folder
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus

CHUNK, NEIGHBOURS = 32, 2
LORA = {"r": 10, "lora_alpha": 20, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
GRAPH = {"rank": 31, "dropout": 0.0}  # as many weights as LoRA
RETROFIT = {
    "chunk_size": CHUNK,
    "cross_attention_layers": [20, 23, 26, 29],
    "num_encoder_layers": 1,
    "encoder_intermediate_size": 1152,
}
RATES = {"lora": 3e-3, "graph": 3e-3, "retrofit": 2e-3}
ADAPTERS = tuple(RATES)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of scoring: the adapters on the model, where they were trained, whether it reads a memory."""

    adapters: tuple[str, ...] = ()
    trained: str = "alone"
    memory: bool = False
    neighbours: str = "found"
    full: bool = False


ROWS = {
    "base": Row(),
    "memory": Row(memory=True),
    "retro-fit": Row(("retrofit",)),
    "retro-fit, neighbours of another document": Row(("retrofit",), neighbours="another's"),
    "sparse-GIN": Row(("graph",)),
    "LoRA": Row(("lora",)),
    "three adapters": Row(ADAPTERS),
    "three adapters, trained together": Row(ADAPTERS, trained="together"),
    "memory and LoRA": Row(("lora",), memory=True),
    "all four": Row(ADAPTERS, memory=True),
    "all four, trained together": Row(ADAPTERS, trained="together", memory=True),
    "base, full context": Row(full=True),
}
PAIRS = [
    *((name, "base") for name in list(ROWS)[1:]),
    ("retro-fit", "retro-fit, neighbours of another document"),
    *((f"all four{how}", other) for how in ("", ", trained together") for other in ("memory", "memory and LoRA")),
]


class Grafted:
    """A model with adapters on it, new ones or those of a folder; `remove` gives the base back."""

    def __init__(self, model, adapters: tuple[str, ...], folder: Path | None = None) -> None:
        self.model, self.handles = model, {}
        for name in adapters:  # one order for all rows: the retro-fit reads what the graph network wrote
            attach = getattr(self, name)
            self.handles[name] = attach(None if folder is None or not folder.exists() else folder)

    def lora(self, folder: Path | None):
        if folder is not None:
            return PeftModel.from_pretrained(self.model, folder / "lora", adapter_name="lora")
        return get_peft_model(self.model, LoraConfig(task_type="CAUSAL_LM", **LORA), adapter_name="lora")

    def graph(self, folder: Path | None):
        if folder is not None:
            return PeftModel.from_pretrained(self.model, folder / "graph", adapter_name="graph")
        return get_peft_model(self.model, SparseGINConfig(task_type="CAUSAL_LM", **GRAPH), adapter_name="graph")

    def retrofit(self, folder: Path | None):
        if folder is not None:
            return RetroFit.from_pretrained(self.model, folder / "retrofit")
        return retrofit(self.model, RetroFitConfig(**RETROFIT, pad_token_id=self.model.config.pad_token_id))

    def new_weights(self, name: str) -> list[torch.nn.Parameter]:
        handle = self.handles[name]
        if name == "retrofit":
            return handle.trainable_parameters()
        return [
            weight
            for place, weight in handle.named_parameters()
            if {"lora": "lora_", "graph": "sparse_gin"}[name] in place
        ]

    def save(self, folder: Path) -> None:
        for name, handle in self.handles.items():
            handle.save_pretrained(folder / name if name == "retrofit" else folder)

    def remove(self) -> None:
        for name, handle in self.handles.items():
            handle.remove() if name == "retrofit" else handle.unload()


class Composition:
    """The model, the documents and their neighbours."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.run = arguments, arguments.run
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        texts = self.texts("train")
        self.training, database = texts[: arguments.steps], texts[arguments.steps :][: arguments.database]
        settings = PreparationSettings(ChunkSettings(CHUNK), NEIGHBOURS, 8 * CHUNK, workers=1)
        embedder = ChunkEmbedder(minilm_folder())
        rows = [{"text": text[: arguments.characters]} for _, text in database]
        self.corpus = prepare_corpus(DatasetRows(rows), self.run / "database", self.tokenizer, embedder, settings)
        self.retriever = CachingRetriever(CorpusRetriever(self.corpus, embedder, NEIGHBOURS))
        self.tests = self.scored_documents()

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.float32).eval()

    def texts(self, split: str) -> list[tuple[str, str]]:
        table = pandas.read_parquet(self.arguments.documents / f"documents-{split}.parquet")
        rows = table.sort_values("id").sample(frac=1, random_state=0)
        return list(zip(rows.id, rows.text, strict=True))

    def scored_documents(self) -> list[tuple[str, torch.Tensor]]:
        """(1, memory + local + scored) ids of the first held-out documents that are long enough."""
        wanted, found = self.arguments, []
        length = wanted.memory + wanted.local + wanted.scored
        for name, text in self.texts("test"):
            ids = self.tokenizer(text[: 8 * length], return_tensors="pt").input_ids[:, :length]
            if ids.shape[1] == length and len(found) < wanted.test:
                found.append((name, ids))
        return found

    def neighbours(self, ids: torch.Tensor) -> torch.Tensor:
        """What is found for each whole chunk of ids (1, tokens): (1, chunks, neighbours, neighbour_length)."""
        chunks = ids[0, : ids.shape[1] // CHUNK * CHUNK].view(-1, CHUNK)
        return self.retriever(chunks)[None]

    def train(self, adapters: tuple[str, ...], folder: Path) -> dict:
        """Train new adapters in one model, on one part of each training document, and save them in `folder`."""
        torch.manual_seed(0)
        grafted, draw, steps, began = (
            Grafted(self.base(), adapters),
            random.Random(0),
            len(self.training),
            time.monotonic(),
        )
        weights = {name: grafted.new_weights(name) for name in adapters}
        optimizer = torch.optim.AdamW(
            [{"params": weights[name], "rate": RATES[name]} for name in adapters], weight_decay=0.0
        )
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.requires_grad_(True)  # each adapter that came later has frozen those before it
        curve = []
        grafted.model.train()
        for step, (_, text) in enumerate(tqdm(self.training, desc=f"train {' '.join(adapters)}")):
            ids = self.tokenizer(text[: 64 * self.arguments.tokens], return_tensors="pt").input_ids
            start = draw.randrange(max(1, ids.shape[1] - self.arguments.tokens))
            ids = ids[:, start : start + self.arguments.tokens]
            read = {"retrieved": self.neighbours(ids)} if "retrofit" in adapters else {}
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, (step + 1) / (0.1 * steps), 1.1 - step / steps)
            loss = grafted.model(input_ids=ids, labels=ids, use_cache=False, **read).loss
            optimizer.zero_grad()
            loss.backward()
            for name in adapters:
                torch.nn.utils.clip_grad_norm_(weights[name], 1.0)
            optimizer.step()
            curve.append(round(loss.item(), 4))
        grafted.save(folder)
        counts = {name: sum(weight.numel() for weight in found) for name, found in weights.items()}
        seconds = round((time.monotonic() - began) / steps, 2)
        return {"weights": counts, "seconds a step": seconds, "curve": curve}

    def trained(self, adapters: tuple[str, ...], folder: Path) -> dict:
        """What training wrote about itself, done now if it is not there."""
        record = folder / f"{'-'.join(adapters)}.json"
        if not record.exists():
            write_json(record, self.train(adapters, folder))
        return json.loads(record.read_text(encoding="utf-8"))

    @torch.no_grad()
    def score(self, row: Row, path: Path) -> dict[str, float]:
        """Nats that one way loses on each document, {name: mean of its scored tokens}; kept after each of them."""
        losses = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if len(losses) == len(self.tests):
            return losses
        model = self.base()
        grafted = Grafted(model, row.adapters, self.run / row.trained)
        model.eval()
        keys = UnlimiformerConfig(window=self.arguments.window, keys_per_query=self.arguments.keys)
        unlimited = unlimiform(model, keys) if row.memory else None
        for place, (name, ids) in enumerate(tqdm(self.tests, desc=path.stem)):
            if name in losses:
                continue
            document, text = ids[:, : self.arguments.memory], ids[:, self.arguments.memory :]
            inputs = {"input_ids": ids if row.full else text}
            if unlimited is not None:
                inputs = unlimited.remember(document).inputs(text)
            if "retrofit" in row.adapters:
                another = self.tests[(place + len(self.tests) // 2) % len(self.tests)][1][:, self.arguments.memory :]
                inputs["retrieved"] = self.neighbours(text if row.neighbours == "found" else another)
            losses[name] = float(next_token_losses(model, inputs, self.arguments.scored).mean())
            write_json(path, losses)
        if unlimited is not None:
            unlimited.remove()
        grafted.remove()
        return losses

    @torch.no_grad()
    def removal_is_exact(self) -> bool:
        """Whether the base is what it was, bit for bit, when all four have been on it and are removed."""
        model, ids = self.base(), self.tests[0][1][:, : self.arguments.local]
        before = model(ids).logits
        grafted = Grafted(model, ADAPTERS, self.run / "together")
        unlimited = unlimiform(model)
        changed = not torch.equal(model(ids, retrieved=self.neighbours(ids)).logits, before)
        unlimited.remove()
        grafted.remove()
        return changed and torch.equal(model(ids).logits, before)


def table(losses: dict[str, dict[str, float]], scored: int) -> list[dict]:
    """Perplexities, and differences in nats per token, negative where the first is better."""
    rows = []
    for name, found in losses.items():
        figures = bootstrap(list(found.values()), [1] * len(found))
        low, high = (round(math.exp(figures[end]), 3) for end in ("low", "high"))
        rows.append({"row": name, "perplexity": round(math.exp(figures["mean"]), 3), "low": low, "high": high})
    for first, second in PAIRS:
        gaps = [losses[first][document] - losses[second][document] for document in losses[first]]
        figures = bootstrap(gaps, [1] * len(gaps))
        rows.append({"difference": f"{first} - {second}", **figures, "documents worse": sum(gap > 0 for gap in gaps)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--documents", type=Path, default=Path(".cache/documentation"))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/composition"), help="where adapters and scores are kept"
    )
    parser.add_argument("--steps", type=int, default=60, help="of one document")
    parser.add_argument("--tokens", type=int, default=384, help="of each training document")
    parser.add_argument("--database", type=int, default=100, help="documents that neighbours come from")
    parser.add_argument("--characters", type=int, default=12000, help="of each document of the database")
    parser.add_argument("--memory", type=int, default=2048, help="tokens before the local ones")
    parser.add_argument("--window", type=int, default=1024, help="in which they are read")
    parser.add_argument("--keys", type=int, default=64, help="of memory that each query keeps")
    parser.add_argument("--local", type=int, default=256)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--test", type=int, default=16, help="documents")
    given = parser.parse_args()
    settings = {name: value for name, value in vars(given).items() if name not in ("model", "documents", "run")}
    known = given.run / "settings.json"
    if known.exists() and (other := json.loads(known.read_text(encoding="utf-8"))) != settings:
        parser.error(f"--run {given.run} was begun with {other}, not with {settings}.")
    given.run.mkdir(parents=True, exist_ok=True)
    write_json(known, settings)
    about, composition = machine(), Composition(given)
    training = {name: composition.trained((name,), given.run / "alone") for name in ADAPTERS}
    training["together"] = composition.trained(ADAPTERS, given.run / "together")
    losses = {name: composition.score(row, given.run / f"{name.replace(' ', '_')}.json") for name, row in ROWS.items()}
    rows = table(losses, given.scored)
    for row in rows:
        print(row)
    exact = composition.removal_is_exact()
    print("removed, bit for bit the base:", exact)
    settings |= {
        "documents": len(composition.tests),
        "database chunks": len(composition.corpus),
        "removal exact": exact,
    }
    print(keep("composition", settings | {"training": training}, rows + [{"losses": losses}], about))


if __name__ == "__main__":
    main()
