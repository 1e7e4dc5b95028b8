"""Write a folder whose `generate` gives a memory to any supported model, where graft is not installed.

python scripts/export_generate.py memory exported/
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from graft.modeling.custom_generate import FUNCTIONS, write_custom_generate

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="graft-export-generate", description=__doc__.partition("\n")[0])
    parser.add_argument("ability", choices=sorted(FUNCTIONS))
    parser.add_argument("output", type=Path, help="a new folder; upload it to the Hub as it is")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        write_custom_generate(given.output, given.ability)
    except OSError as error:
        print(f"graft-export-generate: {error}", file=sys.stderr)
        return 2
    logger.info("model.generate(ids, custom_generate=%r, trust_remote_code=True)", str(given.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
