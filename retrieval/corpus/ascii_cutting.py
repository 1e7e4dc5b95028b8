"""How a tokenizer cuts ASCII text into the words that its model then turns to ids, as regular expressions of Python.

Known are BERT's cleaning and splitting (Devlin et al. 2018, arXiv 1810.04805) before WordPiece, and the splits of
GPT-2, Llama 3 and Qwen 2 before byte-level BPE. What they ask of Unicode is easily said of ASCII; of other text it is
not, as their Unicode is not always Python's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

BERT = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 \t\n\r]")
GPT2 = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+")
ONE_DIGIT, DIGITS = re.compile(r"[0-9]|[^0-9]+"), re.compile(r"[0-9]+|[^0-9]+")

_LINES = (  # a split that keeps line ends apart; %s is a run of digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII = {r"\p{L}\p{N}": "A-Za-z0-9", r"[^\s": r"[^\t-\r ", r"\p{L}": "[A-Za-z]", r"\p{N}": "[0-9]"}
_ASCII |= {r"\s": r"[\t-\r ]", r"\S": r"[^\t-\r ]"}


def _in_ascii(pattern: str) -> re.Pattern[str]:
    for theirs, ours in _ASCII.items():
        pattern = pattern.replace(theirs, ours)
    return re.compile(pattern)


SPLITS = {_LINES % digits: _in_ascii(_LINES % digits) for digits in (r"\p{N}{1,3}", r"\p{N}")}
"""Of Llama 3 and of Qwen 2."""

# Places between two characters where no word of any text goes on, so that either side can be cut alone.
LINE_BEGINS = re.compile(r"(?=\n)")  # white space is dropped
WORD_ENDS_A_LINE = re.compile(r"(?<=[!-~])(?=\n)")  # no word of GPT-2 has white space behind other characters
LINE_BEGINS_WITH_WORD = re.compile(r"(?<=\n)(?=[!-~])")  # no word of `SPLITS` has a line end before other characters


@dataclass(frozen=True)
class AsciiCutting:
    """How ASCII text falls into words.

    Args:
        levels: the first cuts the text, the next what came out.
        seam: where any text may be cut in two, which changes no word.
        lowercase: before anything else.
        spelling: characters as the model spells them; others are themselves.
        control: whether control characters are words like others; if not, text with them has other rules.
    """

    levels: Sequence[re.Pattern[str]]
    seam: re.Pattern[str]
    lowercase: bool = False
    spelling: Mapping[int, str] = field(default_factory=dict)
    control: bool = True

    def words(self, text: str) -> Sequence[str]:
        """The words of an ASCII text in turn, not yet spelled for the model."""
        words: Sequence[str] = [text.lower() if self.lowercase else text]
        for level in self.levels:
            words = list(chain.from_iterable(map(level.findall, words)))
        return words


def ascii_cutting(backend: Tokenizer) -> AsciiCutting | None:
    """The cutting of a tokenizer, None if it is none of those known here or its added tokens disturb it."""
    added = list(backend.get_added_tokens_decoder().values())
    if not all(token.content.isascii() and token.content.split() == [token.content] for token in added):
        return None  # cleaning could turn other text into them, or they reach across a seam
    if isinstance(backend.model, models.WordPiece):
        return _bert_cutting(backend)
    strips = any(token.lstrip or token.rstrip for token in added)
    plain = backend.normalizer is None or (isinstance(backend.normalizer, normalizers.NFC) and not strips)
    if not plain or not isinstance(backend.model, models.BPE) or backend.model.dropout:
        return None
    return _byte_level_cutting(backend.pre_tokenizer)


def _bert_cutting(backend: Tokenizer) -> AsciiCutting | None:
    if not (
        isinstance(backend.normalizer, normalizers.BertNormalizer)
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and backend.token_to_id(backend.model.unk_token) is not None
    ):
        return None
    return AsciiCutting([BERT], LINE_BEGINS, backend.normalizer.lowercase, control=False)


def _byte_level_cutting(pre_tokenizer: Any) -> AsciiCutting | None:
    """Digits first, if at all, then one of the known splits, then bytes as characters."""
    if pre_tokenizer is None:
        return None
    state = json.loads(pre_tokenizer.__getstate__())
    *steps, last = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    levels, seam = [], WORD_ENDS_A_LINE
    if steps and steps[0]["type"] == "Digits":
        levels.append(ONE_DIGIT if steps.pop(0)["individual_digits"] else DIGITS)
    if last["use_regex"] and not steps:
        levels.append(GPT2)
    elif len(steps) == 1 and not last["use_regex"] and (split := SPLITS.get(_isolated(steps[0]))):
        levels.append(split)
        seam = LINE_BEGINS_WITH_WORD
    else:
        return None
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling = {code: as_characters.pre_tokenize_str(chr(code))[0][0] for code in range(128)}
    return AsciiCutting(levels, seam, spelling=spelling)


def _isolated(step: Mapping[str, Any]) -> str:
    """The regular expression of a split that keeps what it matches as words; empty for other steps."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return ""
    return str(step["pattern"].get("Regex", ""))
