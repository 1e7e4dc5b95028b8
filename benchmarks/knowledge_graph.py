"""How long a knowledge graph of real text takes on one core, stage by stage.

python benchmarks/knowledge_graph.py --bytes 1000000

The text is the docstrings of installed packages, a document for each source file, until there are `--bytes` of UTF-8.
First `build_knowledge_graph` makes the graph at once. Then its stages run one by one in another folder, timed, and
every file must be the same, byte by byte. Seconds are the processor's, of all threads, and the clock's: on a busy
machine the first are the ones to quote. Prints a row per stage, and keeps benchmarks/results/knowledge_graph.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import keep, machine

from graft.graphs.knowledge_graph import graph_drawing, graph_files, graph_page
from graft.graphs.knowledge_graph.chunk_sources import chunks_of_text
from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph, page_title
from graft.graphs.knowledge_graph.document_entities import CHUNKS
from graft.graphs.knowledge_graph.graph_building import build_graph
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice, extract_mentions, read_mentions
from graft.graphs.knowledge_graph.mentions import TextChunk
from graft.graphs.knowledge_graph.verb_relations import verb_links
from graft.trainer.documentation import package_docstrings, package_folder, without_duplicates

PACKAGES = ("networkx", "datasets", "peft", "accelerate", "transformers")


def documents(packages: Sequence[str], size: int) -> dict[str, str]:
    """Docstrings by source file, in order, until they are `size` bytes; the last is cut."""
    found: dict[str, str] = {}
    left = size
    for folder in filter(None, map(package_folder, packages)):
        docstrings = without_duplicates(package_docstrings(folder))
        for module, of_module in itertools.groupby(docstrings, key=lambda docstring: docstring.module):
            text = "\n\n".join(docstring.text for docstring in of_module)
            found[module] = text.encode()[:left].decode(errors="ignore")
            left -= len(found[module].encode())
            if left <= 0:
                return found
    raise SystemExit(f"The docstrings of {', '.join(packages)} are fewer than {size:,} bytes: {size - left:,}.")


class Stages:
    """Seconds of one stage after the other."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """What `call` returns."""
        clock, processor = time.perf_counter(), time.process_time()
        found = call()
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        self.rows.append({"stage": name, "processor s": round(processor, 2), "clock s": round(clock, 2)})
        print(f"{name:28} {processor:7.2f} s of the processor {clock:7.2f} s by the clock", flush=True)
        return found


def cut(texts: dict[str, str]) -> list[TextChunk]:
    """The chunks of all documents."""
    return [chunk for name, text in texts.items() for chunk in chunks_of_text(name, text)]


def staged(texts: dict[str, str], choice: ExtractorChoice, folder: Path, stages: Stages) -> Any:
    """What `build_knowledge_graph` does, each step timed."""
    chunks = stages.timed("cut into chunks", lambda: cut(texts))
    stages.timed("find mentions", lambda: list(extract_mentions(chunks, folder / "shards", choice)))
    shards = sorted((folder / "shards").iterdir())
    mentions = stages.timed("read them back", lambda: [m for path in shards for m in read_mentions(path)])
    links = stages.timed("find verbs", lambda: verb_links(mentions, chunks))
    found = stages.timed("merge names, make edges", lambda: build_graph(mentions, None, links))

    def write() -> None:
        graph_files.write_graphml(found.graph, folder / "graph.graphml")
        graph_files.write_graph_json(found.graph, folder / "graph.json")
        graph_files.write_mentions(found, folder / "mentions.parquet")
        graph_files.write_merges(found, folder / "merges.json")

    stages.timed("write graph and mentions", write)
    title = page_title(chunks)
    stages.timed("draw the picture", lambda: graph_drawing.write_picture(found, folder / "graph.png", title))
    stages.timed("write the page", lambda: graph_page.write_page(found, chunks, folder / "graph.html", title))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--extractor", default="keyphrase")
    given = parser.parse_args()
    about = machine()
    texts, choice, stages = documents(given.packages, given.bytes), ExtractorChoice(given.extractor), Stages()
    size = sum(len(text.encode()) for text in texts.values())
    print(f"{len(texts)} documents, {size:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        stages.timed("all at once", lambda: build_knowledge_graph(cut(texts), whole, choice))
        found = staged(texts, choice, parts, stages)
        (whole / CHUNKS).unlink()  # where the chunks stand, written last: 0.1 s, and no stage of its own here
        if contents(whole) != contents(parts):
            raise SystemExit("The stages wrote other files than `build_knowledge_graph`.")
    counts = {"documents": len(texts), "bytes": size, "mentions": len(found.mentions)}
    counts |= {"nodes": len(found.graph), "edges": found.graph.number_of_edges()}
    print(counts)
    print(keep("knowledge_graph", vars(given) | counts, stages.rows, about))


if __name__ == "__main__":
    main()
