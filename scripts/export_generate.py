"""Write a folder whose `generate` gives a memory to any supported model, where graft is not installed.

graft-export-generate memory exported/
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.modeling.custom_generate import FUNCTIONS, write_custom_generate
from graft.scripts.exit_codes import exit_code

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="graft-export-generate", description=__doc__.partition("\n")[0])
    parser.add_argument("ability", choices=sorted(FUNCTIONS), help="what `generate` is given")
    parser.add_argument("output", type=Path, help="a new folder; upload it to the Hub as it is")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-export-generate", lambda: _export(given), (OSError,))


def _export(given: argparse.Namespace) -> None:
    write_custom_generate(given.output, given.ability)
    logger.info("model.generate(ids, custom_generate=%r, trust_remote_code=True)", str(given.output))


if __name__ == "__main__":
    raise SystemExit(main())
