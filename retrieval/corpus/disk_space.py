"""How much disk a stage will need, and whether it is there, before the stage starts."""

import re
import shutil
from pathlib import Path

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
BYTES_PER_TOKEN = 3
"""Fewer bytes of text become one token only in rare texts, so an estimate with it is on the safe side."""


def parse_bytes(text: str | int, name: str = "budget") -> int:
    """A number of bytes from "100m", "1G" or "1.5 GB": powers of 1,024, any case, B optional.

    Raises:
        ValueError: `text` is no such size; says so under the argument's `name`.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)I?B?\s*", text.upper())
    if match is None:
        raise ValueError(f"`{name}` must be a size such as 500M, 16G or 1.5TB, got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """A number of bytes for people: 1.5 GB, in powers of 1,024."""
    units = ["bytes", "KB", "MB", "GB", "TB", "PB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def require_space(folder: str | Path, needed: float) -> None:
    """Raise OSError if the file system of `folder` (or of what exists above it) has less than `needed` bytes free."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"{folder} needs about {format_bytes(needed)}, its disk has {format_bytes(free)} left.")


def corpus_bytes(text_bytes: int, chunk_size: int, id_bytes: int, width: int, neighbours: int) -> dict[str, float]:
    """Bytes that each stage of a corpus will take on disk, estimated from the size of its text.

    Args:
        text_bytes: of all documents.
        chunk_size: tokens per chunk.
        id_bytes: 2 or 4, of one token id.
        width: of an embedding.
        neighbours: stored per chunk.
    """
    chunks = text_bytes / BYTES_PER_TOKEN / chunk_size
    return {
        "tokenize": chunks * chunk_size * id_bytes,
        "embed": chunks * width * 2,
        "neighbours": chunks * neighbours * (4 + 2),
    }
