"""One entity under many names: normal form, and merging that looks back only and keeps a record.

A name seen for the first time joins an older entity or founds one, and never changes its mind. So which entity a
mention belongs to depends on what stands before it alone, as causal training needs.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_DETERMINERS = frozenset(
    ("a", "an", "the", "this", "that", "these", "those", "its", "their", "his", "her", "our", "my")
)
LEAST_RATIO = 90.0


def normal_form(surface: str) -> str:
    """NFKC, case-folded, one space between words, without leading determiner and possessive ending."""
    words = unicodedata.normalize("NFKC", surface).casefold().replace("’", "'").split()
    while len(words) > 1 and words[0] in _DETERMINERS:
        words = words[1:]
    text = " ".join(words)
    return text.removesuffix("'s").removesuffix("'").strip(" .,;:") or text


@dataclass(frozen=True)
class Merge:
    """`key` became part of the entity of `into`, by `rule`: alias, last name, acronym or similar."""

    key: str
    into: str
    rule: str


class EntityMerger:
    """Normal forms -> number of their entity, in order of appearance.

    Rules, the first that applies: the same key; the user's alias; within one document one capitalised word that ends
    exactly one name seen there, or capitals that are the initials of exactly one; rapidfuzz ratio of at least
    `least_ratio` with a founding key of equal first letter, where digits agree.

    Args:
        aliases: surface -> name to use.
        least_ratio: 0 to 100.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None, least_ratio: float = LEAST_RATIO):
        if not 0 <= least_ratio <= 100:
            raise ValueError(f"`least_ratio` must be within 0 and 100, got {least_ratio}.")
        from importlib import import_module

        try:
            self._fuzz = import_module("rapidfuzz.process"), import_module("rapidfuzz.fuzz")
        except ImportError as error:
            message = "Merging names needs rapidfuzz: pip install graft-transformers[knowledge-graph]"
            raise ImportError(message) from error
        self._aliases = {normal_form(old): normal_form(new) for old, new in (aliases or {}).items()}
        self._least_ratio = least_ratio
        self._of_key: dict[str, int] = {}
        self._blocks: dict[str, list[str]] = defaultdict(list)  # first letter -> founding keys
        self._local: dict[str, dict[str, set[int]]] = {}  # document -> short form -> entities
        self._surfaces: list[Counter[str]] = []
        self.keys: list[str] = []  # of each entity, the key that founded it
        self.merges: list[Merge] = []
        self._seen: set[Merge] = set()

    def entity(self, surface: str, document: str) -> int:
        """Number of the entity of `surface`; founds it if no older one fits."""
        key = normal_form(surface)
        number = self._within_document(surface, key, document)
        if number is None:
            number = self._anywhere(key)
        self._remember_short_forms(surface, key, document, number)
        self._surfaces[number][" ".join(surface.split())] += 1
        return number

    def name(self, number: int) -> str:
        """The entity's most frequent surface, of equally frequent ones the first in order of code points."""
        return min(self._surfaces[number].items(), key=lambda item: (-item[1], item[0]))[0]

    def surfaces(self, number: int) -> dict[str, int]:
        """All surfaces of an entity and how often each was seen, sorted."""
        return dict(sorted(self._surfaces[number].items()))

    def _within_document(self, surface: str, key: str, document: str) -> int | None:
        if key in self._of_key or " " in key or not surface[:1].isupper() or key in self._aliases:
            return None
        candidates = self._local.get(document, {})
        for rule, form in (("acronym", _acronym(surface)), ("last name", key)):
            owners = candidates.get(f"{rule}:{form}", set())
            if form and len(owners) == 1:
                (number,) = owners
                self._record(key, number, rule)
                return number
        return None

    def _remember_short_forms(self, surface: str, key: str, document: str, number: int) -> None:
        words = surface.split()
        if len(words) < 2 or not all(word[:1].isupper() for word in words):
            return
        forms = self._local.setdefault(document, {})
        forms.setdefault(f"last name:{key.split()[-1]}", set()).add(number)
        forms.setdefault(f"acronym:{''.join(word[0] for word in words)}", set()).add(number)

    def _anywhere(self, key: str) -> int:
        if key in self._of_key:
            return self._of_key[key]
        if key in self._aliases:
            number = self._found(self._aliases[key])
            self._record(key, number, "alias")
        elif (similar := self._similar(key)) is not None:
            number = self._of_key[similar]
            self._record(key, number, "similar")
        else:
            number = self._found(key)
        self._of_key[key] = number
        return number

    def _found(self, key: str) -> int:
        if key not in self._of_key:
            self._of_key[key] = len(self.keys)
            self.keys.append(key)
            self._surfaces.append(Counter())
            self._blocks[key[:1]].append(key)
        return self._of_key[key]

    def _similar(self, key: str) -> str | None:
        if len(key) < 5:  # one letter of four is another word
            return None
        process, fuzz = self._fuzz
        digits = [letter for letter in key if letter.isdigit()]
        found = process.extract(
            key, self._blocks[key[:1]], scorer=fuzz.ratio, processor=None, score_cutoff=self._least_ratio, limit=5
        )
        return next((other for other, *_ in found if [letter for letter in other if letter.isdigit()] == digits), None)

    def _record(self, key: str, number: int, rule: str) -> None:
        merge = Merge(key, self.keys[number], rule)
        if merge not in self._seen:
            self._seen.add(merge)
            self.merges.append(merge)


def _acronym(surface: str) -> str:
    """The capitals of a word that is nothing but two or more capitals, else nothing."""
    return surface if len(surface) > 1 and surface.isalpha() and surface.isupper() else ""
