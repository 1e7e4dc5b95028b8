"""A training step with retrieval: ours, a plain decoder of the same size, and the original, in turn.

python benchmarks/retro_train.py --shape small
python benchmarks/retro_train.py --shape small --dropout 0.25 --original PATH   # the folder holding retro_pytorch/

A step is forward, backward and AdamW on random ids, each chunk with two neighbours. "ours, packed" holds documents of
several chunks in each row; "ours, residual dropout" drops what sublayers add instead of attention weights. Prints
seconds (median), tokens a second, share of the machine's GEMM rate, the ratio to ours in the same round, and the peak
of memory above the imported libraries, each measured in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measuring import in_turn, keep, machine, memory_kilobytes, processor_kind, ratio
from retro_models import CHUNK, NEIGHBOURS, SHAPES, VOCABULARY, original_model, our_model

from graft.trainer.retrieval_ability import decayed_parameters


def batch_of(arguments):
    """Ids (batch, length + 1) and neighbours (batch, chunks, 2, 128)."""
    length = SHAPES[arguments.shape]["length"]
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (arguments.batch, length + 1), generator=rng)
    shape = (arguments.batch, length // CHUNK, NEIGHBOURS, 2 * CHUNK)
    return ids, torch.randint(1, VOCABULARY, shape, generator=rng)


def packed_positions(ids, documents):
    """Positions that start again `documents` times in each row, at chunk boundaries."""
    chunks = ids.shape[1] // CHUNK
    starts = torch.arange(documents) * (chunks // documents) * CHUNK
    columns = torch.arange(ids.shape[1])
    return (columns - starts[torch.bucketize(columns, starts, right=True) - 1]).expand(len(ids), -1)


def step_of(model, loss):
    """A function that makes one step."""
    decayed = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def systems(arguments):
    """Name -> a function that builds the system and returns its step."""
    ids, retrieved = batch_of(arguments)

    def ours(with_retrieval=True, documents=1, **changes):
        model = our_model(arguments.shape, **{"dropout": arguments.dropout, **changes}).train()
        given = {"input_ids": ids, "labels": ids}
        if with_retrieval:
            given["retrieved"] = retrieved
        if documents > 1:
            given["position_ids"] = packed_positions(ids, documents)
        return step_of(model, lambda: model(**given).loss)

    def original():
        model = original_model(arguments.original, arguments.shape, arguments.dropout).train()
        return step_of(model, lambda: model(ids, retrieved, return_loss=True))

    known = {"ours": ours, "plain decoder": lambda: ours(False), "ours, packed": lambda: ours(documents=3)}
    if arguments.dropout:
        known["ours, residual dropout"] = lambda: ours(
            dropout=0.0, residual_dropout=arguments.dropout, hidden_dropout=arguments.dropout
        )
    return known | ({"original": original} if arguments.original else {})


def matrix_flop(arguments, with_retrieval):
    """Floating-point operations of the matrix products of a step: 6 a weight and row it meets, attention left out."""
    sizes = SHAPES[arguments.shape]
    model = our_model(arguments.shape)
    tokens = arguments.batch * sizes["length"]
    of_encoder = {id(weight) for weight in model.model.encoder.parameters()}
    flop = 0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "embed" in name or "null" in name:
            continue
        reads_neighbours = id(weight) in of_encoder or "cross_attention.key_value" in name
        if reads_neighbours and not with_retrieval:
            continue
        rows = tokens * (2 * NEIGHBOURS if reads_neighbours else 1)
        flop += 6 * weight.numel() * rows
    return flop


def peak_megabytes(arguments, name):
    """Of two steps in a fresh process, above what it had before the model."""
    command = [sys.executable, __file__, "--shape", arguments.shape, "--batch", str(arguments.batch)]
    command += ["--dropout", str(arguments.dropout), "--alone", name]
    command += ["--original", str(arguments.original)] if arguments.original else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_alone(arguments):
    before = memory_kilobytes("VmRSS")
    step = systems(arguments)[arguments.alone]()
    step()
    step()
    print((memory_kilobytes("VmHWM") - before) / 1024)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--original", type=Path, help="folder that holds retro_pytorch/")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.alone:
        return run_alone(arguments)
    about = machine()
    print(about)
    times = in_turn({name: build() for name, build in systems(arguments).items()}, arguments.rounds)
    rows = []
    for name, taken in times.items():
        middle = statistics.median(taken)
        flop = matrix_flop(arguments, name != "plain decoder")
        rows.append(
            {
                "system": name,
                "s a step": round(middle, 3),
                "tokens/s": round(arguments.batch * SHAPES[arguments.shape]["length"] / middle, 1),
                "share of GEMM rate": round(flop / middle / 1e9 / about["GEMM Gflop/s"], 2),
                "time / ours": ratio(taken, times["ours"]),
                "peak MB": round(peak_megabytes(arguments, name)),
            }
        )
        print(rows[-1])
    settings = {**vars(arguments), "original": bool(arguments.original)}
    name = f"retro_train-{arguments.shape}-dropout-{arguments.dropout}-{processor_kind()}"
    print(keep(name, settings, rows, about))


if __name__ == "__main__":
    main()
