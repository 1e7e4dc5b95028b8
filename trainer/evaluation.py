"""One evaluation, row by row: what was predicted, how likely the targets were, and what follows from it.

Means are weighted by tokens, so they depend neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graft.atomic_files import write_text
from graft.trainer.metrics import Metric, bits_per_byte, bootstrap_interval, perplexity
from graft.trainer.token_losses import IGNORED, bucket_means

logger = logging.getLogger(__name__)

BUCKET = 128  # target tokens in one bucket of the loss by position


@dataclass
class Evaluation:
    """What one pass over a set of rows gave, in the order of the rows.

    Args:
        name: "eval_full", "test", ...: prefix of its metrics.
        rows: column -> values, as far as the data has them: id, references, source_tokens, truncated, scored_bytes.
        losses: (rows, tokens) nats per target token, -100 where there is none; None without targets.
        predictions: generated texts, or None.
        generated_tokens: tokens of each prediction.
        seconds: time for each row, its share of the batch's.
        values: metric -> value over all rows.
        per_sample: metric -> a value for each row, or fewer where only some rows have a target.
        signature: what the metrics of texts depend on.
    """

    name: str
    rows: Mapping[str, Sequence[Any]]
    losses: NDArray[np.float32] | None
    predictions: list[str] | None
    generated_tokens: list[int] | None
    seconds: list[float]
    values: dict[str, float] = field(default_factory=dict)
    per_sample: dict[str, list[float]] = field(default_factory=dict)
    signature: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seconds)

    def score(self, metrics: Sequence[Metric], by_position: bool) -> None:
        """Fill `values` and `per_sample`.

        Raises:
            ValueError: a row has an empty reference; names it.
        """
        if self.losses is not None:
            self._score_likelihood(by_position)
        if self.predictions is not None and metrics and "references" in self.rows:
            for metric in metrics:
                result = metric(self.predictions, self.rows["references"])
                self.values |= result.mean
                self.per_sample |= result.per_sample
                self.signature |= result.signature

    def _score_likelihood(self, by_position: bool) -> None:
        assert self.losses is not None
        sums, counts = self._sums()
        total, count = float(sums.sum()), int(counts.sum())
        if not count:
            return
        self.values |= {"loss": total / count, "perplexity": perplexity(total, count)}
        self.per_sample["loss"] = [float(part / max(tokens, 1)) for part, tokens in zip(sums, counts, strict=True)]
        if by_position and self.losses.shape[1] > BUCKET:
            self.values |= bucket_means(torch.from_numpy(self.losses), BUCKET)
        if "scored_bytes" in self.rows:
            self.values["bits_per_byte"] = bits_per_byte(total, sum(self.rows["scored_bytes"]))

    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Summed loss and number of target tokens of each row."""
        assert self.losses is not None
        present = self.losses != IGNORED
        return np.where(present, self.losses, 0).sum(axis=1, dtype=np.float64), present.sum(axis=1)

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % bootstrap over rows of a value that is a mean over rows or over tokens; None for other values."""
        if len(self) < 2:
            return None
        if name in ("loss", "perplexity", "bits_per_byte"):
            return self._likelihood_interval(name)
        rows = self.per_sample.get(name, [])
        is_mean = len(rows) > 1 and math.isclose(sum(rows) / len(rows), self.values[name], rel_tol=1e-6, abs_tol=1e-9)
        return bootstrap_interval(rows) if is_mean else None

    def _likelihood_interval(self, name: str, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
        """Rows are drawn, tokens (or bytes) weigh: each draw gives the value as `score` would."""
        sums, counts = self._sums()
        weights = np.asarray(self.rows["scored_bytes"]) * math.log(2) if name == "bits_per_byte" else counts
        drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
        means = sums[drawn].sum(axis=1) / np.maximum(weights[drawn].sum(axis=1), 1)
        low, high = np.quantile(np.exp(np.minimum(means, 700)) if name == "perplexity" else means, [0.025, 0.975])
        return float(low), float(high)

    def lines(self) -> list[dict[str, Any]]:
        """One object for each row, as the prediction files hold it."""
        lines = []
        for row in range(len(self)):
            scores = {name: values[row] for name, values in self.per_sample.items() if len(values) == len(self)}
            references = self._column("references", row)
            lines.append(
                {
                    "id": self._column("id", row, str(row)),
                    "prediction": self.predictions[row] if self.predictions is not None else None,
                    "references": list(references) if references is not None else None,
                    "scores": {name: value if math.isfinite(value) else None for name, value in scores.items()},
                    "source_tokens": self._column("source_tokens", row),
                    "generated_tokens": self.generated_tokens[row] if self.generated_tokens is not None else None,
                    "seconds": round(self.seconds[row], 4),
                    "truncated": self._column("truncated", row),
                }
            )
        return lines

    def extremes(self, count: int = 5) -> str:
        """The worst and the best rows in lines of text, by the last metric with a value for each row."""
        name = next((name for name in reversed(self.per_sample) if len(self.per_sample[name]) == len(self)), None)
        if name is None:
            return ""
        ordered = sorted(self.lines(), key=lambda line: _goodness(name, line["scores"][name]))
        chosen = ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]
        return "\n".join(_described(line, name) for line in chosen)

    def write(self, path: Path) -> None:
        """Write `lines` to `path`; the file is whole or untouched."""
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines()))

    def _column(self, name: str, row: int, default: Any = None) -> Any:
        return self.rows[name][row] if name in self.rows else default


def _goodness(metric: str, score: float | None) -> float:
    """The larger the better; what is no number is the worst."""
    if score is None:
        return -math.inf
    return -score if metric == "loss" else score


def _described(line: Mapping[str, Any], metric: str) -> str:
    """A row of a prediction file for people, with what was written if anything was."""
    score, text = line["scores"][metric], line["prediction"]
    shown = f"  {line['id']}: {metric} {'not finite' if score is None else format(score, '.4g')}"
    return shown if text is None else f"{shown} {text[:80]!r}"
