"""Known phrases found in a text word by word, whatever their case; the longest phrase wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_WORD = re.compile(r"\w+(?:['’\-_.]\w+)*")
_END = ""


def words_of(text: str) -> list[tuple[int, int, str]]:
    """(start, end, case-folded word) of each word; inner apostrophes, hyphens and dots belong to it."""
    return [(match.start(), match.end(), match.group().casefold()) for match in _WORD.finditer(text)]


class PhraseTrie:
    """Phrases as paths of words.

    Args:
        phrases: any text; a phrase without a word is left out.
    """

    def __init__(self, phrases: Iterable[str]):
        self._root: dict[str, Any] = {}
        for phrase in phrases:
            words = [word for *_, word in words_of(phrase)]
            node = self._root
            for word in words:
                node = node.setdefault(word, {})
            if words:
                node[_END] = {}

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans of the phrases in `text`, from the left, without overlap; only white space may part their words."""
        words = words_of(text)
        position = 0
        while position < len(words):
            last = self._longest(text, words, position)
            if last >= position:
                yield words[position][0], words[last][1]
            position = max(last, position) + 1

    def _longest(self, text: str, words: list[tuple[int, int, str]], first: int) -> int:
        """Index of the last word of the longest phrase that begins with word `first`; -1 if there is none."""
        node, found = self._root, -1
        for index in range(first, len(words)):
            parted = index > first and text[words[index - 1][1] : words[index][0]].strip()
            if parted or words[index][2] not in node:
                break
            node = node[words[index][2]]
            if _END in node:
                found = index
        return found
