"""A saved memory loaded again, against reading the document again: BART-base shape and hidden store, or the shape of
SmolLM2-135M, of which all layers keep keys and values; random weights.

OMP_NUM_THREADS=1 python benchmarks/memory_reload.py --sources 8192 32768
OMP_NUM_THREADS=1 python benchmarks/memory_reload.py --shape llama --layers 30 --sources 8192

Seconds of the processor, so that what others do on the machine is not in them. Each length is read `--rounds` times
and loaded `--loads` times behind each reading. A loaded memory is mapped, so its bytes come in as they are read: the
first token is timed after both. The file was just written and lies in the system's page cache.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from generation_worker import build
from measuring import keep, machine, ratio

from graft import Memory, UnlimiformerConfig, unlimiform


def timed(call):
    """Wall and processor seconds of a call, and what it returned."""
    began = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - began[0], time.process_time() - began[1], found


def case(unlimited, source: int, rounds: int, loads: int) -> list[dict[str, object]]:
    """Rows of one length: reading, loading with and without checksums, and each with a first token."""
    model = unlimited.model
    ids = torch.randint(5, model.config.vocab_size, (1, source), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[tuple[float, float]]] = {}

    def note(name, call, times=1):
        wall, processor, memory = timed(call)
        asked = () if model.config.is_encoder_decoder else (ids[:, -1:],)
        first = timed(lambda: model.generate(**memory.inputs(*asked), max_new_tokens=1, do_sample=False))[:2]
        for row, more in ((name, (0.0, 0.0)), (f"{name}, first token", first)):
            seconds.setdefault(row, []).extend([(wall + more[0], processor + more[1])] * times)
        return memory

    for _ in range(rounds):
        memory = note("read", lambda: unlimited.remember(ids), times=loads)
        with tempfile.TemporaryDirectory() as folder:
            saved = memory.save_pretrained(Path(folder) / "memory")
            for _ in range(loads):
                note("load", lambda: Memory.from_pretrained(saved, model))  # noqa: B023 - called at once
                note("load unverified", lambda: Memory.from_pretrained(saved, model, verify=False))  # noqa: B023
    rows = []
    for name, taken in seconds.items():
        whole = name.replace("load unverified", "read").replace("load", "read")
        processor = [pair[1] for pair in taken]
        row = {"source": source, "what": name, "MB": round(memory.nbytes / 2**20, 1)}
        row |= {"processor s": round(sorted(processor)[len(processor) // 2], 4)}
        row |= {"wall s": round(sorted(pair[0] for pair in taken)[len(taken) // 2], 4)}
        if whole != name:
            row["read / this"] = ratio([pair[1] for pair in seconds[whole]], processor)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=1, help="readings of each length")
    parser.add_argument("--loads", type=int, default=5, help="loads behind each reading")
    parser.add_argument("--shape", choices=["bart", "llama"], default="bart")
    parser.add_argument("--layers", type=int, default=6, help="fewer make reading cheaper and loading no cheaper")
    arguments = parser.parse_args(argv)
    about = machine()
    print(about)
    rows = []
    config = UnlimiformerConfig() if arguments.shape == "bart" else UnlimiformerConfig(window=2048, overlap=0.25)
    with torch.no_grad(), unlimiform(build(arguments.shape, arguments.layers), config) as unlimited:
        for source in arguments.sources:
            rows += case(unlimited, source, arguments.rounds, arguments.loads)
    print("kept in", keep(f"memory_reload-{arguments.shape}-{arguments.layers}", vars(arguments), rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
