"""A small RETRO trained from nothing on the documentation of Python and PostgreSQL, and an honest answer whether it
reads what it finds. Offline, 6 to 12 minutes on one busy CPU core; ends in a picture and a page.

python examples/retro_from_scratch.py --run runs/retro --steps 600

The pages are those of Debian's python3-doc and postgresql-doc, or else docstrings of installed packages. Every tenth
one is held out, and its neighbours come from the others. Three losses on these say whether retrieval is used: with the
neighbours found, without any, and with those found for other chunks. Then it continues a held-out page, and what it
read meanwhile stands beside what it wrote.
"""

import argparse
import json
import logging
import math
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
from transformers import TrainingArguments

from graft import (
    CorpusRetriever,
    DataCollatorForRetro,
    RetroConfig,
    RetroDataset,
    RetroForCausalLM,
    RetroTrainer,
    pages,
)
from graft.retrieval.corpus.chunking import ChunkSettings
from graft.retrieval.corpus.corpus import Corpus
from graft.retrieval.corpus.document_sources import DatasetRows
from graft.retrieval.corpus.embedder import ChunkEmbedder, minilm_folder
from graft.retrieval.corpus.inspection import Passage, read_passage
from graft.retrieval.corpus.preparation import PreparationSettings, prepare_corpus
from graft.trainer.documentation import debian_pages, package_docstrings, package_folder
from graft.trainer.loss_plot import plot_losses
from graft.trainer.retrieval_ability import VIEWS
from graft.trainer.tokenizer_training import trained_tokenizer

POSTGRESQL = Path("/usr/share/doc")
PACKAGES = ("peft", "accelerate", "networkx")
VOCABULARY, CHUNK, NEIGHBOURS, ROW, BATCH, RATE = 2048, 32, 2, 256, 4, 1.5e-3
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_encoder_layers": 1,
    "cross_attention_layers": [0, 1],
    "tie_word_embeddings": True,
}
MEANINGS = {"retrieved": "with the neighbours found", "without": "without any", "random": "with those of other chunks"}


class PageText(HTMLParser):
    """The text of a page of HTML; blocks end lines, what stands in navigation is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0  # how deep inside navigation

    def handle_starttag(self, tag, attrs) -> None:
        named = dict(attrs).get("class") or ""
        if tag == "div" and (self.hidden or named.startswith("nav")):
            self.hidden += 1
        if tag in ("p", "pre", "dt", "tr", "h1", "h2", "h3", "li"):
            self.parts.append("\n")

    def handle_endtag(self, tag) -> None:
        if tag == "div" and self.hidden:
            self.hidden -= 1

    def handle_data(self, data) -> None:
        if not self.hidden:
            self.parts.append(data)

    def text(self) -> str:
        """What was read, without empty lines."""
        return "\n".join(line.rstrip() for line in "".join(self.parts).splitlines() if line.strip())


def postgresql_pages(root: Path = POSTGRESQL) -> list[str]:
    """The pages of Debian's postgresql-doc, as text; none if it is not installed."""
    texts = []
    for path in sorted(root.glob("postgresql-doc-*/html/*.html")):
        parser = PageText()
        parser.feed("<body" + path.read_text("utf-8").partition("<body")[2])
        texts.append(parser.text())
    return texts


def documentation() -> list[str]:
    """Pages of Python's and PostgreSQL's documentation in turn, or else docstrings of packages, one text per file."""
    python, postgresql = [page.text for page in debian_pages()], postgresql_pages()
    if python and postgresql:
        count = min(len(python), len(postgresql))
        return [text for pair in zip(python[:count], postgresql[:count], strict=True) for text in pair]
    files: dict[str, list[str]] = {}
    for root in filter(None, map(package_folder, PACKAGES)):
        for docstring in package_docstrings(root):
            files.setdefault(docstring.module, []).append(docstring.text)
    return ["\n\n".join(texts) for texts in files.values()]


def divided(texts: list[str], characters: int) -> tuple[list[str], list[str]]:
    """Texts to train on and every tenth held out, spread over all of `texts`, each cut at 6,000 characters."""
    texts = [text[:6000] for text in texts if len(text) > 500]
    wanted = max(20, round(characters * len(texts) / sum(map(len, texts))))
    step = max(1, len(texts) // wanted)
    kept = texts[::step][:wanted]
    return [text for number, text in enumerate(kept) if number % 10], kept[::10]


def prepare(folder: Path, texts: list[str], tokenizer, database: Corpus | None = None) -> Corpus:
    """All stages of a corpus; what is done already is kept. Neighbours come from `database`, else from other texts."""
    rows = DatasetRows([{"text": text} for text in texts])
    settings = PreparationSettings(ChunkSettings(CHUNK, shard_chunks=2**11), NEIGHBOURS, ROW, workers=1)
    return prepare_corpus(rows, folder, tokenizer, ChunkEmbedder(minilm_folder()), settings, database=database)


def train(folder: Path, corpus: Corpus, held_out: Corpus, tokenizer, steps: int) -> tuple[RetroTrainer, list, dict]:
    """Train for so many steps, evaluating four times; the trainer, what it logged, and the three losses at the end."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = RetroForCausalLM(RetroConfig(**SIZES, **special, vocab_size=len(tokenizer), chunk_size=CHUNK))
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = RetroTrainer(
        model,
        arguments,
        train_dataset=RetroDataset(corpus, NEIGHBOURS),
        eval_dataset=RetroDataset(held_out, NEIGHBOURS),
        processing_class=tokenizer,
        data_collator=DataCollatorForRetro(corpus.pad_token_id),
    )
    trainer.train()
    return trainer, list(trainer.state.log_history), trainer.evaluate()


@dataclass
class Read:
    """A chunk that was looked up, and the neighbours that were read after it."""

    text: str
    neighbours: list[Passage]


class RecordingRetriever:
    """A retriever that keeps what was asked and found."""

    def __init__(self, retriever: CorpusRetriever) -> None:
        self.retriever, self.reads = retriever, []

    def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
        corpus = self.retriever.corpus
        ids, distances = self.retriever.search(chunks)
        for chunk, found, gaps in zip(chunks, ids, distances, strict=True):
            near = [read_passage(corpus, int(i), float(d)) for i, d in zip(found, gaps, strict=True) if i >= 0]
            self.reads.append(Read(corpus.tokenizer.decode(chunk, skip_special_tokens=True), near))
        passages = corpus.passages(ids.reshape(-1), self.retriever.neighbour_length)
        return torch.from_numpy(passages).view(*ids.shape, -1)


def continue_page(model, tokenizer, corpus: Corpus, held_out: Corpus, tokens: int) -> tuple[str, str, list[Read]]:
    """Continue the beginning of a held-out page: that beginning, what was written, what was read at each chunk."""
    start = int(held_out.documents[len(held_out.documents) // 2])
    prompt = torch.from_numpy(held_out.tokens.between(start, start + 2).reshape(1, -1).astype("int64"))
    recording = RecordingRetriever(CorpusRetriever(corpus, num_neighbours=NEIGHBOURS))
    options = {"max_new_tokens": tokens, "do_sample": True, "top_k": 20, "temperature": 0.8}
    torch.manual_seed(0)
    written = model.eval().generate(prompt, retriever=recording, pad_token_id=corpus.pad_token_id, **options)
    given, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[0], written[0]))
    return given, whole.removeprefix(given), recording.reads


def readable(text: str) -> str:
    """The text with long rules, such as those under headings, and runs of empty lines cut short."""
    return re.sub(r"([^\w\s])\1{8,}", lambda rule: 8 * rule[1], re.sub(r"\n(\s*\n){2,}", "\n\n", text))


def verdict(figures: dict) -> str:
    """What the three losses say, in a sentence."""
    found, none, others = (figures[f"eval_{view}_loss"] for view in ("retrieved", "without", "random"))
    return (
        f"The neighbours found change the loss by {found - none:+.4f} nats a token against none, and by "
        f"{found - others:+.4f} against those of other chunks; below 0 they help."
    )


def draw(folder: Path, history: list[dict], figures: dict, given: str, written: str, reads: list[Read]) -> Path:
    """The page: losses while training, the three at the end, and what was written beside what was read."""
    plot_losses([{k: v for k, v in entry.items() if k != "learning_rate"} for entry in history], folder / "loss.png")
    rows = [(MEANINGS[v], f"{figures[f'eval_{v}_loss']:.4f}", figures[f"eval_{v}_bits_per_byte"]) for v in VIEWS]
    body = pages.paragraph(
        "A small RETRO, trained from nothing on documentation. Held-out pages are read in three ways; the lower the "
        "loss, the better the text was foreseen. " + verdict(figures)
    )
    body += pages.table(rows, ("held-out pages, read", "loss (nats a token)", "bits per byte"))
    body += pages.figure(folder / "loss.png", "Loss per token of training rows and, in each view, of held-out ones.")
    body += pages.heading("A page continued")
    body += pages.paragraph("The beginning of a held-out page, and, on a coloured ground, what the model wrote.")
    body += pages.token_heat([readable(given), readable(written)], [0.0, 0.3], scale=1.0)
    body += pages.heading("What was read meanwhile")
    body += pages.paragraph(
        "Each complete chunk is looked up among the pages trained on. Before the next one is written, its nearest "
        "neighbours and what follows them are read. The distance is squared; smaller is nearer."
    )
    rows = [
        (readable(read.text) if place == 0 else "", near.distance, readable(f"{near.text} ... {near.continuation}"))
        for read in reads
        for place, near in enumerate(read.neighbours)
    ]
    body += pages.table(rows, ("chunk", "distance", "neighbour ... and what follows it"))
    pages.page("A RETRO from scratch", body, folder / "retro.html")
    return folder / "retro.html"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/retro"))
    parser.add_argument("--characters", type=int, default=700_000, help="of documentation, held-out pages included")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=96, help="to write at the end")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    folder = arguments.run
    texts, others = divided(documentation(), arguments.characters)
    tokenizer = trained_tokenizer(folder / "tokenizer", texts, VOCABULARY, ROW)
    corpus = prepare(folder / "corpus", texts, tokenizer)
    held_out = prepare(folder / "held-out", others, tokenizer, corpus)
    print(f"{corpus}\nheld out: {held_out}", flush=True)
    torch.manual_seed(0)
    trainer, history, figures = train(folder, corpus, held_out, tokenizer, arguments.steps)
    (folder / "figures.json").write_text(json.dumps({"final": figures, "history": history}, indent=1))
    for view in VIEWS:
        loss = figures[f"eval_{view}_loss"]
        print(f"{MEANINGS[view]:27} loss {loss:.4f}  perplexity {math.exp(loss):.2f}")
    print(verdict(figures))
    trainer.model.save_pretrained(folder / "model")
    given, written, reads = continue_page(trainer.model, tokenizer, corpus, held_out, arguments.tokens)
    print(f"\nA held-out page begins:\n{given}\nand the model goes on:\n{written}\n")
    for read in reads:
        print(f"after {' '.join(read.text.split())!r} it read")
        for near in read.neighbours:
            print(f"  {near.distance:.2f}  {' '.join((near.text + ' ... ' + near.continuation).split())!r}")
    print("page:", draw(folder, history, figures, given, written, reads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
