"""Graphs over the tokens of a small batch, drawn from a seed: what tests give a model with its input."""

import torch

from graft import ChunkGraph, TokenEdges

LENGTH = 13


def chunks(batch=2, length=LENGTH, count=4, seed=0):
    """Chunks in order, tokens of no chunk before them; some weights are above 1, as those of big chunks are."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, count, (batch, length), generator=rng).sort(1).values
    return ChunkGraph(ids, 4 * torch.rand(batch, count, count, generator=rng, dtype=torch.float64).tril())


def edges(batch=2, length=LENGTH, seed=0):
    """Sixty edges, some of them several times."""
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, length, (60, 2), generator=rng).sort(1, descending=True).values
    index = torch.cat([torch.randint(0, batch, (60, 1), generator=rng), pairs], 1)
    return TokenEdges(index, torch.rand(60, generator=rng, dtype=torch.float64), batch)


GRAPHS = {"chunks": chunks, "edges": edges}
