"""Build a data set from the documentation of packages that are installed here: pairs to summarise, documents to read.

python scripts/build_documentation_dataset.py --output .cache/documentation
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.documentation import DEBIAN_DOCUMENTATION, PACKAGES
from graft.trainer.documentation_dataset import DocumentationSettings, build_documentation_dataset

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/documentation"), help="folder to write")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="installed packages to read")
    parser.add_argument("--debian", type=Path, default=DEBIAN_DOCUMENTATION, help="folder of Debian's documentation")
    parser.add_argument("--seed", type=int, default=0, help="of the split by module")
    parser.add_argument("--least-body-words", type=int, default=60, help="shortest text of a pair")
    parser.add_argument("--least-document-words", type=int, default=2000, help="shortest long document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, say where the result lies."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("build_documentation_dataset", lambda: _build(arguments), (ConfigurationError,))


def _build(arguments: argparse.Namespace) -> None:
    settings = DocumentationSettings(
        packages=tuple(arguments.packages),
        debian=arguments.debian,
        seed=arguments.seed,
        least_body_words=arguments.least_body_words,
        least_document_words=arguments.least_document_words,
    )
    counts = build_documentation_dataset(arguments.output, settings)
    logger.info("%s are in %s", ", ".join(f"{name}: {rows}" for name, rows in counts.items()), arguments.output)


if __name__ == "__main__":
    raise SystemExit(main())
