"""Training rows that are read, tokenised and batched while the run goes on, of text that need not fit anywhere.

A stream has no length and no end: after its last row it begins anew, and `training.max_steps` ends the run. Going on
from a checkpoint reads again what was read before it, so the batches are those of a run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainingArguments

from graft.trainer.arguments import DataArguments, RunConfiguration
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.oracle_sentences import oracle_sources
from graft.trainer.packed_rows import packed_rows
from graft.trainer.row_settings import chunk_rule, column_settings, cut_rule, oracle_settings, packed_size
from graft.trainer.rows import check_columns, standard_rows
from graft.trainer.tokenisation import Batch

SHUFFLED_ROWS = 1000
"""Rows that a stream is drawn from where `data.shuffle_buffer` says nothing."""
_PACKED_TOGETHER = 1024  # as many rows as are packed together where they are not streamed


def is_streamed(rows: Any) -> bool:
    """Whether these rows are read while the run goes on."""
    return isinstance(rows, IterableDataset | EndlessRows)


def first_rows(rows: Any, number: int) -> list[Any]:
    """The first rows of a stream, or of rows that have a length."""
    return list(islice(iter(rows), number))


def in_memory(stream: IterableDataset, number: int | None) -> Dataset:
    """The rows of a stream, or the first so many, in memory: those of a split that is evaluated."""
    return Dataset.from_list(list(stream if number is None else stream.take(number)))


def streamed_training(
    rows: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    configuration: RunConfiguration,
    max_positions: int | None,
) -> IterableDataset:
    """The rows that `prepare_training` gives, in its order, each made when it is asked for.

    Args:
        rows: the training split as a stream of texts.
        max_positions: tokens the model was trained on, the limit where `data.max_source_length` is None.

    Raises:
        ConfigurationError: a missing column, a limit that leaves no room, no row at all; and, when it is read, a row
            without a source or a target.
    """
    data = configuration.data
    columns = list(first_rows(rows, 1)[0])
    settings = column_settings(configuration, "train", columns)
    check_columns(columns, settings)
    options = {"batched": True, "batch_size": 64}
    given: dict[str, Any] = {"settings": settings}
    texts = rows.map(standard_rows, with_indices=True, remove_columns=columns, fn_kwargs=given, **options)
    if data.train_view == "oracle":
        given = {"tokenizer": tokenizer, "settings": oracle_settings(configuration, max_positions)}
        texts = texts.map(oracle_sources, fn_kwargs=given, **options).remove_columns("sentences_left")
    if data.train_view == "chunked":
        function, rule = chunk_rule(configuration, max_positions, (data.max_target_length, False))
    else:
        function, rule = cut_rule(configuration, max_positions)  # type: ignore[assignment]
    given = {"function": function, "tokenizer": tokenizer, "settings": rule}
    named = ["messages"] if settings.messages else ["source"]
    named += [name for name in ("prefix", "target") if getattr(settings, name)]
    prepared = texts.map(_tokenised, remove_columns=named, fn_kwargs=given, **options)
    if data.on_too_long == "skip" and data.train_view != "chunked":
        prepared = prepared.filter(_is_whole)
    if data.packing:
        size = packed_size(configuration, max_positions)
        unpacked = [name for name in ("attention_mask", "source_tokens") if name in first_rows(prepared, 1)[0]]
        together = {"batched": True, "batch_size": _PACKED_TOGETHER, "remove_columns": unpacked}
        prepared = prepared.map(packed_rows, fn_kwargs={"size": size}, **together)
    if not first_rows(prepared, 1):
        raise ConfigurationError("No row of the split train is left.")
    return prepared


def _tokenised(batch: Batch, function: Callable[..., Batch], **given: Any) -> Batch:
    try:
        return function(batch, **given)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _is_whole(row: dict[str, Any]) -> bool:
    return not row["truncated"]


class EndlessRows(torch.utils.data.IterableDataset[Any]):
    """The rows over and over: in their order, or each pass drawn anew from a buffer.

    Args:
        seed: None keeps the order.
        buffer_size: rows from which the next are drawn; of several files up to ten are read in turn.
    """

    def __init__(self, rows: IterableDataset, seed: int | None, buffer_size: int = SHUFFLED_ROWS) -> None:
        super().__init__()
        self.rows, self.seed, self.buffer_size = rows, seed, buffer_size

    def __iter__(self) -> Iterator[Any]:
        for number in count():
            if self.seed is None:
                yield from self.rows
            else:  # `repeat` would repeat each file by itself, and one order
                generator = np.random.default_rng([self.seed, number])
                yield from self.rows.shuffle(generator=generator, buffer_size=self.buffer_size)


def endless(rows: IterableDataset, data: DataArguments, args: Seq2SeqTrainingArguments) -> EndlessRows:
    """What a run trains on: in order with `train_sampling_strategy: sequential`, else shuffled by the run's seed."""
    if args.train_sampling_strategy == "sequential":
        return EndlessRows(rows, None)
    seed = args.data_seed if args.data_seed is not None else args.seed
    return EndlessRows(rows, seed, data.shuffle_buffer or SHUFFLED_ROWS)
