"""Words to ids, each asked of the tokenizer once: WordPiece cuts a word the same way wherever it stands.

Nearly all the time of such a tokenizer goes into cleaning and splitting text, and into the same words again and again.
Where text is ASCII, BERT's cleaning and splitting (Devlin et al. 2018, arXiv 1810.04805) are one regular expression:
runs of letters and digits, each mark of punctuation alone, white space dropped. Other lines are the tokenizer's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, groupby

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORD_OR_MARK = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 \t\n\r]")
MOST_WORDS = 2**20


def word_memo(backend: Tokenizer, add_special_tokens: bool) -> WordMemo | None:
    """A memo for WordPiece behind BERT's own cleaning and splitting; None for other tokenizers.

    Args:
        backend: neither cuts nor fills up.
        add_special_tokens: put around each text what the tokenizer puts there.
    """
    if not (
        isinstance(backend.model, models.WordPiece)
        and isinstance(backend.normalizer, normalizers.BertNormalizer)
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and backend.token_to_id(backend.model.unk_token) is not None
    ):
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    if not all(content.isascii() and content.split() == [content] for content in added):
        return None  # cleaning could turn other text into them
    memo = WordMemo(backend, added, add_special_tokens)
    sample = "a b"
    expected = backend.encode(sample, add_special_tokens=add_special_tokens).ids
    return memo if memo.encode_batch([sample])[0].tolist() == expected else None


class WordMemo(dict[str, tuple[int, ...]]):
    """Words and marks of ASCII text to their ids; what is not there yet is asked of the tokenizer's model.

    Args:
        backend, add_special_tokens: as `word_memo` takes them, which says whether the tokenizer is one to be served.
        added: tokens that the tokenizer finds in raw text; text that holds one is left to it.
    """

    def __init__(self, backend: Tokenizer, added: list[str], add_special_tokens: bool) -> None:
        super().__init__()
        self._backend, self._model = backend, backend.model
        self._lowercase: bool = backend.normalizer.lowercase
        self._added = [content.lower() for content in added]
        word = backend.encode("a", add_special_tokens=False).ids
        text = backend.encode("a", add_special_tokens=add_special_tokens).ids
        at = next((at for at in range(len(text)) if text[at : at + len(word)] == word), 0)
        self._before, self._behind = np.asarray(text[:at]), np.asarray(text[at + len(word) :])

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not word.isprintable():
            raise KeyError(word)  # BERT drops control characters inside words; such text is rare
        if len(self) >= MOST_WORDS:
            self.clear()
        ids = self[word] = tuple(token.id for token in self._model.tokenize(word))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokenizer's ids of whole texts, int64 (length,) each."""
        parts = [self._parts(text) for text in texts]
        left = [part for text in parts for part in text if isinstance(part, str)]
        asked = iter(self._backend.encode_batch_fast(left, add_special_tokens=False))
        ids = [[next(asked).ids if isinstance(part, str) else part for part in text] for text in parts]
        return [np.concatenate([self._before, *text, self._behind]).astype(np.int64, copy=False) for text in ids]

    def _parts(self, text: str) -> list[np.ndarray | str]:
        """Ids of what can be looked up, in turn with the lines that are left to the tokenizer."""
        if (ids := self._looked_up(text)) is not None:
            return [ids]
        runs = ["\n".join(lines) for _, lines in groupby(text.split("\n"), key=str.isascii)]
        return [run if (ids := self._looked_up(run)) is None else ids for run in runs]

    def _looked_up(self, text: str) -> np.ndarray | None:
        if not text.isascii():
            return None
        lower = text.lower()
        if any(content in lower for content in self._added):
            return None
        words = WORD_OR_MARK.findall(lower if self._lowercase else text)
        try:
            return np.fromiter(chain.from_iterable(map(self.__getitem__, words)), dtype=np.int64)
        except KeyError:
            return None
