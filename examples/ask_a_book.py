"""A small chat model reads a document several times its window, answers questions about it and shows where it looked;
it keeps what it has read and answers the same from the kept copy.

python scripts/prepare_smollm2.py && python examples/ask_a_book.py --output runs/book

The document is a page of Python's own FAQ (Debian's python3.11-doc); `--document` takes any text. It was read in a
minute on one thread. The model has 135 million parameters, and its answers are often wrong: read the passages. Beside
each answer stands the one of the same model when it sees the document's last window only.
"""

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import AttentionReport, Memory, UnlimiformerConfig, unlimiform
from graft.trainer.generation import chat_frame

DOCUMENT = Path("/usr/share/doc/python3.11/html/_sources/faq/design.rst.txt")
QUESTIONS = (
    "Why must 'self' be used explicitly in method definitions and calls?",
    "How does Python manage memory?",
    "Why are there separate tuple and list data types?",
)
LONGEST_ANSWER = 40  # tokens


def answer(model, tokenizer, inputs) -> str:
    generated = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask(model, tokenizer, memory: Memory, question: str, page: Path) -> str:
    """The answer from the memory; prints the passages that were read most, and draws them on a page."""
    ids = question_ids(tokenizer, question)
    with torch.no_grad():
        inputs = memory.inputs(ids, record=(report := AttentionReport()))
        said = answer(model, tokenizer, inputs)
    print(f"\nQ: {question}\nA: {said}")
    for passage in report.passages(tokenizer, count=2, length=40, since=ids.shape[1] - 1):
        print(f"   {100 * passage.share:4.1f} % of attention, tokens {passage.start:,}: {passage.text!r}")
    report.heatmap(tokenizer, page, answer=said)
    return said


def frame(tokenizer) -> tuple[str, str]:
    """What a chat writes before the document and after the question."""
    return chat_frame(tokenizer) if tokenizer.chat_template else ("", "")


def question_ids(tokenizer, question: str) -> torch.Tensor:
    text = f"\n\n{question}{frame(tokenizer)[1]}"
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def main(argv=None) -> int:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--question", nargs="+", default=QUESTIONS)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("runs/book"))
    arguments = parser.parse_args(argv)
    if not arguments.document.is_file():
        parser.error(f"{arguments.document} is no file: `apt-get install python3.11-doc`, or give `--document`")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    text = frame(tokenizer)[0] + arguments.document.read_text(encoding="utf-8")
    document = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    arguments.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.output / "memory", ignore_errors=True)
    config = UnlimiformerConfig(window=arguments.window, overlap=0.25, keys_per_query=256)
    with unlimiform(model, config) as unlimited:
        print(
            f"{arguments.document}: {document.shape[1]:,} tokens, {document.shape[1] / arguments.window:.1f} windows."
        )
        print(f"To remember it takes {unlimited.estimate(document.shape[1])}.")
        start = time.perf_counter()
        memory = unlimited.remember(document, progress=True)
        read = time.perf_counter() - start
        memory.save_pretrained(arguments.output / "memory")
        answers = []
        for number, question in enumerate(arguments.question, start=1):
            page = arguments.output / f"question-{number}.html"
            answers.append(ask(model, tokenizer, memory, question, page))
            ids = torch.cat([document[:, -arguments.window :], question_ids(tokenizer, question)], dim=1)
            alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                print(f"   from the last window alone: {answer(model, tokenizer, alone)!r}")
        start = time.perf_counter()
        kept = Memory.from_pretrained(arguments.output / "memory", model)
        loaded = time.perf_counter() - start
        with torch.no_grad():
            inputs = kept.inputs(question_ids(tokenizer, arguments.question[-1]))
            same = answer(model, tokenizer, inputs) == answers[-1]
    print(f"\nRead in {read:.1f} s; loaded again in {loaded:.2f} s.")
    print(f"The loaded memory gives {'the same' if same else 'ANOTHER'} answer.")
    print(f"Open {arguments.output / 'question-1.html'}: the document, darker where it was read; beside it a picture.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
