"""What finds the things that a text names, chosen by name; each looks at one chunk at a time and knows no other.

`keyphrase` (the default) is YAKE (Campos et al., Information Sciences 509, 2020) with capitalised spans; it is offline
and needs no weights. `gazetteer:FILE` finds what the user lists. `spacy:MODEL` and `gliner:MODEL` use models that the
user has installed.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

from graft.graphs.knowledge_graph.mentions import Mention, longest_first, sentence_spans
from graft.graphs.knowledge_graph.phrase_trie import PhraseTrie
from graft.text_files import read_utf8

EXTRACTORS = "keyphrase, keyphrase:LANGUAGE, capitalised, gazetteer:FILE, spacy:MODEL, gliner:MODEL"

_CAPITAL = "[" + "".join(letter for letter in map(chr, range(0x530)) if letter.isupper()) + "]"
_CAPITALISED = re.compile(rf"(?<![\w.]){_CAPITAL}\w*(?:[ \t]+(?:(?:of|de|von|van) )?{_CAPITAL}\w*)*")
# Words that are capitalised because a sentence begins with them.
_OPENING = """
a an the this that these those there here it its he she they we you i in on at by for from if is are as
and but or not no so to of with when where while what which who how why all any each some such then
than do does can may must should will would be been being was were have has had return returns note see
also example use used using
"""
_OPENERS = frozenset(_OPENING.split())
# What programs write for a value; text about programs has more of them than of anything it names.
_VALUES = frozenset(["true", "false", "none", "null", "nan"])


class Extractor(Protocol):
    """Finds mentions in one text; the same text gives the same mentions."""

    def extract(self, text: str) -> list[Mention]: ...


def extractor_by_name(name: str, labels: tuple[str, ...] = ()) -> Extractor:
    """Make the extractor called `name`, one of `EXTRACTORS`; `labels` are what GLiNER shall find.

    Raises:
        ValueError: there is no such extractor, or its argument is missing.
        ImportError: the library behind it is absent; says how to install it.
        OSError: the file or model is absent.
    """
    kind, _, argument = name.partition(":")
    if kind == "keyphrase":
        return KeyphraseExtractor(argument or "en")
    if kind == "capitalised" and not argument:
        return CapitalisedExtractor()
    if kind in ("gazetteer", "spacy", "gliner") and argument:
        if kind == "gliner":
            return GlinerExtractor(argument, labels)
        return GazetteerExtractor(argument) if kind == "gazetteer" else SpacyExtractor(argument)
    raise ValueError(f"`extractor` must be one of {EXTRACTORS}, got {name!r}.")


class CapitalisedExtractor:
    """Runs of capitalised words, for scripts that have capitals.

    One capitalised word that opens a sentence counts only if it has a second capital or the chunk has it elsewhere
    within a sentence. True, None and their like never count.

    Args:
        common: words that are no name where they stand alone, unless all their letters are capitals.
    """

    def __init__(self, common: Set[str] = frozenset()):
        self._common = common

    def extract(self, text: str) -> list[Mention]:
        starts = {start + len(text[start:end]) - len(text[start:end].lstrip()) for start, end in sentence_spans(text)}
        found = [self._without_opener(text, *match.span()) for match in _CAPITALISED.finditer(text)]
        inside = {text[start:end] for start, end in found if start not in starts}
        return [
            Mention(start, end, text[start:end], "name")
            for start, end in found
            if end - start > 1 and self._is_name(text[start:end], start in starts, inside)
        ]

    @staticmethod
    def _without_opener(text: str, start: int, end: int) -> tuple[int, int]:
        while start < end:
            first = text[start:end].split(None, 1)
            if first[0].casefold() not in _OPENERS:
                break
            start = end if len(first) == 1 else end - len(first[1])
        return start, end

    def _is_name(self, surface: str, opens: bool, inside: set[str]) -> bool:
        word = surface.casefold()
        if word in _VALUES or (word in self._common and not surface.isupper()):
            return False
        return not opens or surface in inside or " " in surface or sum(map(str.isupper, surface)) > 1


class KeyphraseExtractor:
    """YAKE phrases of the chunk wherever they stand in it, with its capitalised spans; the longest match wins.

    Args:
        language: two letters, one of those for which YAKE has stop words.
        per_thousand: phrases asked of YAKE for each thousand characters.

    Raises:
        ValueError: YAKE has no stop words for `language`; names those it has.
    """

    def __init__(self, language: str = "en", per_thousand: float = 6.0):
        try:
            import yake
        except ImportError as error:
            message = "`extractor` keyphrase needs YAKE: pip install graft-transformers[knowledge-graph]"
            raise ImportError(message) from error
        languages = _languages_of(yake)
        if language not in languages:
            raise ValueError(
                f"`extractor` keyphrase:{language} is a language for which YAKE has no stop words; it has "
                f"{', '.join(languages)}."
            )
        self._make: Any = yake.KeywordExtractor
        self._language, self._per_thousand = language, per_thousand
        self._names = CapitalisedExtractor(frozenset(yake.KeywordExtractor(lan=language).stopword_set))

    def extract(self, text: str) -> list[Mention]:
        if not text.strip():
            return []
        wanted = max(3, round(len(text) / 1000 * self._per_thousand))
        # Its own removal of similar phrases compares all pairs; ours, in `EntityMerger`, keeps a record.
        yake = self._make(lan=self._language, n=3, dedup_lim=1.0, top=wanted)
        phrases = [
            phrase for phrase, _ in yake.extract_keywords(text) if len(phrase) > 2 and phrase.casefold() not in _VALUES
        ]
        spans = PhraseTrie(phrases).spans(text)
        found = [Mention(start, end, text[start:end], "keyphrase") for start, end in spans]
        return longest_first([*found, *self._names.extract(text)])


def _languages_of(yake: Any) -> list[str]:
    """The languages whose stop words come with YAKE, by the names of its files."""
    lists = Path(yake.__file__).parent / "core" / "StopwordsList"
    return sorted(path.stem.removeprefix("stopwords_") for path in lists.glob("stopwords_??.txt"))


class GazetteerExtractor:
    """The entities of a file in UTF-8, one a line, `name` or `name<tab>label`; lines that begin with # are skipped."""

    def __init__(self, path: str | Path):
        lines = read_utf8(path).splitlines()
        pairs = [line.split("\t", 1) for line in lines if line.strip() and not line.startswith("#")]
        by_label: dict[str, list[str]] = {}
        for name, *label in pairs:
            by_label.setdefault(label[0].strip() if label else "entity", []).append(name)
        if not by_label:
            raise ValueError(f"`extractor` gazetteer:{path} lists no entity.")
        self._tries = {label: PhraseTrie(names) for label, names in by_label.items()}

    def extract(self, text: str) -> list[Mention]:
        return longest_first(
            Mention(start, end, text[start:end], label)
            for label, trie in self._tries.items()
            for start, end in trie.spans(text)
        )


class SpacyExtractor:
    """Named entities and noun chunks of an installed spaCy model."""

    def __init__(self, model: str):
        try:
            import spacy
        except ImportError as error:
            raise ImportError(f"`extractor` spacy:{model} needs spaCy: pip install spacy") from error
        try:
            self._parse: Any = spacy.load(model)
        except OSError as error:
            message = f"spaCy has no model {model!r} here; its makers' way: python -m spacy download {model}"
            raise OSError(message) from error

    def extract(self, text: str) -> list[Mention]:
        parsed = self._parse(text)
        entities = [Mention(e.start_char, e.end_char, e.text, e.label_) for e in parsed.ents]
        chunks = parsed.noun_chunks if parsed.has_annotation("DEP") else ()
        phrases = [Mention(c.start_char, c.end_char, c.text, "noun phrase") for c in chunks if len(c) > 1]
        return longest_first([*entities, *phrases])


class GlinerExtractor:
    """Spans of the labels the user names, by GLiNER (Zaratiana et al., arXiv:2311.08526) from a folder or the Hub."""

    def __init__(self, model: str, labels: tuple[str, ...]):
        if not labels:
            raise ValueError(f"`labels` must name what gliner:{model} shall find, got none.")
        try:
            from gliner import GLiNER
        except ImportError as error:
            raise ImportError(f"`extractor` gliner:{model} needs GLiNER: pip install gliner") from error
        self._model: Any = GLiNER.from_pretrained(model)
        self._labels = list(labels)

    def extract(self, text: str) -> list[Mention]:
        found = self._model.predict_entities(text, self._labels) if text.strip() else []
        return longest_first(
            Mention(e["start"], e["end"], text[e["start"] : e["end"]], str(e["label"])) for e in found
        )
