"""Build a graph of what texts name, and of what stands together in their sentences
or is joined there by a verb.

graft-knowledge-graph books/ --out graph/
graft-knowledge-graph chunks.parquet --out graph/ --extractor gazetteer:names.txt

It writes graph.graphml, graph.json, mentions.parquet, merges.json, chunks.parquet, graph.png and graph.html.
After a kill, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from graft.scripts.exit_codes import GOES_ON, exit_code

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="graft-knowledge-graph", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="folder of .txt, .md, .rst; .jsonl; .parquet; or a saved data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--text-field", default="text", help="key or column of rows that are whole documents")
    parser.add_argument("--chunk-characters", type=int, default=2000, help="documents are cut into chunks this long")
    parser.add_argument(
        "--extractor",
        default="keyphrase",
        help="keyphrase[:LANGUAGE], capitalised, gazetteer:FILE, spacy:MODEL or gliner:MODEL",
    )
    parser.add_argument("--label", action="append", default=[], help="what GLiNER shall find; may be repeated")
    parser.add_argument("--window", type=int, default=1, help="sentences within which entities stand together")
    parser.add_argument("--min-weight", type=int, default=2, help="least count of an edge")
    parser.add_argument("--min-npmi", type=float, default=0.0, help="least mutual information of an edge, -1 to 1")
    parser.add_argument("--min-verb-weight", type=int, default=1, help="least count of an edge that a verb names")
    parser.add_argument("--max-nodes", type=int, help="keep the nodes of highest PageRank")
    parser.add_argument("--aliases", type=Path, help="JSON object: surface -> name to use")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build; 2 and one line on stderr for a user's mistake."""
    given = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return exit_code("graft-knowledge-graph", lambda: _build(given), when_interrupted=GOES_ON)


def _build(given: argparse.Namespace) -> None:
    from graft.graphs.knowledge_graph.chunk_sources import read_chunks
    from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph
    from graft.graphs.knowledge_graph.graph_building import GraphSettings
    from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice

    settings = GraphSettings(
        window=given.window,
        min_weight=given.min_weight,
        min_npmi=given.min_npmi,
        min_verb_weight=given.min_verb_weight,
        max_nodes=given.max_nodes,
        aliases=aliases_in(given.aliases) if given.aliases else {},
    )
    choice = ExtractorChoice(given.extractor, tuple(given.label))
    chunks = read_chunks(given.input, given.text_field, given.chunk_characters)
    found = build_knowledge_graph(chunks, given.out, choice, settings, given.workers)
    logger.info(
        "%s chunks, %s mentions, %s nodes, %s edges, %s merges; the page is %s",
        *(len(chunks), len(found.mentions), len(found.graph), found.graph.number_of_edges(), len(found.merges)),
        given.out / "graph.html",
    )


def aliases_in(path: Path) -> dict[str, str]:
    """The names to use for surfaces, of a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`--aliases` {path} is no JSON: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f'`--aliases` {path} must hold an object such as {{"surface": "name"}}.')
    return found


if __name__ == "__main__":
    raise SystemExit(main())
