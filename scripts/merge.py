"""Fold an adapter into its base and write a folder that loads without PEFT.

A sparse-GIN adapter on a Llama becomes a graph-aware Llama, which brings its code.

graft-merge runs/quickstart merged/
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code
from graft.trainer.configuration_error import ConfigurationError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="graft-merge", description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", help="folder or Hub id of the adapter")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--base", help="folder or id of the base, if it is not where the adapter says")
    parser.add_argument("--revision", help="commit, tag or branch of the adapter's id")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights written; auto: the base's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-merge", lambda: _merge(given), (ConfigurationError,))


def _merge(given: argparse.Namespace) -> None:
    from graft.trainer.merging import merge_adapter

    merge_adapter(given.adapter, given.output, given.base, given.dtype, given.trust_remote_code, given.revision)


if __name__ == "__main__":
    raise SystemExit(main())
