"""Texts to token rows: pure functions of (batch, settings), so that `datasets` can cache what they give.

Prefix, source and suffix are tokenised apart without special tokens, cut, joined, and the special tokens stand once
around the whole. So a prefix, a suffix and the end-of-sequence token survive every truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORED = -100  # a label that no loss counts
# Nothing is cut here, and only ids are wanted. A warning that a whole document exceeds the window would mislead.
_WHOLE: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}
_WHOLE |= {"return_attention_mask": False, "return_token_type_ids": False}
Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class TokenSettings:
    """What the functions below need to know besides the texts; part of the fingerprint of their results.

    Args:
        source_prefix, source_suffix: fixed texts around every source.
        max_prefix_length: tokens kept of a row's prefix, None for all.
        source_limit: tokens kept of the whole input, special tokens included, None for all.
        target_limit: tokens kept of a target, special tokens included.
        scored_tokens: last tokens of a text without target that are scored.
        local_tokens: tokens before the scored ones, or last tokens of a prompt, that stay out of the memory.
        view: how evaluated rows are laid out; see `lay_out`.
        keeps_starts: also give `token_starts`: of each token its first character in the source, -1 for all others,
            such as special tokens, prefixes and answers.
    """

    source_prefix: str = ""
    source_suffix: str = ""
    max_prefix_length: int | None = None
    source_limit: int | None = None
    target_limit: int = 128
    scored_tokens: int = 512
    local_tokens: int = 256
    view: str = "truncated"
    keeps_starts: bool = False


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], target: bool = False) -> list[list[int]]:
    """Token ids of each text, whole and without special tokens; `target` for tokenizers that treat targets apart."""
    if not texts:
        return []
    given = {"text_target": list(texts)} if target else {"text": list(texts)}
    encoded = tokenizer(**given, add_special_tokens=False, **_WHOLE)
    return [list(ids) for ids in encoded["input_ids"]]


def with_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], wanted_by: str, **options: Any
) -> BatchEncoding:
    """What a tokenizer makes of whole texts, and the span of characters of each token.

    Args:
        wanted_by: the setting that needs the spans, for the error.

    Raises:
        ValueError: the tokenizer is no fast one, which alone knows.
    """
    if not tokenizer.is_fast:
        found = type(tokenizer).__name__
        raise ValueError(f"`{wanted_by}` needs the offsets of a fast tokenizer, got {found}.")
    return tokenizer(list(texts), return_offsets_mapping=True, **_WHOLE, **options)


def _with_starts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], wanted_by: str
) -> tuple[BatchEncoding, list[list[int]]]:
    """As `with_offsets`, and where each token begins, -1 for special tokens."""
    encoded = with_offsets(tokenizer, texts, wanted_by, return_special_tokens_mask=True)
    pairs = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return encoded, [
        [-1 if no else start for (start, _), no in zip(spans, mask, strict=True)] for spans, mask in pairs
    ]


def special_tokens_around(tokenizer: PreTrainedTokenizerBase, target: bool = False) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a sequence."""
    given = {"text_target": "a"} if target else {"text": "a"}
    bare = list(tokenizer(**given, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(**given, add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ValueError(f"{type(tokenizer).__name__} changes a text when it adds special tokens: {bare} -> {whole}.")


def join_source(
    parts: tuple[list[int], list[int], list[int]], around: tuple[list[int], list[int]], limit: int | None
) -> tuple[list[int], bool]:
    """Special tokens + prefix + as much of the source as fits + suffix + special tokens, and whether it was cut.

    Args:
        parts: ids of prefix, source, suffix.
        around: special ids before and after.
        limit: most ids in the result, None for no limit.

    Raises:
        ValueError: `limit` leaves no room for a single token of the source.
    """
    prefix, source, suffix = parts
    before, after = around
    fixed = len(before) + len(prefix) + len(suffix) + len(after)
    if limit is not None and limit <= fixed:
        raise ValueError(
            f"`data.max_source_length` {limit} must exceed prefix, suffix and special tokens ({fixed}); shorten the "
            "prefix with `data.max_prefix_length`."
        )
    kept = source if limit is None else source[: limit - fixed]
    return [*before, *prefix, *kept, *suffix, *after], len(kept) < len(source)


def joined_sources(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings, end: bool
) -> tuple[list[tuple[list[int], bool]], list[int]]:
    """(ids, whether cut) of every row, and the tokens each source has uncut; `end`: special tokens after it, too."""
    before, after = special_tokens_around(tokenizer)
    fixed, suffix = plain_ids(tokenizer, [settings.source_prefix, settings.source_suffix])
    prefixes = batch.get("prefix") or [""] * len(batch["source"])
    prefix_ids = [ids[: settings.max_prefix_length] for ids in plain_ids(tokenizer, prefixes)]
    # The blank line belongs to the source's own tokens: a cut prefix is still set off.
    texts = [f"\n\n{source}" if prefix else source for prefix, source in zip(prefixes, batch["source"], strict=True)]
    sources = plain_ids(tokenizer, texts)
    around = (before, after if end else [])
    rows = [
        join_source(([*fixed, *prefix], source, suffix), around, settings.source_limit)
        for prefix, source in zip(prefix_ids, sources, strict=True)
    ]
    return rows, [len(source) for source in sources]


def source_starts(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings, lengths: Sequence[int]
) -> list[list[int]]:
    """`token_starts` of the rows that `joined_sources` gives without special tokens behind them.

    Args:
        lengths: tokens of each row.
    """
    before, _ = special_tokens_around(tokenizer)
    fixed, suffix = plain_ids(tokenizer, [settings.source_prefix, settings.source_suffix])
    prefixes = batch.get("prefix") or [""] * len(batch["source"])
    prefix_ids = [ids[: settings.max_prefix_length] for ids in plain_ids(tokenizer, prefixes)]
    blanks = [2 if prefix else 0 for prefix in prefixes]
    texts = ["\n\n"[:blank] + source for blank, source in zip(blanks, batch["source"], strict=True)]
    encoded = with_offsets(tokenizer, texts, "graph.knowledge_graph", add_special_tokens=False)
    rows = []
    for length, prefix, blank, spans in zip(lengths, prefix_ids, blanks, encoded["offset_mapping"], strict=True):
        ahead = len(before) + len(fixed) + len(prefix)
        kept = spans[: length - ahead - len(suffix)]
        starts = [max(start - blank, 0) if end > blank else -1 for start, end in kept]
        rows.append([-1] * ahead + starts + [-1] * (length - ahead - len(kept)))
    return rows


def seq2seq_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """Rows of an encoder-decoder from the columns source, prefix (optional) and target (optional)."""
    joined, lengths = joined_sources(batch, tokenizer, settings, end=True)
    rows: Batch = {
        "input_ids": [ids for ids, _ in joined],
        "attention_mask": [[1] * len(ids) for ids, _ in joined],
        "length": [len(ids) for ids, _ in joined],
        "truncated": [cut for _, cut in joined],
        "source_tokens": lengths,
    }
    if "target" in batch:
        rows["labels"] = label_ids(batch["target"], tokenizer, settings.target_limit)
    return rows


def _check_target_room(room: int, limit: int) -> None:
    if room < 1:
        raise ValueError(f"`data.max_target_length` {limit} must exceed the target's special tokens ({limit - room}).")


def label_ids(targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[list[int]]:
    """Ids of an encoder-decoder's targets, cut so that they and their special tokens are `limit` at most."""
    before, after = special_tokens_around(tokenizer, target=True)
    room = limit - len(before) - len(after)
    _check_target_room(room, limit)
    return [[*before, *ids[:room], *after] for ids in plain_ids(tokenizer, targets, target=True)]


def answer_ids(targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[list[int]]:
    """Ids of a decoder's targets, cut so that the end-of-sequence token still fits behind them."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    _check_target_room(limit - len(end), limit)
    return [[*ids[: limit - len(end)], *end] for ids in plain_ids(tokenizer, targets)]


def _prompts(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> tuple[list[tuple[list[int], bool]], list[int]]:
    """As `joined_sources`, for a decoder's prompts; of a chat that is too long the end is kept, where it is asked."""
    if "messages" not in batch:
        return joined_sources(batch, tokenizer, settings, end=False)
    rows, lengths = [], []
    for messages in batch["messages"]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = plain_ids(tokenizer, [str(text)])[0]  # the template has written the special tokens
        limit = len(ids) if settings.source_limit is None else settings.source_limit
        rows.append((ids[-limit:], len(ids) > limit))
        lengths.append(len(ids))
    return rows, lengths


def causal_training_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """Prompt and answer in one row; the loss counts the answer only."""
    prompts, _ = _prompts(batch, tokenizer, settings)
    answers = answer_ids(batch["target"], tokenizer, settings.target_limit)
    pairs = list(zip(prompts, answers, strict=True))
    places: Batch = {}
    if settings.keeps_starts:
        starts = source_starts(batch, tokenizer, settings, [len(prompt) for prompt, _ in prompts])
        places["token_starts"] = [[*row, *[-1] * len(answer)] for row, answer in zip(starts, answers, strict=True)]
    return places | {
        "input_ids": [[*prompt, *answer] for (prompt, _), answer in pairs],
        "attention_mask": [[1] * (len(prompt) + len(answer)) for (prompt, _), answer in pairs],
        "labels": [[IGNORED] * len(prompt) + answer for (prompt, _), answer in pairs],
        "length": [len(prompt) + len(answer) for (prompt, _), answer in pairs],
        "truncated": [cut for _, cut in prompts],
    }


def text_blocks(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """Consecutive blocks of `source_limit` tokens of each text, all of them learnt; a lone last token is left out.

    Columns other than the text's are repeated in every block.
    """
    limit = settings.source_limit
    if limit is None or limit < 2:
        raise ValueError(f"`data.max_source_length` must be at least 2 to cut texts into blocks, got {limit}.")
    starts: list[list[int]] = []
    if settings.keeps_starts:
        encoded, starts = _with_starts(tokenizer, batch["source"], "graph.knowledge_graph")
    else:
        encoded = tokenizer(batch["source"], **_WHOLE)
    pieces = [
        (row, slice(start, start + limit))
        for row, ids in enumerate(encoded["input_ids"])
        for start in range(0, max(len(ids) - 1, 0), limit)
    ]
    rows: Batch = {name: [batch[name][row] for row, _ in pieces] for name in batch if name != "source"}
    blocks = [list(encoded["input_ids"][row][place]) for row, place in pieces]
    if starts:
        rows["token_starts"] = [starts[row][place] for row, place in pieces]
    return rows | {
        "input_ids": blocks,
        "attention_mask": [[1] * len(block) for block in blocks],
        "labels": [list(block) for block in blocks],
        "length": [len(block) for block in blocks],
        "truncated": [False] * len(blocks),
    }


def lay_out(before: list[int], scored: list[int], settings: TokenSettings) -> dict[str, list[int]]:
    """One evaluated row of a decoder: the same `scored` tokens in every view, what they can see differs.

    "full": memory_ids, then the last `local_tokens` of `before`; "truncated": those local tokens only, nothing else;
    "context": all of `before`.
    """
    local = before if settings.view == "context" else before[-settings.local_tokens :]
    row = {"input_ids": [*local, *scored], "labels": [IGNORED] * len(local) + scored}
    if settings.view == "full":
        row["memory_ids"] = before[: len(before) - len(local)]
    return row


def _seen_starts(starts: Sequence[int], row: dict[str, list[int]], end: int) -> list[int]:
    """Of a document's `starts` those of the tokens that an evaluated row has, the last of which is token `end` - 1."""
    return list(starts[end - len(row["input_ids"]) : end])


def _as_columns(rows: list[dict[str, list[int]]], settings: TokenSettings, *more: str) -> Batch:
    names = ["input_ids", "labels", *more] + (["memory_ids"] if settings.view == "full" else [])
    names += ["token_starts"] if settings.keeps_starts else []
    columns: Batch = {name: [row[name] for row in rows] for name in names}
    columns["attention_mask"] = [[1] * len(row["input_ids"]) for row in rows]
    columns["length"] = [len(row["input_ids"]) + len(row.get("memory_ids", ())) for row in rows]
    return columns


def causal_evaluation_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """Prompts and, where there is a target, answers. In the view "truncated" the prompt is cut to `source_limit`."""
    prompts, lengths = _prompts(batch, tokenizer, settings)
    answers = (
        answer_ids(batch["target"], tokenizer, settings.target_limit) if "target" in batch else [[] for _ in prompts]
    )
    rows = []
    for (prompt, _), answer in zip(prompts, answers, strict=True):
        if settings.view == "truncated":  # the prompt is cut already; nothing more is hidden
            row = {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer}
        else:
            row = lay_out(prompt, answer, settings)
        row["prompt_ids"] = row["input_ids"][: len(row["input_ids"]) - len(answer)]
        rows.append(row)
    if settings.keeps_starts:
        starts = source_starts(batch, tokenizer, settings, [len(prompt) for prompt, _ in prompts])
        for row, of_prompt, answer in zip(rows, starts, answers, strict=True):
            places = [*of_prompt, *[-1] * len(answer)]
            row["token_starts"] = _seen_starts(places, row, len(places))
    columns = _as_columns(rows, settings, "prompt_ids")
    if "target" not in batch:
        columns.pop("labels", None)
    return columns | {"truncated": [cut for _, cut in prompts], "source_tokens": lengths}


def text_evaluation_rows(batch: Batch, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> Batch:
    """Texts without target: the last `scored_tokens` are scored. Texts of a single token are left out.

    `scored_bytes` is the length in UTF-8 of the text that the scored tokens stand for.
    """
    rows, kept, lengths, cuts, sizes = [], [], [], [], []
    encoded, starts = _with_starts(tokenizer, batch["source"], "data.scored_tokens")
    for number, text in enumerate(batch["source"]):
        ids = list(encoded["input_ids"][number])[: settings.source_limit]
        first = max(len(ids) - settings.scored_tokens, 1)
        if first >= len(ids):
            continue
        kept.append(number)
        rows.append(lay_out(ids[:first], ids[first:], settings))
        if settings.keeps_starts:
            rows[-1]["token_starts"] = _seen_starts(starts[number], rows[-1], len(ids))
        lengths.append(len(encoded["input_ids"][number]))
        cuts.append(len(ids) < lengths[-1])
        # A special token has the empty span (0, 0); the text's last token reaches to its end, spaces included.
        ends = [0 if special else end for (_, end), special in zip(
            encoded["offset_mapping"][number], encoded["special_tokens_mask"][number], strict=True)]  # fmt: skip
        last = max(ends[: len(ids)]) if cuts[-1] else len(text)
        sizes.append(len(text[max(ends[:first]) : last].encode()))
    columns: Batch = {name: [batch[name][row] for row in kept] for name in batch if name != "source"}
    return columns | _as_columns(rows, settings) | {"truncated": cuts, "source_tokens": lengths, "scored_bytes": sizes}
