"""Words to ids, each asked of the tokenizer once: its model cuts a word the same way wherever it stands.

Nearly all the time of a tokenizer goes into cleaning and splitting text, and into the same words again and again.
ASCII text is therefore cut here, as `ascii_cutting` knows how, and words are looked up; other lines are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from tokenizers import Tokenizer

from .ascii_cutting import AsciiCutting, ascii_cutting

MOST_WORDS, LONGEST_WORD = 2**20, 64


def word_memo(backend: Tokenizer, add_special_tokens: bool) -> WordMemo | None:
    """A memo for a tokenizer whose cutting is known; None for others.

    Args:
        backend: neither cuts nor fills up.
        add_special_tokens: put around each text what the tokenizer puts there.
    """
    cutting = ascii_cutting(backend)
    if cutting is None:
        return None
    memo = WordMemo(backend, cutting, add_special_tokens)
    sample = "a b"
    expected = backend.encode(sample, add_special_tokens=add_special_tokens).ids
    return memo if memo.encode_batch([sample])[0].tolist() == expected else None


class WordMemo(dict[str, bytes]):
    """Words of ASCII text to their ids; what is not there yet is asked of the tokenizer's model.

    Ids are uint32 as bytes, which join faster than numbers.

    Args:
        backend, add_special_tokens: as `word_memo` takes them.
        cutting: the backend's.
    """

    def __init__(self, backend: Tokenizer, cutting: AsciiCutting, add_special_tokens: bool) -> None:
        super().__init__()
        self._backend, self._model, self._cutting = backend, backend.model, cutting
        self._added = [token.content.lower() for token in backend.get_added_tokens_decoder().values()]
        self._beginnings = {content[:2] for content in self._added}  # few, where added tokens are hundreds
        word = backend.encode("a", add_special_tokens=False).ids
        text = backend.encode("a", add_special_tokens=add_special_tokens).ids
        at = next((at for at in range(len(text)) if text[at : at + len(word)] == word), 0)
        self._before, self._behind = np.asarray(text[:at]), np.asarray(text[at + len(word) :])

    def __missing__(self, word: str) -> bytes:
        if not self._cutting.control and not word.isprintable():
            raise KeyError(word)  # BERT drops control characters inside words; such text is rare
        tokens = self._model.tokenize(word.translate(self._cutting.spelling))
        ids = np.asarray([token.id for token in tokens], dtype=np.uint32).tobytes()
        if len(self) >= MOST_WORDS:
            self.clear()
        if len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokenizer's ids of whole texts, int64 (length,) each."""
        parts = [self._parts(text) for text in texts]
        left = [part for text in parts for part in text if isinstance(part, str)]
        asked = iter(self._backend.encode_batch_fast(left, add_special_tokens=False))
        ids = [[next(asked).ids if isinstance(part, str) else part for part in text] for text in parts]
        return [np.concatenate([self._before, *text, self._behind]).astype(np.int64, copy=False) for text in ids]

    def _parts(self, text: str) -> list[np.ndarray | str]:
        """Ids of what can be looked up, in turn with what is left to the tokenizer: all of a text with added tokens,
        lines that are not ASCII."""
        if self._may_hold_added(text):
            return [text]
        if (ids := self._looked_up(text)) is not None:
            return [ids]
        runs = ["".join(lines) for _, lines in groupby(self._cutting.seam.split(text), key=str.isascii)]
        return [run if (ids := self._looked_up(run)) is None else ids for run in runs]

    def _may_hold_added(self, text: str) -> bool:
        lower = text.lower()
        return any(beginning in lower for beginning in self._beginnings) and any(
            content in lower for content in self._added
        )

    def _looked_up(self, text: str) -> np.ndarray | None:
        if not text.isascii():
            return None
        try:
            return np.frombuffer(b"".join(map(self.__getitem__, self._cutting.words(text))), dtype=np.uint32)
        except KeyError:
            return None
