"""Bytes and processor time of a corpus up to 10^12 tokens, from the formats and the rates that were measured.

python benchmarks/scale_table.py

Prints the table of docs/scale.md from benchmarks/results/retro_prepare-avx512.json. Times are of one core; what is
done by shards is divided by the number of cores. Exact search grows with the square of the chunks; search in an index
of 4 sqrt(N) lists, of which as many are read as were measured, with N sqrt(N).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from measuring import RESULTS

CHUNKS = (10**6, 10**9, 15_625_000_000)
HEADER = ("", "per chunk", "10^6 chunks (64 M tokens)", "10^9 (64 G)", "1.6 10^10 (1 T tokens)")
UNITS = (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def bytes_text(count: float) -> str:
    """Such as "0.8 TB", in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def time_text(seconds: float) -> str:
    """Such as "3.2 h"; beyond a thousand years, "no"."""
    if seconds > 1000 * UNITS[0][1]:
        return "no"
    name, size = next((unit for unit in UNITS if seconds >= unit[1]), UNITS[-1])
    return f"{seconds / size:.2g} {name}" if seconds < 100 * size else f"{seconds / size:.0f} {name}"


def neighbour_bytes(chunks: int, stored: int = 4) -> int:
    """Of a chunk: numbers of 4 bytes, or of 8 from 2^31 chunks on, and distances of 2."""
    return stored * ((4 if chunks < 2**31 else 8) + 2)


def rate(rows: list[Mapping[str, Any]], stage: str, path: str) -> float:
    """Units per processor second of the row whose path begins so."""
    return next(row["per processor second"] for row in rows if row["stage"] == stage and row["path"].startswith(path))


def size_rows() -> list[list[str]]:
    """What lies on disk."""
    kinds = {
        "ids, 2 bytes": lambda _: 128,
        "ids, 4 bytes": lambda _: 256,
        "embeddings, float16, 384 wide": lambda _: 768,
        "embeddings, float16, 768 wide": lambda _: 1536,
        "index, 64-byte codes": lambda _: 72,
        "four neighbours with distances": neighbour_bytes,
    }
    return [
        [name, f"{each(CHUNKS[0])} B", *(bytes_text(count * each(count)) for count in CHUNKS)]
        for name, each in kinds.items()
    ]


def time_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """What one core takes."""
    rows, among = result["rows"], result["settings"]["chunks"]
    linear = {"tokenise": rate(rows, "tokenize", "ours"), "embed, MiniLM": rate(rows, "embed", "ours, 1 workers")}
    exact, index = rate(rows, "neighbours", "ours: exact"), rate(rows, "neighbours", "ours: ivf")
    table = [
        [name, f"{per_second:,.0f} / s", *(time_text(count / per_second) for count in CHUNKS)]
        for name, per_second in linear.items()
    ]
    growing = {"exact": (exact, 1.0), "in the index": (index, 0.5)}
    for name, (per_second, power) in growing.items():
        times = [time_text(count / per_second * (count / among) ** power) for count in CHUNKS]
        table.append([f"neighbours, {name}", f"{per_second:,.0f} / s among {among:,}", *times])
    return table


def scale_table(result: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *size_rows(), *time_rows(result)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(scale_table(json.loads((RESULTS / "retro_prepare-avx512.json").read_text("utf-8"))))
