"""Evaluation over many documents: seconds of each, and whether memory grows from document to document.

python benchmarks/evaluation_documents.py --lengths 4096 16384

Losses of the targets and generated answers, by our Trainer with a memory of the whole document and by the stock one on
the first 1024 tokens of the same rows, each in a process of its own. "growth MB" is what the process holds after the
last document beyond what it held after the tenth. Random weights and ids, one document at a time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

from measuring import keep, machine, memory_kilobytes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training_throughput import SHAPES, WINDOW, collate, model_of, rows_of
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.abilities import MemoryAbility
from graft.trainer.trainer import GraftSeq2SeqTrainer

SETTLED = 10
"""Documents after which what is made once has been made."""


class DocumentClock(TrainerCallback):
    """Seconds between documents, and megabytes held after each."""

    def __init__(self):
        self.began, self.seconds, self.megabytes = time.perf_counter(), [], []

    def on_prediction_step(self, *args, **options):
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.megabytes.append(memory_kilobytes("VmRSS") / 1024)
        self.began = time.perf_counter()


def numbers(vocabulary):
    """A tokenizer whose words are the ids."""
    words = Tokenizer(WordLevel({str(word): word for word in range(vocabulary)}, unk_token="3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", pad_token="1", eos_token="2", unk_token="3")


def evaluate(arguments, length, name):
    """Evaluate as `name` does; seconds and megabytes of each document."""
    rows = rows_of(arguments, length, arguments.documents)
    memory = name == "memory"
    if not memory:
        rows = [{**row, "input_ids": row["input_ids"][:WINDOW]} for row in rows]
    clock = DocumentClock()
    with tempfile.TemporaryDirectory() as folder:
        options = Seq2SeqTrainingArguments(
            folder,
            per_device_eval_batch_size=1,
            predict_with_generate=True,
            generation_max_length=arguments.new_tokens,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        kind = GraftSeq2SeqTrainer if memory else Seq2SeqTrainer
        given = {"abilities": [MemoryAbility(UnlimiformerConfig())]} if memory else {}
        trainer = kind(
            model_of(arguments.shape),
            options,
            eval_dataset=rows,
            data_collator=collate,
            processing_class=numbers(SHAPES[arguments.shape][3]),
            callbacks=[clock],
            **given,
        )
        trainer.evaluate()
    return {"seconds": clock.seconds, "megabytes": clock.megabytes}


def in_own_process(arguments, length, name):
    command = [sys.executable, __file__, "--shape", arguments.shape, "--lengths", str(length), "--alone", name]
    command += ["--documents", str(arguments.documents), "--new-tokens", str(arguments.new_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        print(json.dumps(evaluate(arguments, arguments.lengths[0], arguments.alone)), flush=True)
        return
    about = machine()
    print(about)
    rows = []
    for length in arguments.lengths:
        for name in ("stock", "memory"):
            found = in_own_process(arguments, length, name)
            settled = found["megabytes"][SETTLED - 1]
            rows.append(
                {
                    "tokens of a document": length,
                    "system": name,
                    "tokens read": length if name == "memory" else min(length, WINDOW),
                    "seconds a document": round(statistics.median(found["seconds"][1:]), 4),
                    "MB after ten": round(settled),
                    "growth MB": round(found["megabytes"][-1] - settled, 1),
                }
            )
            print(rows[-1], flush=True)
    print(keep(f"evaluation_documents-{arguments.shape}", vars(arguments), rows, about))


if __name__ == "__main__":
    main()
