"""A tokenizer as a corpus sees it: the ids that matter, a hash that tells it from another, texts to ids in bulk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .manifest import fingerprint
from .threads import default_workers
from .word_memo import WordMemo, word_memo

LARGEST_UINT16_VOCABULARY = 65_536
FEW_CORES = 4


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a corpus records of its tokenizer.

    Args:
        name: as it was given; for people.
        sha256: of its vocabulary, rules and special tokens, the same for equal tokenizers whatever they are called.
        vocab_size: largest id + 1.
        pad_token_id: fills the last chunk of a document; the end token where a tokenizer has no padding token.
        eos_token_id: ends a document; None if the tokenizer has neither an end nor a separator token.
    """

    name: str
    sha256: str
    vocab_size: int
    pad_token_id: int
    eos_token_id: int | None

    @property
    def dtype(self) -> np.dtype:
        """uint16 if every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= LARGEST_UINT16_VOCABULARY else np.uint32)


def load_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one in a folder or under a name.

    Raises:
        ValueError: there is none that can be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer` {str(tokenizer)!r} cannot be loaded: {' '.join(str(error).split())}") from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of vocabulary, rules and special tokens; truncation and padding, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return fingerprint({"rules": rules, "special": special})


def identify(tokenizer: PreTrainedTokenizerBase) -> TokenizerIdentity:
    """What a corpus records of a tokenizer.

    Raises:
        ValueError: it has neither a padding nor an end token, so a chunk could not be filled up.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    if pad is None:
        raise ValueError(
            f"`tokenizer` {tokenizer.name_or_path!r} has no padding, end or separator token; set pad_token."
        )
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    name = str(tokenizer.name_or_path) or type(tokenizer).__name__
    return TokenizerIdentity(name, tokenizer_hash(tokenizer), size, pad, end)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool
) -> list[np.ndarray]:
    """Whole texts to ids, never cut; the fast tokenizers use every core. Returns int64 arrays (length,)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        lists = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in lists]
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


class BulkEncoder:
    """`encode_batch` for all texts of a corpus: words that come again are looked up where that gives the same ids.

    Looking up takes a fifth of the processor time and runs in one thread, where the tokenizer has one for each core,
    so with more than `FEW_CORES` cores the tokenizer is left alone.

    Args:
        tokenizer, add_special_tokens: as `encode_batch` takes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        self.tokenizer, self.add_special_tokens = tokenizer, add_special_tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.memo: WordMemo | None = None
        if backend is not None and default_workers() <= FEW_CORES:
            backend.no_truncation()
            backend.no_padding()
            self.memo = word_memo(backend, add_special_tokens)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Int64 arrays (length,), one for each text."""
        if self.memo is None:
            return encode_batch(self.tokenizer, texts, self.add_special_tokens)
        return self.memo.encode_batch(texts)
