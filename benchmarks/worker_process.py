"""A system under test in a process of its own, with an environment of its own, that answers when it is asked.

Several stand ready at once and are asked in turn, so a noisy machine disturbs them alike, as `measuring.in_turn` does
within one process. served_calls.py is the other end.
"""

import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from measuring import ratio

PASSES = ("fwd", "fwd+bwd")


class Worker:
    """One process; `ask` gives its next answer. What it writes to stderr is shown."""

    def __init__(self, python: str, script: Path, options: Mapping[str, Any]) -> None:
        command = [python, str(script)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=os.environ | quiet)

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to one line.

        Raises:
            RuntimeError: the process has ended.
        """
        questions, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            print(what, file=questions, flush=True)
        line = answers.readline()
        if not line:
            raise RuntimeError(f"The process ended, with {self.process.wait()}: {self.process.args}")
        return json.loads(line)

    def close(self) -> None:
        questions, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            questions.close()
        self.process.wait()
        answers.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout


@contextlib.contextmanager
def standing(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """All of them closed in the end."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def difference(workers: Mapping[str, Worker], one: str, other: str) -> float:
    """The largest, of the numbers that two systems computed for the same inputs."""
    pairs = zip(workers[one].ask("probe")["probe"], workers[other].ask("probe")["probe"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def measured(
    workers: Mapping[str, Worker], rounds: int, ours: str = "ours", names: Sequence[str] = PASSES
) -> dict[str, dict[str, Any]]:
    """Figures of each system: medians, quartiles of its ratio to ours in the same round, peak of the last pass.

    The ratio of processor time, of all threads, stands beside that of wall time: what others do on the machine is not
    in it. Without rounds, the peaks alone.
    """
    figures = {system: worker.ask(f"peak {names[-1]}") for system, worker in workers.items()}  # also the warm-up
    for name in names if rounds else ():
        times: dict[str, list[dict[str, float]]] = {system: [] for system in workers}
        for _ in range(rounds):
            for system, worker in workers.items():
                times[system].append(worker.ask(name))
        for system, found in times.items():
            wall, processor = ([each[key] for each in found] for key in ("seconds", "processor seconds"))
            our_wall, our_processor = ([e[key] for e in times[ours]] for key in ("seconds", "processor seconds"))
            figures[system] |= {
                f"{name} ms": round(1e3 * statistics.median(wall), 3),
                f"{name} / ours": ratio(wall, our_wall),
                f"{name} processor / ours": ratio(processor, our_processor),
            }
    return figures


def text_of(figures: Mapping[str, Any], names: Sequence[str] = PASSES) -> str:
    """Times and ratios of one system, for the reader."""
    parts = []
    for name in names if f"{names[0]} ms" in figures else ():
        quartiles = figures[f"{name} / ours"]
        spread = f"[{quartiles['low']:.2f}, {quartiles['high']:.2f}]"
        parts.append(f"{name} {figures[f'{name} ms']:9.1f} ms x{quartiles['median']:5.2f} {spread:14}")
    return " ".join([*parts, f"{figures['peak MB']:8.1f} MB"])
