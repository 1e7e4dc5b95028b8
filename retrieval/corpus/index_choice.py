"""Which index fits a number of vectors into a budget of memory, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..faiss_indexes import MINIMUM_POINTS, TRAINING_POINTS, choose_nlist
from .disk_space import format_bytes, parse_bytes

EXACT_UP_TO = 50_000
CODE_SIZES = (64, 56, 48, 32, 16)
ID_BYTES = 8


@dataclass(frozen=True)
class IndexChoice:
    """An index for a corpus.

    Args:
        kind: of a Datastore.
        training_size: vectors it is trained on; 0 if it learns nothing.
        num_bytes: that it will take in memory, about.
        reason: why this one, for people.
        parameters: of the Datastore.
    """

    kind: str
    training_size: int
    num_bytes: int
    reason: str
    parameters: dict[str, Any] = field(default_factory=dict)


def choose_index(
    count: int,
    dim: int,
    max_index_memory_usage: str | int = "16G",
    current_memory_available: str | int = "32G",
    index: str | None = None,
) -> IndexChoice:
    """The most exact index that fits.

    Up to 50,000 vectors: exact. Beyond: inverted lists of whole vectors, else of vectors in 8 bits, else of product
    codes of the most bytes that fit.

    Args:
        count: vectors.
        dim: of a vector.
        max_index_memory_usage: budget of the finished index, such as "500M".
        current_memory_available: while it is made; training vectors must fit too.
        index: ask for a kind by name instead.

    Raises:
        ValueError: a size cannot be read, no index fits the budget, or there are too few vectors for lists.
    """
    if count < 1 or dim < 1:
        raise ValueError(f"`count` and `dim` must be at least 1, got {count} and {dim}.")
    budget = min(
        parse_bytes(max_index_memory_usage, "max_index_memory_usage"),
        parse_bytes(current_memory_available, "current_memory_available"),
    )
    kinds = _candidates(count, dim)
    if index is not None:
        chosen = [choice for choice in kinds if choice.kind == index]
        if not chosen:
            known = sorted({choice.kind for choice in kinds})
            raise ValueError(f"`index` for {count} vectors must be one of {', '.join(known)}, got {index!r}.")
        kinds = chosen
    else:
        kinds = [
            choice for choice in kinds if choice.kind != "hnsw" and (choice.kind != "exact" or count <= EXACT_UP_TO)
        ]
    fitting = [choice for choice in kinds if choice.num_bytes <= budget]
    if not fitting:
        least = min(choice.num_bytes for choice in kinds)
        raise ValueError(
            f"`max_index_memory_usage` and `current_memory_available` must be at least {format_bytes(least)} for "
            f"{count} chunks, got {format_bytes(budget)}."
        )
    return fitting[0]


def _candidates(count: int, dim: int) -> list[IndexChoice]:
    """All that make sense for so many vectors, the most exact first."""
    choices = [IndexChoice("exact", 0, count * dim * 2, f"{count} vectors are few enough to score them all")]
    if count >= MINIMUM_POINTS:
        nlist = choose_nlist(count)
        training = min(count, TRAINING_POINTS * nlist)
        why = f"{nlist} lists, about 4 sqrt({count})"
        for kind, bytes_each in (("ivf_flat", dim * 4), ("ivf_sq8", dim)):
            size = count * (bytes_each + ID_BYTES) + nlist * dim * 4
            choices.append(IndexChoice(kind, training, size, why, {"nlist": nlist}))
        for code in CODE_SIZES:
            if 4 * code <= dim and count >= MINIMUM_POINTS * 256:  # a code book has 256 entries
                size = count * (code + ID_BYTES) + nlist * 16 * code
                why_code = f"{why}, codes of {code} bytes are the largest that fit"
                choices.append(
                    IndexChoice("opq_ivf_pq", training, size, why_code, {"nlist": nlist, "code_size": code})
                )
    links = "a graph, asked for"
    choices.append(IndexChoice("hnsw", 0, count * (dim * 4 + 256), links, {"neighbours": 32}))
    return choices


def least_probes(nlist: int) -> list[int]:
    """Numbers of lists to try, doubling up to all."""
    return [2**power for power in range(int(math.log2(nlist)) + 1) if 2**power < nlist] + [nlist]
