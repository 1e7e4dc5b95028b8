"""The shape of a condition: what it compares and how, never what things are called."""

from __future__ import annotations

import re
from collections.abc import Collection

from graft.configuration.configuration_query_graph import COMPARISONS

_LITERAL = re.compile(r"'(?:[^']|'')*'")
_QUOTED_NAME = re.compile(r'"(?:[^"]|"")*"')
_CAST = re.compile(r"::[a-z]\w*(?: varying| precision| with(?:out)? time zone)?(?:\([\d,]+\))?(?:\[\])?", re.I)
_NUMBER = re.compile(r"(?<![\w#.])\d+(?:\.\d+)?(?!\w)")
_PATTERNS = {
    "equal": r"(?<![<>!~])=",
    "unequal": r"<>|!=",
    "range": r"<(?!>)|(?<!<)>",
    "like": r"~~\*?|\b(?:NOT )?I?LIKE\b|\b(?:contains|prefix|suffix|regexp_matches|starts_with)\(",
    "in_list": r"\bIN\b|\bANY\b",
    "null_test": r"\bIS (?:NOT )?NULL\b",
    "and": r"\bAND\b",
    "or": r"\bOR\b",
    "not": r"\bNOT\b|!~~",
    "call": r"\b[a-z_]\w*\(",
}
_COMPUTATION = re.compile(r"\b\w+\(|::|\|\||(?<=\s)[-+*/%](?=\s)")
_COMPILED = {name: re.compile(_PATTERNS[name]) for name in COMPARISONS}


def predicate_shape(text: str) -> list[int]:
    """How often each of COMPARISONS occurs in a condition, then its text literals and its numbers.

    Names do not count: quoted ones are replaced before anything is looked for, and others cannot be keywords.
    """
    text = _CAST.sub("", text)
    literals = len(_LITERAL.findall(text))
    bare = _QUOTED_NAME.sub("q", _LITERAL.sub("''", text))
    counts = [len(pattern.findall(bare)) for pattern in _COMPILED.values()]
    return [*counts, literals, len(_NUMBER.findall(bare))]


def count_computations(text: str) -> int:
    """Calls, casts and arithmetic in an expression."""
    return len(_COMPUTATION.findall(_QUOTED_NAME.sub("q", _LITERAL.sub("''", text))))


def quote_names(text: str, names: Collection[str]) -> str:
    """The condition with each of these names in quotes, unless it is a plain word in lower case.

    DuckDB writes names without quotes, so that a column called `a = b` would read as a comparison.
    """
    odd = sorted((name for name in names if not re.fullmatch(r"[a-z_][a-z_0-9]*", name)), key=len, reverse=True)
    if not odd:
        return text
    pattern = r'(?<![\w"])(?:' + "|".join(map(re.escape, odd)) + r')(?![\w"])'
    return re.sub(pattern, lambda found: '"' + found[0].replace('"', '""') + '"', text)


def names_in(text: str) -> set[str]:
    """Every word of a condition that may be a name of a column."""
    without = _LITERAL.sub("''", _CAST.sub("", text))
    quoted = {name[1:-1].replace('""', '"') for name in _QUOTED_NAME.findall(without)}
    return quoted | set(re.findall(r"[^\W\d]\w*", _QUOTED_NAME.sub(" ", without)))
