"""Train, evaluate and predict as a configuration says: JSON or YAML files merged from left to right, then overrides.

accelerate launch scripts/run.py CONFIG [CONFIG ...] [--block.field value ...] [--no-block]
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code
from graft.trainer.configuration_error import ConfigurationError


def parse(argv: Sequence[str]) -> tuple[list[str], argparse.Namespace, list[str]]:
    """The configuration files, the flags of this script, and the overrides it leaves to the configuration."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [CONFIG ...] [flags] [--block.field value ...] [--no-block]",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, as its run.json says")
    parser.add_argument("--dry-run", action="store_true", help="load eight rows, show the plan, stop")
    parser.add_argument("--fresh", action="store_true", help="refuse to start unless the output folder is empty")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--metric", action="append", default=[], metavar="MODULE:FUNCTION", help="a metric of yours")
    first = next((place for place, token in enumerate(argv) if token.startswith("-")), len(argv))
    flags, overrides = parser.parse_known_args(argv[first:])
    if not argv:
        parser.error("name a configuration file, or a run with --resume DIR")
    return list(argv[:first]), flags, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 2 and one line on stderr for a user's mistake, 143 if a signal stopped the run."""
    argv = sys.argv[1:] if argv is None else argv
    configs, given, overrides = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # rouge_score greets at every evaluation
    return exit_code("graft-train", lambda: _run(argv, configs, given, overrides), (ConfigurationError,))


def _run(argv: Sequence[str], configs: list[str], given: argparse.Namespace, overrides: list[str]) -> int:
    from graft.trainer.config_file import read_configuration
    from graft.trainer.training_run import RunFlags, metric_of_ones_own, run

    if given.resume is not None:
        configs = [str(given.resume / "run.json"), *configs]
        overrides = ["--training.output_dir", str(given.resume), *overrides]
    command = shlex.join(["graft-train", *argv])
    metrics = [metric_of_ones_own(name) for name in given.metric]
    flags = RunFlags(given.dry_run, given.fresh, given.trust_remote_code, metrics, command)
    record = run(read_configuration(configs, overrides), flags)
    results = record.get("results", {})
    print(record.get("plan") or "\n".join(f"{name:40} {value:.5g}" for name, value in results.items()))
    return 143 if record.get("status") == "interrupted" else 0


if __name__ == "__main__":
    raise SystemExit(main())
