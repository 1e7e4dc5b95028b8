"""Which verb stands between two entities of an English sentence: "Boole wrote to Ada Lovelace" gives `write to`.

A rule on words, not a parser: between two mentions with none in between stands a verb in front of nothing but a
preposition and determiners (the V and V P of ReVerb: Fader et al., EMNLP 2011). What is not so plain, or is negated,
is left out. Verbs are those of a short list, and words that the texts themselves inflect as verbs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graft.graphs.knowledge_graph.entity_relations import Place
from graft.graphs.knowledge_graph.mentions import PlacedMention, TextChunk

MOST_WORDS = 8  # between two mentions

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_PLAIN = re.compile(r"\s*,?[\w\s'’`*\"“”-]*")  # a comma may open a relative clause; other marks end one


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_AUXILIARIES = {
    **dict.fromkeys(_words("is are was were be been being am"), "be"),
    **dict.fromkeys(_words("has have had having"), "have"),
    **dict.fromkeys(_words("can could may might must shall should will would do does did"), "modal"),
}
_MAIN = _words("is are was were has have had")  # auxiliaries that may be the verb themselves
_NEGATIONS = _words("not never no nor neither cannot without hardly")
_ADVERBS = _words("also often always usually then still just already only thus even again both now later")
_RELATIVES = _words("who which that")
_PREPOSITIONS = _words(
    "about after against among as at before behind between by for from in into like of on onto over per through to "
    "toward towards under upon via with within"
)
_DETERMINERS = _words(
    "a an the this that these those its their his her our your my each all every any some one two several other "
    "another many more both"
)
_REGULAR = _words(
    "accept add allow answer apply ask attach avoid base call cause change check cite collect combine compare compile "
    "compute connect consist contain control convert copy cover create decide declare define delete depend derive "
    "describe design determine develop differ discover discuss display download employ enable encode ensure estimate "
    "evaluate execute exist expect explain extend extract fail follow force form format generate handle happen help "
    "implement imply import improve include increase indicate inherit inspect install invent invoke join lack launch "
    "like link list live load love maintain manage map marry match measure mention merge modify move name need occur "
    "offer open operate optimise optimize override own parse pass perform permit point prevent print process produce "
    "propose protect prove provide publish push quote raise reach receive reduce refer refuse reject relate release "
    "remain remove rename render replace report represent require resemble resolve respect return save search select "
    "serialise serialize serve share show sort specify start stop store subclass succeed suggest support surround "
    "take tell test train transform translate treat turn update use validate visit want watch wrap yield"
)
_IRREGULAR = (
    "become became become|begin began begun|break broke broken|bring brought brought|build built built|buy bought "
    "bought|catch caught caught|choose chose chosen|come came come|cost cost cost|cut cut cut|do did done|draw drew "
    "drawn|drive drove driven|fall fell fallen|feed fed fed|feel felt felt|fight fought fought|find found found|fly "
    "flew flown|forget forgot forgotten|get got got|give gave given|go went gone|grow grew grown|hear heard "
    "heard|hide hid hidden|hold held held|keep kept kept|know knew known|lead led led|learn learnt learnt|leave left "
    "left|let let let|lose lost lost|make made made|mean meant meant|meet met met|overwrite overwrote overwritten|pay "
    "paid paid|put put put|read read read|run ran run|say said said|see saw seen|sell sold sold|send sent sent|set "
    "set set|show showed shown|speak spoke spoken|spend spent spent|split split split|stand stood stood|take took "
    "taken|teach taught taught|tell told told|think thought thought|throw threw thrown|understand understood "
    "understood|win won won|write wrote written"
)
_PARADIGMS = [paradigm.split() for paradigm in _IRREGULAR.split("|")]
_PASTS = {form: base for base, *forms in _PARADIGMS for form in forms if form != base}
_PARTICIPLES = frozenset(last for base, past, last in _PARADIGMS if last not in (base, past))
_SAME = frozenset(base for base, *pasts in _PARADIGMS if base in pasts)  # "set": a base form that may be a past
_SEEDS = frozenset([*_REGULAR, *(base for base, *_ in _PARADIGMS)])


@dataclass(frozen=True)
class VerbLink:
    """Two mentions, by their numbers, joined by a verb: who acts, on what, and the verb's span in the chunk.

    `relation` is the verb's base form, with the preposition behind it if there is one. "was written by" turns around.
    """

    source: int
    target: int
    relation: str
    start: int
    end: int


@dataclass
class VerbRelation:
    """One entity does to another what `relation` says, in `weight` places, the first of which is kept as example."""

    source: int
    target: int
    relation: str
    example: tuple[str, int, int, int]  # document, chunk, start and end of the sentence
    verb: tuple[int, int]  # its start and end in that chunk
    weight: int = 0
    chunks: list[Place] = field(default_factory=list)


def verb_relations(
    links: Iterable[VerbLink], mentions: Sequence[PlacedMention], entities: Sequence[int]
) -> list[VerbRelation]:
    """Links between mentions as relations between their `entities`, sorted; none of an entity with itself."""
    found: dict[tuple[int, int, str], VerbRelation] = {}
    for link in links:
        source, target, mention = entities[link.source], entities[link.target], mentions[link.source]
        if source == target:
            continue
        example = (mention.document, mention.chunk, mention.sentence_start, mention.sentence_end)
        new = VerbRelation(source, target, link.relation, example, (link.start, link.end))
        relation = found.setdefault((source, target, link.relation), new)
        relation.weight += 1
        if relation.chunks[-1:] != [(mention.document, mention.chunk)]:
            relation.chunks.append((mention.document, mention.chunk))
    return [found[key] for key in sorted(found)]


class VerbLexicon:
    """Base forms of verbs: a short list, and words of which the texts hold three of `-`, `-s`, `-ed`, `-ing`."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._seen = {word.casefold() for text in texts for word in _WORD.findall(text)}
        self._verdicts: dict[str, bool] = {}

    def base(self, word: str) -> tuple[str, str] | None:
        """The base form of a lower-case word and which form it is, or None for no verb.

        Forms are "base", "s", "past" (which may be a participle), "participle" and "ing".
        """
        if word in _PASTS:
            return _PASTS[word], "participle" if word in _PARTICIPLES else "past"
        for form, candidates in _without_ending(word):
            for candidate in candidates:
                if self._is_verb(candidate):
                    return candidate, form
        return None

    def _is_verb(self, base: str) -> bool:
        if base not in self._verdicts:
            self._verdicts[base] = base in _SEEDS or self._is_inflected(base)
        return self._verdicts[base]

    def _is_inflected(self, base: str) -> bool:
        """With -ed or -ing among the three: a noun has a plural too."""
        if len(base) < 3:
            return False
        stem = base.removesuffix("e")
        soft = base[:-1] + "i" if base.endswith("y") else stem
        doubled = base + base[-1]
        plural = f"{soft}es" if base.endswith("y") else f"{base}es" if base.endswith(_SIBILANTS) else f"{base}s"
        held = (
            base in self._seen,
            plural in self._seen,
            f"{soft}ed" in self._seen or f"{doubled}ed" in self._seen,
            f"{stem}ing" in self._seen or f"{doubled}ing" in self._seen,
        )
        return sum(held) >= 3


_SIBILANTS = ("s", "x", "z", "ch", "sh", "o")


def _without_ending(word: str) -> Iterable[tuple[str, list[str]]]:
    """Forms that a word may be, each with the base forms it may have."""
    if word.endswith("ing") and len(word) > 4:
        stem = word[:-3]
        yield "ing", [stem, f"{stem}e", *_undoubled(stem)]
    elif word.endswith("ied"):
        yield "past", [f"{word[:-3]}y"]
    elif word.endswith("ed"):
        stem = word[:-2]
        yield "past", [stem, f"{stem}e", *_undoubled(stem)]
    elif word.endswith("ies"):
        yield "s", [f"{word[:-3]}y"]
    elif word.endswith("s") and not word.endswith("ss"):
        yield "s", [word[:-1], *([word[:-2]] if word[:-2].endswith(_SIBILANTS) else [])]
    yield "base", [word]


def _undoubled(stem: str) -> list[str]:
    return [stem[:-1]] if len(stem) > 2 and stem[-1] == stem[-2] else []


def verb_links(mentions: Sequence[PlacedMention], chunks: Iterable[TextChunk]) -> list[VerbLink]:
    """The verbs between neighbouring mentions of one sentence, in the order of the mentions.

    Args:
        mentions: of the chunks, those of a chunk in the order of its text.
        chunks: where they stand.
    """
    texts = {(chunk.document, chunk.index): chunk.text for chunk in chunks}
    lexicon = VerbLexicon(texts.values())
    return list(_links(mentions, texts, lexicon))


def _links(
    mentions: Sequence[PlacedMention], texts: Mapping[tuple[str, int], str], lexicon: VerbLexicon
) -> Iterable[VerbLink]:
    for number, (first, second) in enumerate(zip(mentions, mentions[1:], strict=False)):
        sides = [(mention.document, mention.chunk, mention.sentence) for mention in (first, second)]
        if sides[0] != sides[1] or first.end > second.start:
            continue
        text = texts[first.document, first.chunk]
        found = between_entities(text[first.end : second.start], lexicon, first.surface)
        if found is not None:
            relation, turned, (start, end) = found
            if not turned and not _is_subject(text, first, second.start):
                continue
            ends = (number + 1, number) if turned else (number, number + 1)
            yield VerbLink(*ends, relation, first.end + start, first.end + end)


def _is_subject(text: str, mention: PlacedMention, stop: int) -> bool:
    """Whether no preposition takes the mention from the verb: "a map of Europe shows", but "Europe, which has"."""
    if _WORD.findall(text[mention.end : stop].casefold())[0] in _RELATIVES:
        return True
    before = _WORD.findall(text[mention.sentence_start : mention.start].casefold())
    while before and before[-1] in _DETERMINERS:
        before.pop()
    return not before or before[-1] not in _PREPOSITIONS


def between_entities(text: str, lexicon: VerbLexicon, subject: str = "") -> tuple[str, bool, tuple[int, int]] | None:
    """What the words between two entities say of them, or None where they do not say it plainly.

    Args:
        text: from the end of one to the beginning of the other.
        lexicon: what the verbs are.
        subject: the first one; a plural may have a verb's base form behind it.

    Returns:
        The relation; whether the second one is who acts; the verb's span in `text`.
    """
    if not _PLAIN.fullmatch(text):
        return None
    spans = [(match.group().casefold(), *match.span()) for match in _WORD.finditer(text)]
    words = [word for word, *_ in spans]
    if not words or len(words) > MOST_WORDS or _NEGATIONS & {*words} or any("n't" in w or "n’t" in w for w in words):
        return None
    at = int(words[0] in _RELATIVES)
    if "," in text and not at:
        return None
    helpers = []
    while at < len(words) and (words[at] in _AUXILIARIES or _is_adverb(words[at])):
        helpers.append(_AUXILIARIES.get(words[at], "adverb"))
        at += 1
    if helpers[-1:] in (["be"], ["have"]) and words[at:] and words[at] in _DETERMINERS:
        says_so = words[at - 1] in _MAIN or "modal" in helpers
        return (helpers[-1], False, spans[at - 1][1:]) if says_so and _only(_DETERMINERS, words[at:]) else None
    verb = lexicon.base(words[at]) if at < len(words) else None
    rest = words[at + 1 :]
    while rest and _is_adverb(rest[0]):
        rest = rest[1:]
    preposition = rest[0] if rest and rest[0] in _PREPOSITIONS else ""
    objects = rest[bool(preposition) :]
    if verb is None or "that" in rest[:1] or not _only(_DETERMINERS, objects):
        return None
    base, form = verb
    if not _agrees(base, form, {*helpers}, preposition):
        return None
    if (base, preposition, objects) == ("use", "to", []):  # "used to sort"
        return None
    if not helpers and form in ("s", "base") and _may_be_noun(base, form, subject, preposition, objects):
        return None
    turned = preposition == "by" and form in ("past", "participle")
    return base if turned or not preposition else f"{base} {preposition}", turned, spans[at][1:]


def _agrees(base: str, form: str, helpers: set[str], preposition: str) -> bool:
    """Whether this form of a verb may stand behind these auxiliaries."""
    if form == "past":
        return "modal" not in helpers or bool(helpers & {"be", "have"})
    if form == "participle":  # "a cycle given a point" says nothing of the cycle, "given by" does
        return bool(helpers & {"be", "have"} or preposition)
    if form == "ing":
        return "be" in helpers
    if form == "s":
        return not helpers & {"be", "have", "modal"}
    return "modal" in helpers or not helpers or (base in _SAME and bool(helpers & {"be", "have"}))


def _may_be_noun(base: str, form: str, subject: str, preposition: str, objects: Sequence[str]) -> bool:
    """Whether a word may be a plural noun or a noun, as in "node sets of", "weights on"."""
    if preposition == "of" or (form == "base" and not subject.endswith("s")):
        return True
    is_plain = base in _SEEDS and form == "s"
    return not is_plain and (bool(preposition) or not objects)


def _is_adverb(word: str) -> bool:
    return word in _ADVERBS or (word.endswith("ly") and len(word) > 4)


def _only(allowed: frozenset[str], words: Sequence[str]) -> bool:
    return all(word in allowed for word in words)
