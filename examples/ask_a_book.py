"""A small chat model reads a document several times its window and answers questions about it; what it read is kept.

python scripts/prepare_smollm2.py && python examples/ask_a_book.py --output runs/book

The document is a page of Python's own FAQ (Debian's python3.11-doc); `--document` takes any text, and `--questions` a
JSON list of [question, words of the right answer]. A model of 135 million parameters that reads a memory with all of
its heads is distracted and answers little. But a few of its heads find: `retrieval_heads` tells which, by asking the
document about itself. What they read for a question is put in front of it in an ordinary prompt. Beside that answer
stand the one from the memory alone and the one from the document's last window alone; `--full` adds the stock model
that sees everything, as far as it was trained.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import AttentionReport, Memory, UnlimiformerConfig, unlimiform
from graft.atomic_files import write_json
from graft.trainer.generation import chat_frame

DOCUMENT = Path("/usr/share/doc/python3.11/html/_sources/faq/design.rst.txt")
QUESTIONS = (
    ("How many bits of precision does a float have?", "53"),
    ("From which language was the idea of explicit self borrowed?", "Modula-3"),
    ("Which prefix do some C++ and Java coding standards call for?", "m_"),
    ("Which operator assigns a variable in an expression?", "walrus"),
    ("Which Python has a completely redesigned interpreter loop that avoids the C stack?", "Stackless"),
    ("What is the name of an up-and-coming compiler of Python into C++?", "Nuitka"),
    ("Which module runs a function that will force deletions on exit?", "atexit"),
    ("What are tuples similar to?", "Pascal records"),
    ("How are dictionaries implemented in CPython?", "hash table"),
    ("Which built-in function returns a new sorted list?", "sorted"),
    ("Which module lets you define Abstract Base Classes?", "abc"),
    ("To which kind of messy code can unrestricted goto lead?", "spaghetti"),
)
LONGEST_ANSWER = 24  # tokens
PASSAGE = 48  # tokens
OPTIONS = {"overlap": 0.25, "keys_per_query": 64, "positions": "origin"}


class Asked:
    """A model, its tokenizer, and a document that it has read.

    Args:
        model: of which `unlimited` is the attachment.
        tokenizer: of the model.
        document: (1, tokens).
        memory: of the document.
        heads: those that find.
    """

    def __init__(self, model, tokenizer, document: torch.Tensor, memory: Memory, heads) -> None:
        self.model, self.tokenizer, self.document, self.memory, self.heads = model, tokenizer, document, memory, heads
        self.frame = chat_frame(tokenizer) if tokenizer.chat_template else ("", "")

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def question(self, question: str) -> torch.Tensor:
        return self.ids(f"\n\n{question}{self.frame[1]}")

    @torch.no_grad()
    def answer(self, inputs) -> str:
        generated = self.model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        return self.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def behind(self, text: torch.Tensor, question: str) -> str:
        """The answer of the stock model behind `text`, (1, tokens)."""
        ids = torch.cat([self.ids(self.frame[0]), text, self.question(question)], dim=1)
        return self.answer({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    @torch.no_grad()
    def find(self, question: str):
        """The passage that the heads that find read most for a question, and the report of the reading."""
        self.model(**self.memory.inputs(self.ids(f"\n\n{question}"), record=(report := AttentionReport())))
        return report.passages(self.tokenizer, count=1, length=PASSAGE, heads=self.heads)[0], report

    def from_passage(self, question: str) -> str:
        passage, _ = self.find(question)
        return self.behind(self.document[:, passage.start : passage.end], question)

    def from_memory(self, question: str) -> str:
        return self.answer(self.memory.inputs(self.question(question)))

    def from_window(self, question: str, window: int) -> str:
        return self.behind(self.document[:, -window:], question)


def right(said: str, answer: str | None) -> str:
    """ "right" or "wrong", "" where the answer is not known."""
    return "" if answer is None else "right" if answer.lower() in said.lower() else "wrong"


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--question", nargs="+", help="questions of your own")
    parser.add_argument("--questions", type=Path, help="JSON file, a list of [question, words of the right answer]")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--full", action="store_true", help="ask the stock model behind the whole document too")
    parser.add_argument("--output", type=Path, default=Path("runs/book"))
    arguments = parser.parse_args(argv)
    if not arguments.document.is_file():
        parser.error(f"{arguments.document} is no file: `apt-get install python3.11-doc`, or give `--document`")
    return arguments


def questions_of(arguments: argparse.Namespace) -> list[tuple[str, str | None]]:
    if arguments.question:
        return [(question, None) for question in arguments.question]
    known = json.loads(arguments.questions.read_text("utf-8")) if arguments.questions else QUESTIONS
    return [(question, answer) for question, answer in known]


def ask_all(asked: Asked, questions, arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Print every answer; a row of all ways for each question."""
    ways = {
        "found passage": asked.from_passage,
        "memory alone": asked.from_memory,
        "last window alone": lambda question: asked.from_window(question, arguments.window),
    }
    if arguments.full:
        ways["full context"] = lambda question: asked.behind(asked.document, question)
    rows = []
    for number, (question, answer) in enumerate(questions, start=1):
        passage, report = asked.find(question)
        print(f"\nQ: {question}\n   found at tokens {passage.start:,}: {passage.text!r}")
        row = {"question": question, "passage": right(passage.text, answer)}
        for way, ask in ways.items():
            said = ask(question)
            row |= {way: right(said, answer), f"{way} said": said}
            print(f"   {way:17} {row[way]:5} {said!r}")
        page = arguments.output / f"question-{number}.html"
        report.heatmap(asked.tokenizer, page, answer=row["found passage said"], heads=asked.heads)
        rows.append(row)
        write_json(arguments.output / "answers.json", rows)
    return rows


def main(argv=None) -> int:
    logging.basicConfig(level=logging.WARNING)
    arguments = parse(argv)
    questions = questions_of(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    text = arguments.document.read_text(encoding="utf-8")
    document = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    arguments.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.output / "memory", ignore_errors=True)
    with unlimiform(model, UnlimiformerConfig(window=arguments.window, **OPTIONS)) as unlimited:
        length = document.shape[1]
        print(f"{arguments.document}: {length:,} tokens, {length / arguments.window:.1f} windows.")
        print(f"To remember it takes {unlimited.estimate(length)}.")
        start = time.perf_counter()
        memory = unlimited.remember(document, progress=True)
        read = time.perf_counter() - start
        memory.save_pretrained(arguments.output / "memory")
        heads = unlimited.retrieval_heads(memory)
        print(
            f"Heads that find what they are asked: {', '.join(f'{head} of layer {layer}' for layer, head in heads)}."
        )
        asked = Asked(model, tokenizer, document, memory, heads)
        rows = ask_all(asked, questions, arguments)
        start = time.perf_counter()
        asked.memory = Memory.from_pretrained(arguments.output / "memory", model)
        loaded = time.perf_counter() - start
        same = asked.from_memory(questions[-1][0]) == rows[-1]["memory alone said"]
    if questions[0][1] is not None:
        counts = {way: sum(row[way] == "right" for row in rows) for way in rows[0] if f"{way} said" in rows[0]}
        found = sum(row["passage"] == "right" for row in rows)
        print(f"\nOf {len(rows)} questions the passage found holds the answer of {found}; answered right:")
        print("   " + ", ".join(f"{way} {count}" for way, count in counts.items()))
    print(f"\nRead in {read:.1f} s; loaded again in {loaded:.2f} s.")
    print(f"The loaded memory gives {'the same' if same else 'ANOTHER'} answer.")
    print(f"Open {arguments.output / 'question-1.html'}: the document, darker where it was read; beside it a picture.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
