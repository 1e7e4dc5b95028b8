"""Generation with retrieval: ours, ours without a cache, a plain decoder of the same size, and the original, in turn.

python benchmarks/retro_generate.py --shape small --tokens 256
python benchmarks/retro_generate.py --shape small --tokens 256 --original PATH   # the folder holding retro_pytorch/

Greedy, batch 1, dropout 0, fixed neighbours (their cost is printed apart), chunk boundaries included. The plain
decoder is the same model without a retriever: its layers compute no cross-attention. "recompute" is our model without
a cache. Prints milliseconds a token (median, p95, at boundaries) and the ratio of whole times in the same round.

"matrix products" are those of one row with each weight that ours reads, and nothing else, by our linear maps and by
torch's, also in turn. They are bound by memory, so `GB/s` stands beside them.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from measuring import keep, machine, processor_kind, ratio
from retro_models import CHUNK, NEIGHBOURS, SHAPES, VOCABULARY, original_model, our_model
from transformers import StoppingCriteria, StoppingCriteriaList

from graft.modeling import cpu_linear


class Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def token_seconds(self):
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class TimedNeighbours:
    """The same neighbours for all chunks; adds up the seconds it takes and its calls."""

    def __init__(self, neighbours):
        self.neighbours, self.seconds, self.calls = neighbours, 0.0, 0

    def __call__(self, chunks):
        start = time.perf_counter()
        found = self.neighbours.expand(len(chunks), -1, -1)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return found


def generate(model, prompt, tokens, neighbours, **options):
    """Seconds of each token by transformers' generate, and the retriever's seconds and calls."""
    clock, retriever = Clock(), None if neighbours is None else TimedNeighbours(neighbours)
    model.generate(
        prompt,
        max_new_tokens=tokens,
        do_sample=False,
        retriever=retriever,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return clock.token_seconds(), retriever


@torch.inference_mode()
def generate_as_the_original(model, prompt, tokens, neighbours):
    """The original's loop: a whole forward pass a token, all neighbours every time."""
    times, ids = [], prompt
    for _ in range(tokens):
        start = time.perf_counter()
        chunks = ids.shape[1] // CHUNK
        retrieved = neighbours.expand(1, chunks, -1, -1) if chunks else None
        logits = model(ids, retrieved=retrieved)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        times.append(time.perf_counter() - start)
    return times, None


def weights_of_a_token(model):
    """Weights of every linear map that a generated token goes through; neighbours are read once a chunk."""
    maps = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return [part.weight for name, part in maps.items() if "encoder" not in name and ".key_value" not in name]


@torch.inference_mode()
def products_of_one_row(weights, tokens, linear):
    """Seconds of a token's matrix products, for as many tokens as the others generate."""
    times, rows = [], {weight.shape[1]: torch.randn(1, 1, weight.shape[1]) for weight in weights}
    for _ in range(tokens):
        start = time.perf_counter()
        for weight in weights:
            linear(rows[weight.shape[1]], weight)
        times.append(time.perf_counter() - start)
    return times, None


def systems(arguments, ours):
    """Name -> a call that generates once."""
    rng = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, VOCABULARY, (1, arguments.prompt), generator=rng)
    neighbours = torch.randint(1, VOCABULARY, (NEIGHBOURS, 2 * CHUNK), generator=rng)
    given = prompt, arguments.tokens
    weights = weights_of_a_token(ours)
    calls = {
        "ours": lambda: generate(ours, *given, neighbours),
        "plain decoder": lambda: generate(ours, *given, None),
        "recompute": lambda: generate(ours, *given, neighbours, use_cache=False),
        "matrix products": lambda: products_of_one_row(weights, arguments.tokens, cpu_linear.linear),
        "torch's matrix products": lambda: products_of_one_row(weights, arguments.tokens, torch.nn.functional.linear),
    }
    if arguments.original:
        original = original_model(arguments.original, arguments.shape).eval()
        calls["original"] = lambda: generate_as_the_original(original, *given, neighbours)
    return calls


def row(name, rounds, prompt, of_ours):
    """Figures of one system over all rounds, against ours in the same round."""
    steps = [times[1:] for times, _ in rounds]  # the first includes the prompt
    flat = sorted(seconds for times in steps for seconds in times)
    boundaries = [times[i] for times, _ in rounds for i in range(1, len(times)) if (prompt + i) % CHUNK == 0]
    totals = [sum(times) for times, _ in rounds]
    retriever = rounds[-1][1]
    return {
        "system": name,
        "ms a token": round(1e3 * statistics.median(flat), 3),
        "p95": round(1e3 * flat[int(0.95 * len(flat))], 3),
        "at boundaries": round(1e3 * statistics.median(boundaries), 3) if boundaries else None,
        "tokens a second": round(len(rounds[0][0]) / statistics.median(totals), 2),
        "time / ours": ratio(totals, of_ours),
        "retrieval ms": round(1e3 * retriever.seconds, 3) if retriever else 0.0,
        "retrieval calls": retriever.calls if retriever else 0,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--original", type=Path, help="folder that holds retro_pytorch/")
    arguments = parser.parse_args(argv)
    about, ours = machine(), our_model(arguments.shape).eval()
    calls = systems(arguments, ours)
    print(about)
    rounds = {name: [] for name in calls}
    for number in range(arguments.rounds + 1):
        for name, call in calls.items():
            if number or name in ("ours", "plain decoder"):  # the others need no warming up
                result = call()
                if number:
                    rounds[name].append(result)
    of_ours = [sum(times) for times, _ in rounds["ours"]]
    rows = [row(name, results, arguments.prompt, of_ours) for name, results in rounds.items()]
    bytes_read = sum(weight.numel() * weight.element_size() for weight in weights_of_a_token(ours))
    for figures in rows:
        if figures["system"].endswith("matrix products"):
            figures["GB/s"] = round(bytes_read / figures["ms a token"] / 1e6, 1)
    for figures in rows:
        print(figures)
    settings = vars(arguments) | {"original": bool(arguments.original)}
    name = f"retro_generate-{arguments.shape}-{processor_kind()}"
    print(keep(name, settings, rows, about))


if __name__ == "__main__":
    main()
