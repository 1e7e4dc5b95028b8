"""Write a data set of the Unlimiformer paper as the Parquet files that its recipe in configs/paper/ reads.

python scripts/prepare_paper_dataset.py gov_report
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.paper_datasets import PAPER_DATASETS, prepare_paper_dataset

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PAPER_DATASETS, help="which one")
    parser.add_argument("--source", help="the downloaded zip of a SCROLLS task, or a folder instead of the Hub's data")
    parser.add_argument("--output", type=Path, help="folder to write, .cache/paper/NAME by default")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, write, say where the result lies."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("prepare_paper_dataset", lambda: _prepare(arguments), (ConfigurationError,))


def _prepare(arguments: argparse.Namespace) -> None:
    output = arguments.output or Path(".cache/paper") / arguments.name
    counts = prepare_paper_dataset(arguments.name, output, arguments.source)
    logger.info("%s are in %s", ", ".join(f"{name}: {rows} rows" for name, rows in counts.items()), output)


if __name__ == "__main__":
    raise SystemExit(main())
