"""What a text names and where: chunks, spans in them, and the sentence each span stands in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextChunk:
    """A piece of a document; `start` is its first character in the document."""

    document: str
    index: int
    text: str
    start: int = 0


@dataclass(frozen=True)
class Mention:
    """Something named in a text: `text[start:end] == surface`."""

    start: int
    end: int
    surface: str
    label: str


@dataclass(frozen=True)
class PlacedMention:
    """A mention in its chunk, with the number and the span of its sentence there."""

    document: str
    chunk: int
    start: int
    end: int
    surface: str
    label: str
    sentence: int
    sentence_start: int
    sentence_end: int


def longest_first(mentions: Iterable[Mention]) -> list[Mention]:
    """Mentions that do not overlap, in order of the text: of two that do, the longer stays, then the earlier one."""
    taken: list[Mention] = []
    occupied: set[int] = set()
    for mention in sorted(mentions, key=lambda m: (m.start - m.end, m.start, m.label)):
        places = range(mention.start, mention.end)
        if occupied.isdisjoint(places):
            occupied.update(places)
            taken.append(mention)
    return sorted(taken, key=lambda m: m.start)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences, by nupunkt; they tile the text. An empty line ends a sentence too."""
    from nupunkt import sent_spans

    return [(start, end) for start, end in sent_spans(text) if end > start]


def place(chunk: TextChunk, mentions: Iterable[Mention]) -> list[PlacedMention]:
    """Give each mention the sentence that its first character stands in."""
    spans = sentence_spans(chunk.text) or [(0, len(chunk.text))]
    starts = [start for start, _ in spans]
    placed = []
    for mention in mentions:
        number = max(bisect_right(starts, mention.start) - 1, 0)
        start, end = spans[number]
        placed.append(
            PlacedMention(
                *(chunk.document, chunk.index, mention.start, mention.end, mention.surface, mention.label),
                *(number, start, max(end, mention.end)),
            )
        )
    return placed
