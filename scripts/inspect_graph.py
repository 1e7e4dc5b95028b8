"""Show the graphs that a graph-aware model makes of a text: a page with pictures, and a JSON of the numbers.

graft-inspect-graph MODEL --text "Tokens are nodes." --output graph.html
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import exit_code

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="graft-inspect-graph", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", help="folder or id of a model; a plain Llama shows its attention")
    parser.add_argument("--text", required=True, help="a file, a text, or - for standard input")
    parser.add_argument("--output", type=Path, default=Path("graph.html"), help="the page; pictures, JSON beside it")
    parser.add_argument("--max-tokens", type=int, default=128, help="of the text that are read")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Look; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-inspect-graph", lambda: _inspect(given))


def _inspect(given: argparse.Namespace) -> None:
    from graft.trainer.graph_inspection import inspect_graph
    from graft.trainer.named_texts import text_of

    text = text_of(given.text)
    found = inspect_graph(given.model, text, given.output, given.max_tokens, given.trust_remote_code)
    print(json.dumps(found["statistics"], indent=1))
    logger.info("The page is %s", found["page"])


if __name__ == "__main__":
    raise SystemExit(main())
