"""Weights between the chunks of one document from the entities they share: what attention over chunks may read.

Row a reads on behalf of one finished chunk q. With causal=True q = a - 1 and everything the row knows (entities, how
rare they are, which ones stand together) comes from chunks before a, so no token of chunk a or later can move it: a
row that looked at its own chunk would tell that chunk's first token what its last one names. With causal=False q = a
and statistics are the whole document's; rows still weigh chunks up to a only.

    W[a, b] ~ sum over e in q, f in b of idf(e) w(e, f)       w(e, e) = 1,  w(e, f) = max(npmi(e, f), 0)
    idf(e) = log((1 + n) / (1 + n_e)) + 1                     n chunks known, n_e of them with e

for b < a, cut to the largest `neighbours` of the row (of equal ones the nearest), divided by their sum;
W[a, a] = own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graft.graphs.knowledge_graph.entity_extractors import Extractor
from graft.graphs.knowledge_graph.entity_names import EntityMerger
from graft.graphs.knowledge_graph.entity_relations import npmi
from graft.graphs.knowledge_graph.mentions import TextChunk, place

Sentences = Sequence[Sequence[int]]  # of one chunk: the entities of each sentence


def chunk_weights(
    chunks: Sequence[Sentences],
    neighbours: int = 4,
    own: float = 1.0,
    causal: bool = True,
    related: bool = True,
    first: int = 0,
) -> NDArray[np.float32]:
    """The matrix W (chunks, chunks) of the module's equation, lower triangular, float32.

    Args:
        chunks: the entities of each sentence of each chunk, numbered from 0, as `entities_of_chunks` gives them.
        neighbours: earlier chunks that a row may weigh.
        own: the diagonal.
        causal: nothing of chunk a or later moves row a.
        related: entities that stand together in sentences count too, not only shared ones.
        first: chunks before it are out of sight: statistics know them and nothing reads them; W is 0 there.

    Raises:
        ValueError: `neighbours` is below 1, `first` is negative, or `own` is negative or not finite.
    """
    if neighbours < 1:
        raise ValueError(f"`neighbours` must be at least 1, got {neighbours}.")
    if first < 0:
        raise ValueError(f"`first` must be at least 0, got {first}.")
    if not (np.isfinite(own) and own >= 0):
        raise ValueError(f"`own` must be finite and at least 0, got {own}.")
    count = len(chunks)
    width = 1 + max((entity for chunk in chunks for sentence in chunk for entity in sentence), default=-1)
    present = np.zeros((count, width))
    for row, chunk in enumerate(chunks):
        present[row, sorted({entity for sentence in chunk for entity in sentence})] = 1.0
    known = _Statistics(width)
    if not causal:
        for chunk in chunks:
            known.add(chunk)
    weights = np.zeros((count, count))
    for row in range(1, count):
        if causal:
            known.add(chunks[row - 1])
        if row <= first:
            continue
        asked = present[row - 1 if causal else row].nonzero()[0].tolist()
        scores = present[first:row] @ known.wanted(asked, related)
        weights[row, first:row] = _largest(scores, neighbours)
    np.fill_diagonal(weights[first:, first:], own)
    return weights.astype(np.float32)


class _Statistics:
    """Counts over the chunks added so far."""

    def __init__(self, width: int):
        self.chunks, self.sentences = 0, 0
        self.of_chunks = np.zeros(width)
        self.of_sentences: Counter[int] = Counter()
        self.together: dict[int, Counter[int]] = defaultdict(Counter)

    def add(self, chunk: Sentences) -> None:
        self.chunks += 1
        self.of_chunks[sorted({entity for sentence in chunk for entity in sentence})] += 1
        for sentence in map(set, chunk):
            self.sentences += bool(sentence)
            self.of_sentences.update(sentence)
            for entity in sentence:
                self.together[entity].update(sentence - {entity})

    def wanted(self, asked: Sequence[int], related: bool) -> NDArray[np.float64]:
        """What each entity of an earlier chunk is worth to one that names those `asked` for."""
        worth = np.zeros(len(self.of_chunks))
        for entity in asked:
            rarity = np.log((1 + self.chunks) / (1 + self.of_chunks[entity])) + 1
            worth[entity] += rarity
            for other, times in self.together[entity].items() if related else ():
                counts = self.of_sentences[entity], self.of_sentences[other]
                worth[other] += rarity * max(npmi(times, *counts, self.sentences), 0.0)
        return worth


def _largest(scores: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    # Rounded first: sums of the same terms in another order must not decide between chunks.
    order = np.lexsort((-np.arange(len(scores)), -scores.round(9)))[:neighbours]
    kept = np.zeros_like(scores)
    kept[order] = scores[order]
    total = kept.sum()
    return kept / total if total > 0 else kept


def entities_of_chunks(
    texts: Sequence[str], extractor: Extractor, merger: EntityMerger | None = None
) -> list[list[list[int]]]:
    """The entities of each sentence of each chunk of one document, for `chunk_weights`.

    Each chunk is read by itself and names merge backwards only, so no later chunk changes what an earlier one holds.
    """
    merger = merger or EntityMerger()
    found = []
    for index, text in enumerate(texts):
        sentences: dict[int, list[int]] = defaultdict(list)
        for mention in place(TextChunk("", index, text), extractor.extract(text)):
            entity = merger.entity(mention.surface, "")
            if entity not in sentences[mention.sentence]:
                sentences[mention.sentence].append(entity)
        found.append(list(sentences.values()))
    return found


def text_chunk_weights(
    texts: Sequence[str], extractor: Extractor, neighbours: int = 4, own: float = 1.0, causal: bool = True
) -> NDArray[np.float32]:
    """`chunk_weights` straight from the chunk texts of one document, in order."""
    return chunk_weights(entities_of_chunks(texts, extractor), neighbours, own, causal)


def graph_report(weights: NDArray[np.float32]) -> dict[str, float]:
    """How much of the weights acts: `coverage` = rows that weigh an earlier chunk, `density` of the triangle."""
    count = len(weights)
    below = np.tril(weights, -1) > 0
    return {
        "chunks": float(count),
        "coverage": float(below.any(1).sum() / max(count - 1, 1)),
        "density": float(below.sum() / max(count * (count - 1) / 2, 1)),
    }
