"""How `datasets` maps our rows: with fingerprints of all that a result depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

import graft
from graft.trainer.arguments import DataArguments
from graft.trainer.column_types import COLUMN_TYPES
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.document_chunks import ChunkedSettings
from graft.trainer.tokenisation import TokenSettings

_TEXTS = ("source", "prefix", "target", "messages")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that tokenise alike; unlike their pickles, it does not change when they are used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(state, dict):
        state |= {"truncation": None, "padding": None}  # set anew by every call
    languages = [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")]
    facts = [type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map, languages]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _source_of(module: ModuleType | None) -> str:
    return inspect.getsource(module) if module is not None else ""


@dataclass(frozen=True)
class RowMapping:
    """How `datasets` maps: in how many processes, and whether it may take an earlier result."""

    num_proc: int | None
    overwrite_cache: bool

    def __call__(
        self, rows: Dataset, function: Callable[..., Any], facts: str, batch_size: int = 64, **options: Any
    ) -> Dataset:
        """Map with a fingerprint of the rows, the code of the function's file, `facts`, and graft's version."""
        code = _source_of(inspect.getmodule(function))
        text = "\0".join([rows._fingerprint, function.__name__, code, facts, graft.__version__])
        return rows.map(
            function,
            batched=True,
            batch_size=batch_size,
            num_proc=self.num_proc if len(rows) > 64 else None,
            load_from_cache_file=not self.overwrite_cache,
            new_fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
            **options,
        )


def tokenised_rows(
    rows: Dataset,
    function: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings | ChunkedSettings,
    data: DataArguments,
) -> Dataset:
    """The rows that `function` makes of texts under our column names; other columns stay.

    Raises:
        ConfigurationError: with the message of what `function` refuses.
    """
    texts = [name for name in _TEXTS if name in rows.column_names]
    given = {"tokenizer": tokenizer, "settings": settings}
    try:
        first = function(rows[:1], **given)  # which columns there will be; a bad setting shows before the long work
        kept = [name for name in rows.column_names if name not in texts and name not in first]
        types = Features({name: COLUMN_TYPES[name] for name in (*kept, *first) if name not in texts})
        return RowMapping(data.num_proc, data.overwrite_cache)(
            rows,
            function,
            f"{settings!r} {tokenizer_fingerprint(tokenizer)}",
            remove_columns=texts,
            features=types,
            fn_kwargs=given,
            desc="Tokenising",
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
