"""Look after a retrieval corpus.

graft-corpus verify corpus/
graft-corpus inspect corpus/ --chunk 17 --page neighbours.html
graft-corpus append corpus/ more_books/
graft-corpus refresh corpus/
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import GOES_ON, MISTAKES, exit_code

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="graft-corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("corpus", type=Path, help="folder of the corpus")
    verify = commands.add_parser(
        "verify", help="sizes, checksums, order; exit code 1 and one line per fault", parents=[parent]
    )
    verify.add_argument("--fast", action="store_true", help="sizes only")
    verify.add_argument("--embed", action="store_true", help="also embed 100 chunks again")
    inspect = commands.add_parser("inspect", help="show chunks and their neighbours as text", parents=[parent])
    inspect.add_argument("--chunk", type=int, action="append", help="number of a chunk; may be repeated")
    inspect.add_argument("--page", type=Path, help="write an HTML page instead")
    append = commands.add_parser("append", help="add documents; older chunks keep their neighbours", parents=[parent])
    append.add_argument("input", type=Path, help="a folder of text, or a .txt, .md, .jsonl or .parquet file")
    append.add_argument("--glob", default="**/*.txt", help="which files of a folder")
    append.add_argument("--text-field", default="text", help="key or column of the text")
    append.add_argument(
        "--errors",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="what is done about text that is no UTF-8",
    )
    append.add_argument("--max-chunks", type=int, help="of the whole corpus; default: no limit")
    refresh = commands.add_parser("refresh", help="search all neighbours again", parents=[parent])
    refresh.add_argument("--neighbours", type=int, help="stored per chunk; default: as before")
    for command in (append, refresh):
        command.add_argument("--workers", type=int, help="threads; default: the cores")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; 1 if `verify` finds a fault, 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    work = {"verify": _verify, "inspect": _inspect, "append": _append, "refresh": _refresh}[given.command]
    left = GOES_ON if work in (_append, _refresh) else ""
    return exit_code(f"graft-corpus {given.command}", lambda: work(given), (*MISTAKES, IndexError), left)


def _verify(given: argparse.Namespace) -> int:
    from graft.retrieval.corpus.corpus import Corpus
    from graft.retrieval.corpus.corpus_retriever import embedder_of
    from graft.retrieval.corpus.verification import verify_corpus

    faults = verify_corpus(given.corpus, given.fast, embedder_of(Corpus(given.corpus)) if given.embed else None)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{given.corpus} is sound.")
    return int(bool(faults))


def _inspect(given: argparse.Namespace) -> int:
    from graft.retrieval.corpus.corpus import Corpus
    from graft.retrieval.corpus.inspection import inspect_page, inspect_text

    corpus = Corpus(given.corpus)
    chunks = given.chunk or [len(corpus) * part // 4 for part in range(4)]
    if given.page:
        logger.info("the page is %s", inspect_page(corpus, chunks, given.page))
    else:
        print(inspect_text(corpus, chunks))
    return 0


def _append(given: argparse.Namespace) -> int:
    from graft.retrieval.corpus.document_sources import open_source
    from graft.retrieval.corpus.preparation import append_documents

    source = open_source(given.input, given.glob, given.text_field, given.errors)
    logger.info("%s", append_documents(source, given.corpus, workers=given.workers, max_chunks=given.max_chunks))
    return 0


def _refresh(given: argparse.Namespace) -> int:
    from graft.retrieval.corpus.preparation import refresh_neighbours

    logger.info("%s", refresh_neighbours(given.corpus, given.neighbours, given.workers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
