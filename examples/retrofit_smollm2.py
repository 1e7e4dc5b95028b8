"""Give SmolLM2-135M retrieval: a corpus of real documentation, some minutes of training on a CPU, and an honest answer
whether it reads what it finds. Offline, about 20 minutes on two free cores; ends in a picture.

python scripts/prepare_smollm2.py --output .cache/smollm2-135m-instruct
python examples/retrofit_smollm2.py --model .cache/smollm2-135m-instruct --run runs/retrofit --minutes 10

The documents are the docstrings of installed packages, one document per source file. Some files are held out; their
neighbours come from the others. Three losses on them say whether retrieval is used: with the neighbours found, with
none (the stock model), and with neighbours found for other chunks. What also helps with those was learnt of the style
of the documents; only what is lost by them is retrieval.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import pages
from graft.modeling.retro.retrofit import RetroFit, retrofit
from graft.modeling.retro.retrofit_config import RetroFitConfig
from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.corpus_retriever import CorpusRetriever
from graft.retrieval.corpus.document_sources import JSONLines
from graft.retrieval.corpus.embedder import ChunkEmbedder, minilm_folder
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus
from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.retrieval.corpus.retro_dataset import RetroDataset
from graft.trainer.documentation import package_docstrings, package_folder, without_duplicates

PACKAGES = ("transformers", "peft", "accelerate")
CHUNK, NEIGHBOURS, ROW = 32, 2, 256
TRAIN_CHARACTERS, TEST_CHARACTERS = 1_200_000, 80_000
RATE = 2e-3
OPTIONS = {
    "chunk_size": CHUNK,
    "cross_attention_layers": [20, 23, 26, 29],
    "num_encoder_layers": 1,
    "encoder_intermediate_size": 1152,
    "task_type": "CAUSAL_LM",
}
NAMES = {"true": "with their neighbours", "none": "without (the stock model)", "random": "with others' neighbours"}
KINDS = tuple(NAMES)
PROMPT = """Initializing with a config file does not load the weights associated with the model.

    Args:
        config: Model configuration class with all the parameters of the model."""


def write_documents(folder: Path) -> None:
    """Docstrings joined by source file, to folder/train.jsonl and folder/test.jsonl; which is which is by hash."""
    files = defaultdict(list)
    for package in PACKAGES:
        root = package_folder(package)
        for docstring in without_duplicates(package_docstrings(root) if root else ()):
            files[docstring.module].append(docstring.text)
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("test", TEST_CHARACTERS), ("train", TRAIN_CHARACTERS)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            while names and most > 0:
                text = "\n\n".join(files[names.pop(0)])[:8000]
                file.write(json.dumps({"text": text}) + "\n")
                most -= len(text)


def prepare(folder: Path, tokenizer) -> tuple[Corpus, Corpus]:
    """The training corpus with neighbours in itself, and the held-out one with neighbours in the training corpus."""
    if not (folder / "test.jsonl").exists():
        write_documents(folder)
    embedder = ChunkEmbedder(minilm_folder())
    settings = PreparationSettings(ChunkSettings(CHUNK, shard_chunks=2**12), NEIGHBOURS, ROW, workers=1)
    given = tokenizer, embedder, settings
    corpus = prepare_corpus(JSONLines(folder / "train.jsonl"), folder / "train", *given)
    return corpus, prepare_corpus(JSONLines(folder / "test.jsonl"), folder / "test", *given, database=corpus)


def inputs_of(batch: dict, kind: str = "true") -> dict:
    """What the model is called with: the batch with its neighbours, or without any."""
    names = ("input_ids", "labels", "position_ids") + (() if kind == "none" else ("retrieved",))
    return {name: batch[name] for name in names}


@torch.no_grad()
def evaluate(model, data, collate, kind: str, count: int) -> float:
    """Mean loss per scored token of `count` rows, evenly taken from `data`.

    Neighbours are those found ("true"), none ("none"), or those of a row half the data set away ("random").
    """
    model.eval()
    total, tokens = 0.0, 0
    chosen = [round(place * len(data) / count) for place in range(count)]
    for start in range(0, count, 4):
        indices = chosen[start : start + 4]
        batch = collate([data[index] for index in indices])
        if kind == "random":
            others = collate([data[(index + len(data) // 2) % len(data)] for index in indices])
            batch["retrieved"] = others["retrieved"]
        scored = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**inputs_of(batch, kind), use_cache=False).loss.item() * scored
        tokens += scored
    return total / tokens


def train(handle: RetroFit, data, collate, minutes: float, check) -> list[tuple[float, float]]:
    """Train for some minutes of wall time; returns (rows read, loss) of each step. `check` is called now and then."""
    model, weights = handle.model, handle.trainable_parameters()
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    loader = DataLoader(data, batch_size=2, shuffle=True, collate_fn=collate, drop_last=True)
    losses, started, spent, checks = [], time.monotonic(), 0.0, 0
    progress = tqdm(total=round(60 * minutes), unit="s", desc="train")
    while spent < 60 * minutes:
        for batch in loader:
            share = spent / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (len(losses) + 1) / 20) * max(0.05, 1 - share)
            model.train()
            loss = model(**inputs_of(batch)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append((2.0 * (len(losses) + 1), loss.item()))
            spent = time.monotonic() - started
            progress.update(min(int(spent), progress.total) - progress.n)
            progress.set_postfix(step=len(losses), loss=f"{loss.item():.3f}")
            if spent / (60 * minutes) >= (checks + 1) / 4:
                checks += 1
                before = time.monotonic()
                check(losses)
                started += time.monotonic() - before
            if spent >= 60 * minutes:
                break
    progress.close()
    return losses


def draw(folder: Path, losses, curves, rows) -> Path:
    """The page: losses while training, and the table of the end."""
    width = max(1, min(8, len(losses) // 4), len(losses) // 40)
    means = [losses[i : i + width] for i in range(0, len(losses) - width + 1, width)]
    series = {"training": ([m[-1][0] for m in means], [sum(loss for _, loss in m) / len(m) for m in means])}
    series |= {f"held out, {NAMES[kind]}": (x, y) for kind, (x, y) in curves.items()}
    plot = pages.line_plot_png(series, folder / "loss.png", "Retro-fit of a frozen SmolLM2-135M", ("rows", "loss"))
    body = pages.table(rows, ("held-out documents", "loss", "perplexity"))
    body += pages.figure(plot, "Loss per token while training, and on held-out documents.")
    pages.page("Retro-fit of SmolLM2-135M", body, folder / "retrofit.html")
    return folder / "retrofit.html"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--run", type=Path, default=Path("runs/retrofit"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows that are scored at the end")
    parser.add_argument("--go-on", action="store_true", help="train the adapter of the run further")
    return parser.parse_args(argv)


def fit_and_measure(model, corpora, arguments) -> tuple[RetroFit, dict, list]:
    """Train, and score held-out rows before, meanwhile and after: the handle, all figures, losses while training."""
    corpus, held_out = corpora
    data, test = RetroDataset(corpus, NEIGHBOURS), RetroDataset(held_out, NEIGHBOURS)
    collate = DataCollatorForRetro(corpus.pad_token_id)
    figures = {"training_rows": 0.0, "steps": 0, "curves": {kind: [[], []] for kind in KINDS}}
    if arguments.go_on:
        handle = RetroFit.from_pretrained(model, arguments.run / "adapter")
        figures = json.loads((arguments.run / "figures.json").read_text())
    else:
        handle = retrofit(model, RetroFitConfig(**OPTIONS, pad_token_id=corpus.pad_token_id))
    print(f"{handle}\n{corpus}\nheld out: {held_out}", flush=True)
    nothing = evaluate(model, test, collate, "none", 8)

    def check(losses) -> None:
        for kind, (x, y) in figures["curves"].items():
            x.append(figures["training_rows"] + (losses[-1][0] if losses else 0.0))
            y.append(nothing if kind == "none" else evaluate(model, test, collate, kind, 8))
        found = ", ".join(f"{kind} {y[-1]:.3f}" for kind, (_, y) in figures["curves"].items())
        tqdm.write(f"{figures['curves']['true'][0][-1]:.0f} rows: {found}")

    if not arguments.go_on:
        check([])
    torch.manual_seed(figures["steps"])
    losses = train(handle, data, collate, arguments.minutes, check)
    losses = [(figures["training_rows"] + rows, loss) for rows, loss in losses]
    figures["final"] = {kind: evaluate(model, test, collate, kind, arguments.rows) for kind in KINDS}
    figures |= {"training_rows": losses[-1][0], "steps": figures["steps"] + len(losses)}
    handle.save_pretrained(arguments.run / "adapter")
    (arguments.run / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return handle, figures, losses


def main(argv=None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    corpora = prepare(arguments.run, tokenizer)
    handle, figures, losses = fit_and_measure(model, corpora, arguments)
    rows = [(NAMES[kind], loss, math.exp(loss)) for kind, loss in figures["final"].items()]
    for name, loss, perplexity in rows:
        print(f"{name:28} loss {loss:.4f}  perplexity {perplexity:.3f}")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    retriever = CorpusRetriever(corpora[0], num_neighbours=NEIGHBOURS)
    found = model.eval().generate(**handle.inputs(ids, retriever=retriever), max_new_tokens=40, do_sample=False)
    print("generated with retrieval:", tokenizer.decode(found[0, ids.shape[1] :]))
    print("page:", draw(arguments.run, losses, figures["curves"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
