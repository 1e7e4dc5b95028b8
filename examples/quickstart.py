"""The end of `make quickstart` (about two minutes): what the run measured, three questions asked of one document, a
saved model that answers where graft is not installed, and a page that shows what was read.

python examples/quickstart.py --run runs/quickstart

The document is real documentation, seven times as long as the window, with three made-up facts put into it, so that
an answer can only come from memory. The model has 135 million parameters: expect it to find facts, not to reason.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import UnlimiformerConfig, UnlimiformerLlamaForCausalLM, unlimiform

FACTS = (
    ("The access code of the build server is", "48213"),
    ("The release manager of this package is", "Amara Okafor"),
    ("The workshop about this package takes place in", "Lisbon"),
)
OPTIONS = UnlimiformerConfig(window=512, overlap=0.25, keys_per_query=64, local_tokens=10)
LENGTH = 3400  # tokens of the document: a model of this size is known to recall a key up to about there
ELSEWHERE = """
import sys
sys.modules["graft"] = None  # any import of graft fails here
import torch
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], [int(token) for token in sys.argv[2].split(",")]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
generated = model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False)
print(",".join(map(str, generated[0, len(tokens):].tolist())))
"""


def hide_facts(text: str, tokenizer) -> torch.Tensor:
    """The first `LENGTH` tokens of `text` with the facts between its paragraphs, (1, tokens)."""
    text = tokenizer.decode(tokenizer(text).input_ids[:LENGTH])
    paragraphs = text.split("\n\n")
    for place, (lead, answer) in enumerate(FACTS, start=1):
        paragraphs.insert(place * len(paragraphs) // (len(FACTS) + 1), f"{lead} {answer}.")
    return tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids


def ask(model, tokenizer, document: torch.Tensor, folder: Path) -> int:
    """Read the document once, ask for each fact, show where the answer came from; returns how many were right."""
    right = 0
    with unlimiform(model, OPTIONS) as unlimited:
        memory = unlimited.remember(document, progress=True)
        print(f"\n{memory}, read with {unlimited}")
        for number, (lead, answer) in enumerate(FACTS, start=1):
            question = tokenizer(f"\n\n{lead}", return_tensors="pt", add_special_tokens=False).input_ids
            with unlimited.record() as report:
                generated = model.generate(**memory.inputs(question), max_new_tokens=8, do_sample=False)
            said = tokenizer.decode(generated[0, question.shape[1] :], skip_special_tokens=True)
            said = said.strip().split("\n")[0]
            right += answer in said
            print(f"{number}. {lead} ... {said!r} ({'right' if answer in said else f'it says {answer!r}'})")
            for passage in report.passages(tokenizer, count=2, length=24, since=question.shape[1] - 1):
                print(f"   {100 * passage.share:4.1f} % of attention, tokens {passage.start}: {passage.text!r}")
            report.heatmap(tokenizer, folder / f"question-{number}.html", answer=f"{lead} {said}")
    return right


def reload_elsewhere(model, tokenizer, document: torch.Tensor, folder: Path) -> bool:
    """Save the model with its memory for good; compare its answer with one from a process that cannot import graft."""
    question = tokenizer(f"\n\n{FACTS[1][0]}", return_tensors="pt", add_special_tokens=False).input_ids
    tokens = torch.cat([document, question], dim=1)
    here = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :].tolist()
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-c", ELSEWHERE, str(folder), ",".join(map(str, tokens[0].tolist()))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    there = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()
    return here == [int(token) for token in there.splitlines()[-1].split(",")]


def load(model_class, arguments: argparse.Namespace, **options):
    """The base model with the adapter of the run folded in."""
    base = model_class.from_pretrained(arguments.model, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(base, str(arguments.run)).merge_and_unload().eval()


def print_perplexities(results: dict[str, float]) -> None:
    """The three views of the same held-out tokens side by side, over all and by position."""
    views = {"truncated": "256 local tokens only", "full": "the same, with memory", "context": "full context"}
    losses = [key.removeprefix("eval_full_loss_") for key in results if key.startswith("eval_full_loss_")]
    print("\nPerplexity of the last 512 tokens of held-out documents of 3,840 tokens; loss by position behind it")
    for view, said in views.items():
        by_position = "  ".join(f"{part}: {results[f'eval_{view}_loss_{part}']:.3f}" for part in losses)
        print(f"  {said:24} {results[f'eval_{view}_perplexity']:7.3f}   {by_position}")


def main(argv=None) -> int:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--documents", type=Path, default=Path(".cache/documentation"))
    arguments = parser.parse_args(argv)
    start = time.time()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    stock = load(AutoModelForCausalLM, arguments)
    model = load(UnlimiformerLlamaForCausalLM, arguments, unlimiformer_config=OPTIONS)
    table = pandas.read_parquet(arguments.documents / "documents-test.parquet")
    text = max(table[table.package == "networkx"].text, key=len)
    document = hide_facts(text, tokenizer)
    right = ask(stock, tokenizer, document, arguments.run / "questions")
    folder = arguments.run / "model"
    same = reload_elsewhere(model, tokenizer, document, folder)
    record = json.loads((arguments.run / "run.json").read_text("utf-8"))
    print_perplexities(record["results"])
    print(f"\n{right} of {len(FACTS)} questions answered from a document {document.shape[1] / 512:.1f} windows long.")
    print(f"Loaded where graft is not installed, the saved model gives {'the same' if same else 'ANOTHER'} answer.")
    print(f"This part took {time.time() - start:.0f} s. Open:")
    for what, path in {
        "what was read": arguments.run / "questions" / "question-1.html",
        "loss curves": arguments.run / "loss.png",
        "model card of the adapter": arguments.run / "README.md",
        "model with its own code": folder,
    }.items():
        print(f"  {what:26} {path}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
