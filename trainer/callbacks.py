"""What is written while a run trains: losses as JSON lines and as a picture, speed, and a few generated texts.

None of these holds anything that resuming needs: each file is rebuilt from the Trainer's state or from other files.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graft.atomic_files import write_text
from graft.trainer.loss_plot import plot_losses

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
SAMPLES_FILE = "samples.jsonl"


class LossCurve(TrainerCallback):
    """`metrics.jsonl`, a line for each log, and `loss.png`, redrawn after every evaluation and at the end."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what a killed run logged after the checkpoint this run goes on from."""
        path = output_folder(args) / METRICS_FILE
        if state.is_world_process_zero and path.is_file():
            kept = [line for line in read_json_lines(path) if 0 < line.get("step", 0) <= state.global_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append one line in one write, so that a kill leaves no half of it."""
        logs: dict[str, Any] | None = kwargs.get("logs")
        if state.is_world_process_zero and logs is not None:
            append_json_line(output_folder(args) / METRICS_FILE, {"step": state.global_step, **logs})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw the picture."""
        if state.is_world_process_zero:
            plot_losses(state.log_history, output_folder(args) / PLOT_FILE, state.best_global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw the picture."""
        self.on_evaluate(args, state, control)


class Throughput(TrainerCallback):
    """Adds tokens per second of training (evaluation and saving left out) and peak memory to every training log.

    It must stand before LossCurve in the list, which writes what it finds. Tokens are counted only with the stock's
    `include_num_input_tokens_seen`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from here."""
        self.seconds, self.tokens_before = 0.0, state.num_input_tokens_seen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add `tokens_per_second` since the last training log and `peak_memory_bytes` of this process."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        tokens = state.num_input_tokens_seen - self.tokens_before
        if tokens > 0 and self.seconds > 0:
            logs["tokens_per_second"] = round(tokens / self.seconds, 1)
        logs["peak_memory_bytes"] = peak_memory_bytes()
        self.seconds, self.tokens_before = 0.0, state.num_input_tokens_seen


class GenerationSamples(TrainerCallback):
    """`samples.jsonl`: after each evaluation the predictions for the same three documents, so one sees them change.

    Reads the prediction files that the Trainer has just written; nothing is generated twice.
    """

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the first, the middle and the last document's prediction of each view of this step."""
        if not state.is_world_process_zero or not getattr(args, "predict_with_generate", False):
            return
        samples = output_folder(args) / SAMPLES_FILE
        known = {(line["file"], line["id"]) for line in read_json_lines(samples)} if samples.is_file() else set()
        for path in sorted((output_folder(args) / "predictions").glob(f"*-step-{state.global_step:06d}.jsonl")):
            rows = read_json_lines(path)
            for index in sorted({0, len(rows) // 2, len(rows) - 1}) if rows else []:
                row = {"file": path.name, **{key: rows[index].get(key) for key in ("id", "prediction", "references")}}
                if (row["file"], row["id"]) not in known:
                    append_json_line(samples, row)


def output_folder(args: TrainingArguments) -> Path:
    """Where the run writes; the stock allows None for the working directory."""
    return Path(args.output_dir or ".")


def peak_memory_bytes() -> int:
    """Most memory this process has held: on the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def append_json_line(path: Path, line: dict[str, Any]) -> None:
    """Append `line` to `path` in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `path`; a last line that a full disk cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            logger.warning("A line of %s is unreadable and was left out.", path)
    return lines
