"""Documents cut into rows of at most `chunk_size` tokens, each a legal input with its prefix, and each with its text.

A chunk holds `body = chunk_size - special tokens - prefix` tokens of its document; the next one begins `body -
chunk_overlap` tokens later. What is captured with it (text, span, offsets) is what a knowledge graph is built from.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from graft.atomic_files import new_file
from graft.trainer.column_types import COLUMN_TYPES
from graft.trainer.tokenisation import (
    IGNORED,
    Batch,
    TokenSettings,
    answer_ids,
    label_ids,
    plain_ids,
    special_tokens_around,
    with_offsets,
)

logger = logging.getLogger(__name__)

_CHUNK_COLUMNS = (
    "document_id",
    "chunk_index",
    "chunk_count",
    "dropped_tokens",
    "input_ids",
    "attention_mask",
    "length",
)
TEXT_COLUMNS = ("raw_text_chunks", "chunk_start", "chunk_end", "token_offsets")
Ids = list[int]
Span = tuple[int, int]


@dataclass(frozen=True)
class ChunkRules:
    """How documents are cut.

    Args:
        chunk_size: most tokens of a row, prefix and special tokens included.
        chunk_overlap: tokens of its document that a chunk shares with the one before.
        min_chunk_tokens: a last chunk with fewer tokens of its document is left out, unless it is the only one.
        capture_raw_text: also give the text, its span and the tokens' offsets.
    """

    chunk_size: int
    chunk_overlap: int = 0
    min_chunk_tokens: int = 10
    capture_raw_text: bool = False


def chunk_dataset(
    examples: Dataset | Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    chunk_size: int,
    chunk_overlap: int = 0,
    min_chunk_tokens: int = 10,
    capture_raw_text: bool = False,
    source_column: str = "source",
    prefix_column: str | None = None,
) -> Any:
    """Cut each document into chunks of `chunk_size` tokens at most; the rows keep the order of the documents.

    In several processes: `rows.map(chunk_dataset, batched=True, num_proc=4, remove_columns=rows.column_names,
    fn_kwargs={"tokenizer": tokenizer, "chunk_size": 512})`.

    A row is special tokens, the prefix, a chunk, special tokens. Other columns than source and prefix are copied to
    each row. New are input_ids, attention_mask, length, document_id, chunk_index, chunk_count, and dropped_tokens: how
    many tokens at the document's end `min_chunk_tokens` left out. The document_id is the column `id`, as text; without
    one it is a row's number in a Dataset, and a hash of the text in a batch, which does not know where it stands.

    With `capture_raw_text` also raw_text_chunks, chunk_start, chunk_end (characters of the source) and token_offsets
    ((start, end) in the source per token, (-1, -1) for prefix and special tokens). Without overlap the texts tile the
    source character for character, up to a tail left out. A character that two tokens share goes to the later chunk.

    Args:
        examples: a Dataset, or a batch of one.
        chunk_overlap: in [0, body) tokens, where `body = chunk_size - special tokens - prefix`.

    Returns:
        A Dataset for a Dataset, columns for a batch.

    Raises:
        ValueError: `chunk_size` leaves no room, `chunk_overlap` is out of range, a column is missing, a document would
            give a row without any token, `capture_raw_text` is asked of a tokenizer without offsets, or a single
            example is given.
    """
    rules = ChunkRules(chunk_size, chunk_overlap, min_chunk_tokens, capture_raw_text)
    columns = list(examples.column_names) if isinstance(examples, Dataset) else list(examples)
    if missing := [name for name in (source_column, prefix_column) if name is not None and name not in columns]:
        raise ValueError(f"There is no column {missing[0]!r}; there are {', '.join(columns)}.")
    names = (source_column, prefix_column)
    if not isinstance(examples, Dataset):
        if isinstance(examples[source_column], str):
            raise ValueError("A document becomes several rows, so `Dataset.map` needs `batched=True`.")
        hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in examples[source_column]]
        chunks = _chunk_batch(examples, hashes, tokenizer, rules, names)
        if capture_raw_text:
            chunks["token_offsets"] = [offsets.tolist() for offsets in chunks["token_offsets"]]
        return chunks
    types = {name: kind for name, kind in examples.features.items() if name not in names}
    new = (*_CHUNK_COLUMNS, *(TEXT_COLUMNS if capture_raw_text else ()))
    chunked = examples.map(
        _chunk_batch,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=Features(types | {name: COLUMN_TYPES[name] for name in new}),
        fn_kwargs={"tokenizer": tokenizer, "rules": rules, "names": names},
        desc="Chunking",
    )
    dropped = [
        count for count, index in zip(chunked["dropped_tokens"], chunked["chunk_index"], strict=True) if not index
    ]
    if tails := sum(count > 0 for count in dropped):
        logger.info("%d documents lost a tail of fewer than %d tokens.", tails, min_chunk_tokens)
    return chunked


def _chunk_batch(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int | str],
    tokenizer: PreTrainedTokenizerBase,
    rules: ChunkRules,
    names: tuple[str, str | None],
) -> Batch:
    source, prefix = names
    before, after = special_tokens_around(tokenizer)
    prefixes = plain_ids(tokenizer, [text or "" for text in batch[prefix]]) if prefix else [[]] * len(batch[source])
    chunks = cut_documents(batch[source], [([*before, *ids], after) for ids in prefixes], tokenizer, rules)
    rows = chunks.pop("row")
    chunks.pop("repeated")
    copied = {name: [values[row] for row in rows] for name, values in batch.items() if name not in names}
    documents = [str(name) for name in batch.get("id", indices)]
    return copied | {"document_id": [documents[row] for row in rows]} | chunks


def chunk_spans(num_tokens: int, body: int, overlap: int = 0, least: int = 10) -> list[Span]:
    """[start, end) of each chunk in a document's tokens; see `ChunkRules`."""
    step = body - overlap
    spans = [(start, min(start + body, num_tokens)) for start in range(0, max(num_tokens - overlap, 1), step)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < least:
        spans.pop()
    return spans


def cut_documents(
    texts: Sequence[str], around: Sequence[tuple[Ids, Ids]], tokenizer: PreTrainedTokenizerBase, rules: ChunkRules
) -> Batch:
    """The chunks of all texts as columns; besides those of `chunk_dataset`, row (of the text) and repeated.

    Offsets are arrays: as lists, so many pairs take longer than the tokenizer.

    Args:
        around: for each text the ids before and after each of its chunks.

    Returns:
        `repeated` counts a chunk's first tokens that the chunk before it ended with.
    """
    tokens, places = _tokenise(texts, tokenizer, rules)
    columns: dict[str, list[Any]] = {}
    for row, ids in enumerate(tokens):
        before, after = around[row]
        body = _body(rules, len(before) + len(after))
        spans = chunk_spans(len(ids), body, rules.chunk_overlap, rules.min_chunk_tokens)
        if not ids and not before and not after:
            raise ValueError(f"Document {row} of its batch has no token: {texts[row][:40]!r}.")
        shared = {"row": row, "chunk_count": len(spans), "dropped_tokens": len(ids) - spans[-1][1]}
        for index, (start, end) in enumerate(spans):
            chunk = [*before, *ids[start:end], *after]
            values = shared | {"chunk_index": index, "input_ids": chunk, "attention_mask": [1] * len(chunk)}
            values |= {"length": len(chunk), "repeated": rules.chunk_overlap if index else 0}
            if places is not None:
                values |= _text_of(texts[row], places[row], (start, end), (len(before), len(after)))
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
    return columns


def _body(rules: ChunkRules, fixed: int) -> int:
    body = rules.chunk_size - fixed
    if body < 1:
        raise ValueError(f"`chunk_size` {rules.chunk_size} must exceed prefix and special tokens ({fixed}).")
    if not 0 <= rules.chunk_overlap < body:
        raise ValueError(
            f"`chunk_overlap` must lie in [0, {body}), got {rules.chunk_overlap}: `chunk_size` {rules.chunk_size} "
            f"leaves {body} tokens beside prefix and special tokens."
        )
    return body


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of a document lie in its text.

    Args:
        offsets: (tokens, 2), first character and the one behind the last.
        starts: (tokens,), the first characters, none before that of an earlier token.
    """

    offsets: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Span]) -> TokenPlaces:
        """From the spans that a tokenizer gave; one that normalises may step back."""
        offsets = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs)).reshape(-1, 2)
        return cls(offsets, np.maximum.accumulate(offsets[:, 0]))


def _tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, rules: ChunkRules
) -> tuple[list[Ids], list[TokenPlaces] | None]:
    if not rules.capture_raw_text:
        return plain_ids(tokenizer, texts), None
    encoded = with_offsets(tokenizer, texts, "capture_raw_text", add_special_tokens=False)
    return list(encoded["input_ids"]), [TokenPlaces.of(pairs) for pairs in encoded["offset_mapping"]]


def _text_of(text: str, places: TokenPlaces, span: Span, around: tuple[int, int]) -> dict[str, Any]:
    """The text columns of the chunk of tokens `span`; it ends where the first token after it begins."""
    first, last = span
    start = int(places.starts[first]) if first else 0
    end = int(places.starts[last]) if last < len(places.starts) else len(text)
    offsets = np.full((sum(around) + last - first, 2), -1)
    offsets[around[0] : around[0] + last - first] = places.offsets[first:last]
    return {"raw_text_chunks": text[start:end], "chunk_start": start, "chunk_end": end, "token_offsets": offsets}


# The rows of the training view "chunked" -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkedSettings:
    """What a run says about prefix, suffix and target, and how it cuts."""

    tokens: TokenSettings
    rules: ChunkRules


def _cut_rows(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: ChunkedSettings, end: bool
) -> tuple[Batch, list[int]]:
    """Chunks with a run's own prefix, blank line and suffix around each, and the text that each was cut from."""
    tokens, rules = settings.tokens, settings.rules
    before, after = special_tokens_around(tokenizer)
    fixed, suffix, blank = plain_ids(tokenizer, [tokens.source_prefix, tokens.source_suffix, "\n\n"])
    prefixes = plain_ids(tokenizer, batch.get("prefix") or [""] * len(batch["source"]))
    set_off = [[*ids[: tokens.max_prefix_length], *blank] if ids else [] for ids in prefixes]
    around = [([*before, *fixed, *ids], [*suffix, *(after if end else [])]) for ids in set_off]
    chunks = cut_documents(batch["source"], around, tokenizer, rules)
    rows = chunks.pop("row")
    # A tail that was left out counts as a cut of its document, once.
    dropped, last = chunks.pop("dropped_tokens"), zip(chunks["chunk_index"], chunks["chunk_count"], strict=True)
    cut = [bool(count) and index == total - 1 for count, (index, total) in zip(dropped, last, strict=True)]
    copied = {name: [batch[name][row] for row in rows] for name in batch if name not in ("source", "prefix", "target")}
    documents = {"document_id": [str(batch["id"][row]) for row in rows]} if "id" in batch else {}
    return copied | documents | chunks | {"truncated": cut}, rows


def chunked_seq2seq_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: ChunkedSettings) -> Batch:
    """Rows of an encoder-decoder: every chunk of a source learns the whole target."""
    chunks, rows = _cut_rows(batch, tokenizer, settings, end=True)
    labels = label_ids(batch["target"], tokenizer, settings.tokens.target_limit)
    chunks.pop("repeated")
    return chunks | {"labels": [labels[row] for row in rows]}


def chunked_causal_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: ChunkedSettings) -> Batch:
    """Rows of a decoder: a chunk as the prompt, then the answer, which alone is learnt."""
    chunks, rows = _cut_rows(batch, tokenizer, settings, end=False)
    answers = answer_ids(batch["target"], tokenizer, settings.tokens.target_limit)
    pairs = [(ids, answers[row]) for ids, row in zip(chunks["input_ids"], rows, strict=True)]
    chunks.pop("repeated")
    return chunks | {
        "input_ids": [[*prompt, *answer] for prompt, answer in pairs],
        "attention_mask": [[1] * (len(prompt) + len(answer)) for prompt, answer in pairs],
        "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in pairs],
        "length": [len(prompt) + len(answer) for prompt, answer in pairs],
    }


def chunked_text_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: ChunkedSettings) -> Batch:
    """Rows of a decoder that learns the text itself; what a chunk repeats of the one before is not learnt again."""
    chunks, _ = _cut_rows(batch, tokenizer, settings, end=True)
    start = len(special_tokens_around(tokenizer)[0])
    labels = [
        [*ids[:start], *[IGNORED] * repeated, *ids[start + repeated :]]
        for ids, repeated in zip(chunks["input_ids"], chunks.pop("repeated"), strict=True)
    ]
    return chunks | {"labels": labels}


def keep_chunk_texts(rows: Dataset, path: str | Path | None) -> Dataset:
    """Write document_id, chunk_index and the text columns of `rows` as Parquet, if told where; give the rest back."""
    if path is not None:
        with new_file(path) as temporary:
            rows.select_columns(["document_id", "chunk_index", *TEXT_COLUMNS]).to_parquet(str(temporary))
        logger.info("The texts of %d chunks are in %s", len(rows), path)
    return rows.remove_columns(list(TEXT_COLUMNS))
