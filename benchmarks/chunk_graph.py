"""A graph of chunks: what its messages cost, as sums of chunks, as a list of edges, and as a matrix of tokens.

python benchmarks/chunk_graph.py --length 4096 --chunks 64

Each chunk reads itself and `--degree` earlier ones. "chunks" is what ChunkGraph does, "edges" the same pairs of tokens
as TokenEdges, "dense" a product with the (tokens, tokens) matrix. "prepared" has matrix or edges beforehand, as the
layers of one pass share them; "whole" begins with the graph. Prints milliseconds and how many times as fast as
"dense" a way is in the same round (median; quartiles in the JSON).
"""

import argparse
import statistics

import torch
from measuring import in_turn, keep, machine, ratio

from graft import ChunkGraph, TokenEdges
from graft.modeling.graph.external_edges import expand_chunks
from graft.modeling.graph.external_graph import PassShape

MOST_EDGES = 4 * 10**6  # a list of more takes gigabytes


def graph_of(arguments):
    """Chunks of equal length; each reads itself and some earlier ones, rows sum to 1."""
    rng = torch.Generator().manual_seed(0)
    chunk_ids = torch.arange(arguments.length) * arguments.chunks // arguments.length
    scores = torch.rand(arguments.batch, arguments.chunks, arguments.chunks, generator=rng)
    earlier = scores.tril(-1)
    least = earlier.topk(min(arguments.degree, arguments.chunks), -1).values[..., -1:]
    weights = earlier * (earlier >= least) + torch.diag_embed(scores.diagonal(dim1=1, dim2=2))
    return ChunkGraph(chunk_ids.expand(arguments.batch, -1), weights / weights.sum(-1, keepdim=True))


def listed(graph):
    """The same graph as a list, None if that is too long."""
    pairs = expand_chunks(graph)
    index = pairs.nonzero()
    return TokenEdges(index, pairs[tuple(index.T)], graph.batch) if index.shape[0] <= MOST_EDGES else None


def with_gradient(messages, nodes):
    """The same call followed by its backward pass, from a gradient as a later layer would send it."""
    gradient = torch.randn(nodes.shape, generator=torch.Generator().manual_seed(2))

    def both():
        nodes.grad = None
        messages().backward(gradient)

    return both


def calls_of(arguments, nodes):
    """What is timed, by what is done and from where it begins."""
    graph, shape = graph_of(arguments), PassShape(torch.arange(arguments.batch), None, 0, arguments.length)
    matrix, edges, chunks = expand_chunks(graph), listed(graph), graph.over(shape)
    calls = {
        "prepared": {"dense": lambda: matrix @ nodes, "chunks": lambda: chunks.messages(nodes)},
        "whole": {
            "dense": lambda: expand_chunks(graph) @ nodes,
            "chunks": lambda: graph.over(shape).messages(nodes),
        },
    }
    if edges is not None:
        sums = edges.over(shape)
        calls["prepared"]["edges"] = lambda: sums.messages(nodes)
        calls["whole"]["edges"] = lambda: edges.over(shape).messages(nodes)
    return calls


def check(calls):
    """Refuse to time what is wrong."""
    with torch.no_grad():
        for ways in calls.values():
            expected = ways["dense"]()
            for way in ways.values():
                torch.testing.assert_close(way(), expected, atol=1e-4, rtol=1e-4)


def measured(calls, nodes, rounds):
    """Rows of results, printed as they come."""
    rows = []
    for begins, ways in calls.items():
        for passes in ("forward", "forward + backward"):
            timed = ways if passes == "forward" else {name: with_gradient(way, nodes) for name, way in ways.items()}
            with torch.set_grad_enabled(passes != "forward"):
                times = in_turn(timed, rounds)
            for name, seconds in times.items():
                milliseconds, faster = round(1000 * statistics.median(seconds), 2), ratio(times["dense"], seconds)
                rows.append({"from": begins, "way": name, "passes": passes, "ms": milliseconds, "dense over": faster})
                print(f"{begins:9} {name:7} {passes:19} {milliseconds:9.2f} ms  {faster['median']:7.2f} x", flush=True)
    return rows


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (
        ("length", 4096),
        ("chunks", 64),
        ("degree", 4),
        ("batch", 1),
        ("rank", 155),
        ("rounds", 9),
        ("threads", 2),
    )
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    about = machine()
    rng = torch.Generator().manual_seed(1)
    nodes = torch.randn(arguments.batch, arguments.length, arguments.rank, generator=rng, requires_grad=True)
    calls = calls_of(arguments, nodes)
    check(calls)
    rows = measured(calls, nodes, arguments.rounds)
    print(keep(f"chunk_graph-{arguments.length}", vars(arguments), rows, about))


if __name__ == "__main__":
    main()
