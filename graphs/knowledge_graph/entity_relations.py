"""Which entities stand together: counts, normalised pointwise mutual information, and where it was seen.

Of a pair (x, y), with n sentences that name anything, p(x) = n_x / n and p(x, y) = n_xy / n:

    npmi = log(p(x, y) / (p(x) p(y))) / -log p(x, y)      in [-1, 1]; 1 if they only ever stand together

(Bouma, GSCL 2009). With a window of several sentences n_xy counts pairs of sentences, and npmi is cut to [-1, 1].
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Place = tuple[str, int]  # document, chunk


@dataclass(frozen=True)
class EntitySentence:
    """The entities that one sentence names."""

    document: str
    chunk: int
    number: int
    start: int
    end: int
    entities: frozenset[int]


@dataclass
class Relation:
    """A pair of entities, the smaller number first. `nearness` sums 1 / (1 + distance in sentences)."""

    source: int
    target: int
    weight: int = 0
    nearness: float = 0.0
    npmi: float = 0.0
    chunks: list[Place] = field(default_factory=list)
    example: tuple[str, int, int, int] = ("", 0, 0, 0)  # document, chunk, start, end of the first sentence


def co_occurrences(sentences: Sequence[EntitySentence], window: int = 1) -> list[Relation]:
    """Pairs of entities of one sentence, and of sentences less than `window` apart in one chunk, in sorted order.

    Raises:
        ValueError: `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"`window` must be at least 1, got {window}.")
    relations: dict[tuple[int, int], Relation] = {}
    by_chunk: dict[Place, list[EntitySentence]] = defaultdict(list)
    for sentence in sentences:
        by_chunk[sentence.document, sentence.chunk].append(sentence)
    for members in by_chunk.values():
        members.sort(key=lambda sentence: sentence.number)
        for position, first in enumerate(members):
            for second in members[position:]:
                if (distance := second.number - first.number) >= window:
                    break
                _count(relations, first, second, distance)
    _measure(relations.values(), sentences)
    return [relations[pair] for pair in sorted(relations)]


def _count(
    relations: dict[tuple[int, int], Relation], first: EntitySentence, second: EntitySentence, far: int
) -> None:
    pairs = {(min(x, y), max(x, y)) for x in first.entities for y in second.entities if x != y}
    for source, target in pairs:
        relation = relations.get((source, target))
        if relation is None:
            example = (first.document, first.chunk, first.start, second.end)
            relation = relations[source, target] = Relation(source, target, example=example)
        relation.weight += 1
        relation.nearness += 1 / (1 + far)
        if relation.chunks[-1:] != [(first.document, first.chunk)]:
            relation.chunks.append((first.document, first.chunk))


def _measure(relations: Iterable[Relation], sentences: Sequence[EntitySentence]) -> None:
    named = Counter(entity for sentence in sentences for entity in sentence.entities)
    total = sum(bool(sentence.entities) for sentence in sentences)
    for relation in relations:
        relation.npmi = npmi(relation.weight, named[relation.source], named[relation.target], total)


def npmi(together: int, first: int, second: int, total: int) -> float:
    """Normalised pointwise mutual information from counts of sentences."""
    if together >= total:
        return 1.0
    information = math.log(together * total / (first * second))
    return max(-1.0, min(1.0, information / -math.log(together / total)))
