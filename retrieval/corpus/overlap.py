"""How much of a chunk its neighbours repeat: to leave near-duplicates out, and to tell copying from learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NGRAM = 8


@dataclass(frozen=True)
class LossUpTo:
    """Mean loss of the chunks whose neighbours repeat at most `overlap` of them; None if there are none."""

    overlap: float
    mean_loss: float | None
    num_chunks: int


def shared_ngrams(chunks: np.ndarray, passages: np.ndarray, padding: int, n: int = NGRAM) -> np.ndarray:
    """The share of each passage's n-grams that its chunk has too.

    Args:
        chunks: (count, m) ids.
        passages: (count, r) ids.
        padding: an n-gram with this id does not count.
        n: tokens in a row.

    Returns:
        (count,) float64 in [0, 1]; 0 for a passage without n-grams.
    """
    if chunks.shape[1] < n or passages.shape[1] < n:
        return np.zeros(len(chunks))
    ours = np.lib.stride_tricks.sliding_window_view(chunks, n, axis=1)  # (count, m - n + 1, n)
    theirs = np.lib.stride_tricks.sliding_window_view(passages, n, axis=1)
    counts = (theirs != padding).all(-1)
    shared = np.empty(len(chunks))
    for row in range(len(chunks)):
        known = {gram.tobytes() for gram in np.ascontiguousarray(ours[row])}
        found = [gram.tobytes() in known for gram in np.ascontiguousarray(theirs[row])]
        shared[row] = np.asarray(found)[counts[row]].mean() if counts[row].any() else 0.0
    return shared


def longest_shared_run(chunks: np.ndarray, passages: np.ndarray, padding: int) -> np.ndarray:
    """The longest run of tokens that a chunk and its passage have in common.

    Args:
        chunks: (count, m) ids.
        passages: (count, r) ids.
        padding: the id that never counts.

    Returns:
        (count,) int64, in tokens. Divided by m this is the r(C) of Borgeaud et al. 2021 (section 2.6).
    """
    best = np.zeros(len(chunks), dtype=np.int64)
    runs = np.zeros((len(chunks), passages.shape[1] + 1), dtype=np.int64)
    real = passages != padding
    for column in range(chunks.shape[1]):
        same = (passages == chunks[:, column, None]) & real
        runs[:, 1:] = np.where(same, runs[:, :-1] + 1, 0)  # the run that ends in this token of both
        best = np.maximum(best, runs.max(1))
    return best


def loss_by_overlap(
    losses: np.ndarray, overlaps: np.ndarray, thresholds: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0)
) -> list[LossUpTo]:
    """The paper's test for leakage: the loss of chunks that are at most so much repeated in their neighbours.

    A gain from retrieval that is there at small thresholds is no copying.

    Args:
        losses: (count,) mean loss of each chunk's tokens.
        overlaps: (count,) share of the chunk, such as `longest_shared_run(...) / m`.
        thresholds: ascending.

    Raises:
        ValueError: `losses` and `overlaps` differ in shape.
    """
    if losses.shape != overlaps.shape:
        raise ValueError(f"`losses` and `overlaps` must have one shape, got {losses.shape} and {overlaps.shape}.")
    rows = []
    for threshold in thresholds:
        chosen = losses[overlaps <= threshold]
        rows.append(LossUpTo(threshold, float(chosen.mean()) if len(chosen) else None, len(chosen)))
    return rows


def without_near_duplicates(
    ids: np.ndarray, distances: np.ndarray, overlaps: np.ndarray, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """Take out neighbours that overlap by more than `most`; the others move up, -1 and infinity fill the end.

    Args:
        ids, distances, overlaps: (count, k).
        most: share in [0, 1].
    """
    dropped = overlaps > most
    order = np.argsort(dropped, axis=1, kind="stable")
    ids, distances = np.where(dropped, -1, ids), np.where(dropped, np.inf, distances)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
