"""A knowledge graph of real documentation: what the docstrings of installed packages name, what stands together, and
which earlier chunks each chunk of one document reads. Offline, about a minute on a CPU; ends in pictures and a page.

python examples/knowledge_graph_of_documentation.py --run runs/knowledge_graph

A document is a source file, its docstrings one after the other. What is found are words that stand out in sentences
that stand together, not checked facts; every edge can show the sentence it comes from.
"""

import argparse
import itertools
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from graft import ChunkGraph, pages
from graft.graphs.knowledge_graph.chunk_sources import chunks_of_text
from graft.graphs.knowledge_graph.chunk_weights import chunk_weights, entities_of_chunks, graph_report
from graft.graphs.knowledge_graph.corpus_graph import build_knowledge_graph
from graft.graphs.knowledge_graph.entity_extractors import extractor_by_name
from graft.graphs.knowledge_graph.entity_names import EntityMerger
from graft.graphs.knowledge_graph.graph_building import GraphSettings, KnowledgeGraph, top_nodes
from graft.graphs.knowledge_graph.mention_shards import ExtractorChoice
from graft.graphs.knowledge_graph.mentions import TextChunk
from graft.trainer.documentation import package_docstrings, package_folder, without_duplicates

CHUNK = 1000  # characters at most
# What docstrings hold beside sentences, and what every one of them names: examples, fences, headings of sections with
# their underlines, and the types of parameters.
NO_PROSE = re.compile(
    r"^```[\s\S]*?^```$|^ *(?:>>>|\.\.\.).*$|^ *[A-Z][\w ]*\n *[-=~]{3,} *$"
    r"|^ *[\w*, ]+ : .*$|^ *[\w*`.]+ ?\([^\n]*\):(?: |$)"
    r"|^ *(?:Args|Returns|Raises|Yields|Examples?|Parameters|Notes?|References):* *$",
    re.MULTILINE,
)


def read_documents(packages: Sequence[str], characters: int) -> dict[str, str]:
    """The prose of docstrings by source file, as many files of each package as fit into its share of `characters`."""
    documents = {}
    for package in packages:
        folder = package_folder(package)
        if folder is None:
            raise SystemExit(f"{package} is not installed; name others with --packages.")
        left = characters // len(packages)
        found = without_duplicates(package_docstrings(folder))
        for module, docstrings in itertools.groupby(found, key=lambda docstring: docstring.module):
            text = "\n\n".join(NO_PROSE.sub("", docstring.text) for docstring in docstrings)
            text = re.sub(r"\n\s*\n\s*", "\n\n", text)
            if len(text) <= left:
                documents[module] = text
                left -= len(text)
    return documents


def print_findings(found: KnowledgeGraph, chunks: Sequence[TextChunk], count: int = 10) -> None:
    """The entities of highest PageRank, the strongest edges and what verbs say, each with a sentence of its own."""
    graph, texts = found.graph, {(chunk.document, chunk.index): chunk.text for chunk in chunks}
    print("\nEntities of highest PageRank: mentions, documents, other ways to write it")
    for node in map(graph.nodes.__getitem__, top_nodes(graph, count)):
        others = ", ".join(alias for alias in node["aliases"] if alias != node["name"])
        print(f"  {node['name']:28.28} {node['count']:5} {len({d for d, _ in node['chunks']}):4}   {others[:60]}")
    print("\nWhat stands together often and not by chance: times, NPMI, and the first such sentence with its place")
    edges = [edge for edge in graph.edges(data=True) if edge[2]["relation"] == "co_occurs"]
    for source, target, data in sorted(edges, key=lambda edge: (-edge[2]["weight"] * edge[2]["npmi"], edge[:2]))[
        :count
    ]:
        pair = f"{graph.nodes[source]['name']} - {graph.nodes[target]['name']}"
        print(f"  {pair}: {data['weight']} times, {data['npmi']:.2f}")
        print_place(data["example"], texts)
    verbs = [edge for edge in graph.edges(data=True) if "verb" in edge[2]]
    print(f"\nWhat verbs say, the most frequent of {len(verbs)} such edges")
    for source, target, data in sorted(verbs, key=lambda edge: (-edge[2]["weight"], edge[:2]))[:count]:
        print(
            f"  {graph.nodes[source]['name']} - {data['relation']} -> {graph.nodes[target]['name']}: {data['weight']}"
        )
        print_place(data["example"], texts)


def print_place(example: Sequence, texts: dict[tuple[str, int], str]) -> None:
    """A sentence and where it stands."""
    document, chunk, start, end = example
    print(f"    {document}, chunk {chunk}, {start}-{end}: {shorten(texts[document, chunk][start:end])}")


def shorten(text: str, length: int = 100) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def weigh_chunks(document: str, text: str, folder: Path) -> Path:
    """Print and draw what each chunk of one document may read of earlier ones, and make attention's graph of it."""
    texts = [chunk.text for chunk in chunks_of_text(document, text, CHUNK)]
    merger = EntityMerger()
    entities = entities_of_chunks(texts, extractor_by_name("keyphrase"), merger)
    weights = chunk_weights(entities, own=0.0)
    named = [{entity for sentence in chunk for entity in sentence} for chunk in entities]
    report = graph_report(weights)
    print(
        f"\n{document}: {len(texts)} chunks; {100 * report['coverage']:.0f} % of those with a past read of it, "
        f"{100 * report['density']:.0f} % of all pairs are joined. The largest weights behind a gap:"
    )
    # A row knows only what was complete before its chunk began: the chunk before it asks in its place.
    far = [(row, chunk) for row in range(2, len(texts)) for chunk in range(row - 2)]
    for row, chunk in sorted(far, key=lambda pair: (-weights[pair], pair))[:5]:
        shared = sorted(merger.name(entity) for entity in named[row - 1] & named[chunk])
        print(f"  chunk {row} reads chunk {chunk} with {weights[row, chunk]:.2f}: {', '.join(shared)[:90]}")
    # Here a token is a character, so that no tokenizer is needed; a model's own come from `chunk_dataset`.
    lengths = torch.tensor([len(text) for text in texts])
    chunk_ids = torch.arange(len(texts)).repeat_interleave(lengths)[None]
    graph = ChunkGraph(chunk_ids=chunk_ids, weights=torch.from_numpy(weights)[None])
    print(f"As a graph for attention: {tuple(graph.chunk_ids.shape)} tokens, weights {tuple(graph.weights.shape)}.")
    numbers = [str(chunk) for chunk in range(len(texts))]
    title = f"What each chunk of {document} reads of earlier ones"
    names, measure = ("chunk that is read", "chunk that reads"), "weight; those of a row sum to 1"
    return pages.heat_map_png(weights, folder / "chunk_weights.png", numbers, numbers, title, names, measure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/knowledge_graph"))
    parser.add_argument("--packages", nargs="+", default=["networkx", "datasets", "peft"])
    parser.add_argument("--characters", type=int, default=900_000, help="of documentation, all packages together")
    parser.add_argument("--extractor", default="keyphrase", help="as graft-knowledge-graph takes it")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    documents = read_documents(arguments.packages, arguments.characters)
    chunks = [chunk for name, text in documents.items() for chunk in chunks_of_text(name, text, CHUNK)]
    print(f"{len(documents)} documents, {sum(map(len, documents.values())):,} characters, {len(chunks)} chunks")
    # Three sentences, not two: what stands together twice in this much text may do so by chance.
    settings = GraphSettings(min_weight=3, min_npmi=0.1, max_nodes=600)
    found = build_knowledge_graph(chunks, arguments.run, ExtractorChoice(arguments.extractor), settings)
    counts = len(found.mentions), len(found.graph), found.graph.number_of_edges(), len(found.merges)
    print("{:,} mentions of {:,} things, {:,} edges, {:,} names merged".format(*counts))
    print_findings(found, chunks)
    longest = max(documents, key=lambda name: (len(documents[name]) < 30_000, len(documents[name])))
    picture = weigh_chunks(longest, documents[longest], arguments.run)
    print(f"\nThis took {time.monotonic() - started:.0f} s. Open:")
    for what, path in {
        "search, click, read sentences": arguments.run / "graph.html",
        "the middle of the graph": arguments.run / "graph.png",
        "which chunks are read": picture,
    }.items():
        print(f"  {what:30} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
