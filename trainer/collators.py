"""Rows to padded batches of tensors. Each collator takes the token columns of its rows and leaves the others alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft.trainer.tokenisation import IGNORED

Rows = Sequence[Mapping[str, Any]]


def pad(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"], multiple: int | None = None
) -> Tensor:
    """Rows of ids as one tensor (rows, longest), int64, the free places holding `value`."""
    longest = max(map(len, rows))
    if multiple is not None:
        longest = -(-longest // multiple) * multiple
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    for number, ids in enumerate(rows):
        if len(ids):
            place = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
            padded[number, place] = torch.as_tensor(ids, dtype=torch.long)
    return padded


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, else the end-of-sequence token, else 0: padded places are masked, so any id will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _padded_ids(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"], multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """The padded ids and their mask, 1 where a row has a token."""
    return pad(rows, value, side, multiple), pad([[1] * len(ids) for ids in rows], 0, side, multiple)


@dataclass
class Seq2SeqCollator:
    """Sources and targets, right-padded; labels are -100 after the target. The model makes its decoder input itself.

    Args:
        pad_to_multiple_of: both lengths become a multiple of it; None for the longest row's.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """input_ids, attention_mask (rows, source) and, if there are targets, labels (rows, target)."""
        ids, mask = _padded_ids(
            [row["input_ids"] for row in rows], padding_id(self.tokenizer), "right", self.pad_to_multiple_of
        )
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in rows[0]:
            batch["labels"] = pad([row["labels"] for row in rows], IGNORED, "right", self.pad_to_multiple_of)
        return batch


@dataclass
class CausalTrainingCollator:
    """Rows of a decoder, right-padded; labels are -100 where there is no token."""

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels, all (rows, length)."""
        ids, mask = _padded_ids(
            [row["input_ids"] for row in rows], padding_id(self.tokenizer), "right", self.pad_to_multiple_of
        )
        labels = pad([row["labels"] for row in rows], IGNORED, "right", self.pad_to_multiple_of)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class CausalPackedCollator:
    """Rows that each hold several (`packed_rows`), right-padded; the padding counts as one more of them.

    There is no mask: positions that begin anew tell the model where the next row begins.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """input_ids, position_ids, labels, all (rows, length)."""
        padding = {"input_ids": padding_id(self.tokenizer), "position_ids": 0, "labels": IGNORED}
        batch = {
            name: pad([row[name] for row in rows], value, "right", self.pad_to_multiple_of)
            for name, value in padding.items()
        }
        for number, row in enumerate(rows):
            free = batch["position_ids"][number, len(row["position_ids"]) :]
            free.copy_(torch.arange(len(free)))
        return batch


@dataclass
class CausalMemoryCollator:
    """Rows of a decoder that learns with memory: what is remembered of each, and its end, which is predicted.

    Args:
        local_tokens: of a text the last so many are the end; of a prompt and its answer at least all of the answer.
    """

    tokenizer: PreTrainedTokenizerBase
    local_tokens: int

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (rows, length), memory_ids, memory_mask (rows, memory), left-padded.

        The first token of an end has no label: what predicts it lies in the memory.
        """
        token = padding_id(self.tokenizer)
        starts = [self._start(row["labels"]) for row in rows]
        memory, memory_mask = _padded_ids(
            [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)], token, "left"
        )
        ids, mask = _padded_ids(
            [row["input_ids"][start:] for row, start in zip(rows, starts, strict=True)], token, "left"
        )
        ends = [[IGNORED, *row["labels"][start + 1 :]] for row, start in zip(rows, starts, strict=True)]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": pad(ends, IGNORED, "left")}
        return batch | {"memory_ids": memory, "memory_mask": memory_mask}

    def _start(self, labels: Sequence[int]) -> int:
        """Where the end begins: behind at least one token, and with the token that predicts the first of an answer."""
        answer = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
        start = len(labels) - self.local_tokens
        return max(1, min(start, answer - 1) if answer else start)


@dataclass
class ChunkGraphCollator:
    """Batches of another collator of a decoder, with the graphs of their rows where these have some.

    Args:
        collator: makes input_ids and, maybe, prompt_ids, which are the first of a row's input_ids.
        side: on which it pads them.
    """

    collator: Any
    side: Literal["left", "right"]

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """As `collator`, and chunk_ids (rows, length), -1 in padding; chunk_weights (rows, chunks, chunks) in float32,
        0 for chunks that a row lacks; with prompt_ids also prompt_chunk_ids (rows, prompt)."""
        batch: dict[str, Tensor] = self.collator(rows)
        if "chunk_ids" not in rows[0]:
            return batch
        ids = [row["chunk_ids"] for row in rows]
        batch["chunk_ids"] = pad(ids, -1, self.side, batch["input_ids"].shape[1])
        if "prompt_ids" in rows[0]:
            prompts = [chunks[: len(row["prompt_ids"])] for chunks, row in zip(ids, rows, strict=True)]
            batch["prompt_chunk_ids"] = pad(prompts, -1, "left", batch["prompt_ids"].shape[1])
        most = max(1, *(len(row["chunk_weights"]) for row in rows))
        weights = torch.zeros(len(rows), most, most)
        for number, row in enumerate(rows):
            for chunk, read in enumerate(row["chunk_weights"]):
                weights[number, chunk, : len(read)] = torch.as_tensor(read, dtype=torch.float32)
        return batch | {"chunk_weights": weights}


@dataclass
class CausalEvaluationCollator:
    """Rows of a decoder, left-padded, so that scored tokens and prompts end where the tensor ends."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (rows, length); as the rows have them also prompt_ids with prompt_mask
        (rows, prompt) and memory_ids with memory_mask (rows, memory)."""
        token = padding_id(self.tokenizer)
        ids, mask = _padded_ids([row["input_ids"] for row in rows], token, "left")
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in rows[0]:
            batch["labels"] = pad([row["labels"] for row in rows], IGNORED, "left")
        for name in ("prompt", "memory"):
            if f"{name}_ids" in rows[0]:
                columns = _padded_ids([row[f"{name}_ids"] for row in rows], token, "left")
                batch[f"{name}_ids"], batch[f"{name}_mask"] = columns
        return batch
