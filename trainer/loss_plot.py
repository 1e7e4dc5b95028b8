"""Losses over the steps of a run, as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from graft.atomic_files import new_file

Curves = dict[str, list[tuple[float, float]]]
_DASHES = ("-", "--", ":", "-.")  # of evaluations in turn: views that agree lie on each other


def plot_losses(
    log_history: Iterable[dict[str, Any]],
    path: Path | str,
    best_step: int | None = None,
    average: int | Literal["epoch"] | None = None,
) -> None:
    """Draw training loss, each view's evaluation loss and the learning rate over steps.

    Nothing is written where nothing was logged.

    Args:
        log_history: of a Trainer's state, or the lines of a run's metrics.jsonl.
        path: of the PNG.
        best_step: is marked.
        average: draw the training loss as means: over so many logs, or over each epoch.

    Raises:
        ValueError: `average` is below 1.
    """
    log_history = list(log_history)
    curves: Curves = {name: list(points) for name, points in loss_curves(log_history).items()}
    if average is not None and "train" in curves:
        name, points = averaged_losses(log_history, average)
        curves = {name: points, **{other: curves[other] for other in curves if other != "train"}}
    if not curves:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: no display and no state of the process is touched
    axes = figure.add_subplot()
    evaluations = [name for name in curves if name.startswith("eval")]
    for name, points in curves.items():
        if name != "learning_rate":
            steps, values = zip(*points, strict=True)
            dash = _DASHES[evaluations.index(name) % len(_DASHES)] if name in evaluations else "-"
            dots = "." if len(points) < 40 else None
            axes.plot(steps, values, dash, label=name, marker=dots, linewidth=1.8 if name in evaluations else 1.3)
    if best_step:
        axes.axvline(best_step, color="grey", linestyle=":", label=f"best step ({best_step})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if rate := curves.get("learning_rate"):
        right = axes.twinx()
        right.plot(*zip(*rate, strict=True), color="grey", alpha=0.5, linewidth=1, label="learning rate")
        right.set_ylabel("learning rate")
        handles, labels = [*handles, *right.get_lines()], [*labels, "learning rate"]
    axes.legend(handles, labels, fontsize=8)
    with new_file(path) as unfinished, unfinished.open("wb") as file:
        canvas.print_png(file)


def loss_curves(log_history: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name of a curve -> its (step, value) points, in the order in which they were logged.

    A second value at one step is the final evaluation, which may have read more rows: a curve of its own.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            is_loss = key == "loss" or (key.startswith("eval_") and key.endswith("_loss")) or key == "eval_loss"
            if is_loss or key == "learning_rate":
                name = {"loss": "train", "learning_rate": key}.get(key, key.removesuffix("_loss").replace("_", " "))
                if name in curves and curves[name][-1][0] == entry["step"]:
                    name += ", final"
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def averaged_losses(
    log_history: Iterable[dict[str, Any]], average: int | Literal["epoch"]
) -> tuple[str, list[tuple[float, float]]]:
    """Name and (mean step, mean training loss) of every `average` logs in turn, or of each epoch.

    Raises:
        ValueError: `average` is below 1.
    """
    logs = [(entry["step"], entry["loss"], entry.get("epoch", 0.0)) for entry in log_history if "loss" in entry]
    if average == "epoch":
        groups: dict[float, list[tuple[float, float]]] = {}
        for step, loss, epoch in logs:
            groups.setdefault(max(0, -(-epoch // 1) - 1), []).append((step, loss))  # epoch 1.0 ends the first
        chunks = list(groups.values())
    elif average < 1:
        raise ValueError(f"`average` must be at least 1, 'epoch' or None, got {average}.")
    else:
        pairs = [(step, loss) for step, loss, _ in logs]
        chunks = [pairs[start : start + average] for start in range(0, len(pairs), average)]
    points = [(statistics.fmean(s for s, _ in chunk), statistics.fmean(x for _, x in chunk)) for chunk in chunks]
    return "train, mean of " + ("each epoch" if average == "epoch" else f"{average} logs"), points
