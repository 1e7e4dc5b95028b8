"""A step of training by our Trainer and by the stock one, in turn: three lengths of documents, three regimes.

python benchmarks/training_throughput.py --shape tiny
python benchmarks/training_throughput.py --shape base --lengths 1024
python benchmarks/training_throughput.py --lengths 4096 --original PATH/unlimiformer --original-python ENV/bin/python

The stock Seq2SeqTrainer trains the stock BART on the first 1024 tokens of each document. So does our "standard", whose
losses before and after a step must equal the stock's. "random" and "retrieval" read the whole document and have no
stock rival: their ratio says what a step over all costs in steps over its beginning. Their rival is the original,
from a checkout and an environment that it starts in, in the same rounds, without a Trainer around its steps: forward,
backward, AdamW on the same ids, in every layer, half of a window shared. Weights and ids are random.

Prints milliseconds of a step (median; the second of a training, the first warms up), its parts, tokens read a second,
the share of the machine's GEMM rate where the work is known, the ratio stock / this of the same round, and the peak of
memory above the imported libraries, each measured in a process of its own.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import keep, machine, memory_kilobytes, ratio
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from worker_process import Worker, standing

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer.abilities import MemoryAbility
from graft.trainer.trainer import GraftSeq2SeqTrainer

WINDOW, TARGET, STEPS = 1024, 128, 2
SHAPES = {
    # hidden size, layers of each side, inner size, vocabulary
    "tiny": (256, 2, 1024, 8192),
    "base": (768, 6, 3072, 50265),
}
REGIMES = ("standard", "random", "retrieval")
PARTS = ("forward", "backward", "optimizer")


def sizes_of(shape):
    hidden, layers, inner, vocabulary = SHAPES[shape]
    sizes = {"d_model": hidden, "encoder_layers": layers, "decoder_layers": layers, "vocab_size": vocabulary}
    sizes |= {"encoder_ffn_dim": inner, "decoder_ffn_dim": inner, "max_position_embeddings": WINDOW, "dropout": 0.0}
    return sizes | {"encoder_attention_heads": hidden // 64, "decoder_attention_heads": hidden // 64}


def model_of(shape):
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**sizes_of(shape)))


def rows_of(arguments, length, count=None):
    """`count` rows, by default as many as a run of STEPS steps takes, in all processes together."""
    count = count or STEPS * arguments.batch * int(os.environ.get("WORLD_SIZE", "1"))
    rng = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[arguments.shape][3]
    ids = torch.randint(3, vocabulary, (count, length), generator=rng)
    labels = torch.randint(3, vocabulary, (count, TARGET), generator=rng)
    return [{"input_ids": source, "labels": target} for source, target in zip(ids, labels, strict=True)]


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class Timed:
    """A Trainer that notes when each part of its steps ends; it stands before a Trainer among the bases."""

    def compute_loss(self, *args, **options):
        with self.part("forward"):
            return super().compute_loss(*args, **options)

    def create_optimizer(self, *args, **options):
        optimizer = super().create_optimizer(*args, **options)
        step, backward = optimizer.step, self.accelerator.backward

        def timed_step(*args, **options):
            with self.part("optimizer"):
                return step(*args, **options)

        def timed_backward(*args, **options):
            with self.part("backward"):
                return backward(*args, **options)

        optimizer.step, self.accelerator.backward = timed_step, timed_backward
        return optimizer

    def part(self, name):
        return Part(self.taken, name)


class Part:
    """Adds the seconds inside of it to `taken[name]`."""

    def __init__(self, taken, name):
        self.taken, self.name = taken, name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exception):
        self.taken[self.name] = self.taken.get(self.name, 0.0) + time.perf_counter() - self.began


class StepClock(TrainerCallback):
    """Seconds of the last step as `taken["step"]`, beside its parts."""

    def __init__(self, taken):
        self.taken = taken

    def on_step_begin(self, *args, **options):
        self.taken.clear()
        self.began = time.perf_counter()

    def on_step_end(self, *args, **options):
        self.taken["step"] = time.perf_counter() - self.began


class TimedStock(Timed, Seq2SeqTrainer):
    pass


class TimedOurs(Timed, GraftSeq2SeqTrainer):
    pass


def train(arguments, length, name):
    """Train a fresh model for STEPS steps; seconds of the last, by part, and the losses."""
    reads_all = name in ("random", "retrieval")
    rows = [
        {**row, "input_ids": row["input_ids"] if reads_all else row["input_ids"][:WINDOW]}
        for row in rows_of(arguments, length)
    ]
    given = {"abilities": [MemoryAbility(UnlimiformerConfig(training=name))]} if reads_all else {}
    kind = TimedStock if name == "stock" else TimedOurs
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": STEPS, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        options |= {"use_cpu": not torch.cuda.is_available(), "logging_steps": 1, "max_grad_norm": 0.0}
        options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": arguments.batch}
        trainer = kind(
            model_of(arguments.shape),
            Seq2SeqTrainingArguments(folder, **options),
            train_dataset=rows,
            data_collator=collate,
            **given,
        )
        trainer.taken = {}
        trainer.add_callback(StepClock(trainer.taken))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return trainer.taken, losses


@contextlib.contextmanager
def original(arguments, length):
    """The original's regimes by name, each a call that gives what `train` gives; none without a checkout."""
    if arguments.original is None or length <= WINDOW:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(arguments, length)
        stacked = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        save_file(stacked, f"{folder}/rows.safetensors")
        options = {"original": arguments.original, "config": json.dumps(sizes_of(arguments.shape))}
        options |= {"rows": f"{folder}/rows.safetensors", "batch": arguments.batch, "threads": torch.get_num_threads()}
        script = Path(__file__).with_name("original_training_worker.py")
        with standing({"it": Worker(arguments.original_python, script, options)}) as workers:

            def step(regime):
                answer = workers["it"].ask(regime)
                return answer, [answer.pop("first loss")]

            yield {f"original {regime}": lambda regime=regime: step(regime) for regime in ("random", "retrieval")}


def matrix_flop(arguments):
    """Of the matrix products of a step over 1024 tokens: 6 a weight and row it meets, attention's own left out."""
    model = model_of(arguments.shape)
    flop = 0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "embed_positions" in name:
            continue
        reads_source = ".encoder." in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        flop += 6 * weight.numel() * arguments.batch * (WINDOW if reads_source else TARGET)
    return flop


def peak_megabytes(arguments, length, name):
    command = [sys.executable, __file__, "--shape", arguments.shape, "--batch", str(arguments.batch)]
    command += ["--lengths", str(length), "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure(arguments, length, about):
    """A row for each system on documents of `length` tokens."""
    names = ["stock", *REGIMES] if length > WINDOW else ["stock", "standard"]
    with original(arguments, length) as rivals:
        calls = {name: lambda name=name: train(arguments, length, name) for name in names} | rivals
        taken, losses = {name: [] for name in calls}, {}
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                parts, losses[name] = call()
                taken[name].append(parts)
    torch.testing.assert_close(torch.tensor(losses["standard"]), torch.tensor(losses["stock"]), rtol=1e-5, atol=0)
    steps = {name: [each["step"] for each in rounds] for name, rounds in taken.items()}
    for name in calls:
        middle = statistics.median(steps[name])
        parts = {part: statistics.median(each[part] for each in taken[name]) for part in PARTS}
        read = length if name.endswith(("random", "retrieval")) else min(length, WINDOW)
        share = round(matrix_flop(arguments) / middle / 1e9 / about["GEMM Gflop/s"], 2) if read <= WINDOW else None
        rival = (
            {"original / this": ratio(steps[f"original {name}"], steps[name])} if f"original {name}" in steps else {}
        )
        yield {
            "tokens of a document": length,
            "system": name,
            "ms a step": round(1000 * middle, 1),
            **{f"ms {part}": round(1000 * value, 1) for part, value in parts.items()},
            "ms data and the rest": round(1000 * (middle - sum(parts.values())), 1),
            "tokens read/s": round(arguments.batch * read / middle, 1),
            "share of GEMM rate": share,
            "stock / this": ratio(steps["stock"], steps[name]),
            **rival,
            "peak MB": None if name in rivals else round(peak_megabytes(arguments, length, name)),
            "loss before the first step": round(losses[name][0], 5),
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--original", help="a checkout of the original Unlimiformer")
    parser.add_argument("--original-python", help="the python of an environment that it starts in")
    parser.add_argument("--result", help="name of the file of results")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        before = memory_kilobytes("VmRSS")
        train(arguments, arguments.lengths[0], arguments.alone)
        print((memory_kilobytes("VmHWM") - before) / 1024)
        return
    about = machine()
    print(about)
    rows = []
    for length in arguments.lengths:
        for row in measure(arguments, length, about):
            rows.append(row)
            print(row)
        print(keep(arguments.result or f"training_throughput-{arguments.shape}", vars(arguments), rows, about))


if __name__ == "__main__":
    main()
