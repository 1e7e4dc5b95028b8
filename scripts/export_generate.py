"""Write a folder whose `generate` gives a stock model memory or retrieval, where graft is not installed.

graft-export-generate memory exported/
graft-export-generate retrieval exported/ --adapter runs/retrofit --corpus corpora/train
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="graft-export-generate", description=__doc__.partition("\n")[0])
    parser.add_argument("ability", choices=("memory", "retrieval"), help="what `generate` is given")
    parser.add_argument("output", type=Path, help="a new folder; upload it to the Hub as it is")
    parser.add_argument("--adapter", type=Path, help="retrieval: folder of the trained retro-fit, which is copied")
    parser.add_argument(
        "--corpus", type=Path, help="retrieval: a prepared corpus, whose tokens are copied; else give `retriever=`"
    )
    given = parser.parse_args(argv)
    if given.ability == "memory" and (given.adapter or given.corpus):
        parser.error("--adapter and --corpus are of `retrieval`: a memory has no weights.")
    if given.ability == "retrieval" and given.adapter is None:
        parser.error("`retrieval` needs --adapter, the folder of a trained retro-fit.")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Write; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from graft.retrieval.corpus.manifest import CorpusError
    from graft.trainer.configuration_error import ConfigurationError

    return exit_code("graft-export-generate", lambda: _export(given), (OSError, CorpusError, ConfigurationError))


def _export(given: argparse.Namespace) -> None:
    from graft.trainer.generate_export import export_memory, export_retrieval

    read = ""
    if given.ability == "memory":
        export_memory(given.output)
    else:
        export_retrieval(given.output, given.adapter, given.corpus)
        read = f", retrofit={str(given.output)!r}"
    logger.info("model.generate(ids, custom_generate=%r, trust_remote_code=True%s)", str(given.output), read)


if __name__ == "__main__":
    raise SystemExit(main())
