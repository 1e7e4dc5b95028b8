"""From loaded splits to the rows a Trainer takes: check, tokenise, lay out for each view."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import Dataset, Features, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from graft.trainer import tokenisation
from graft.trainer.arguments import DataArguments, RunConfiguration
from graft.trainer.block_rules import has_target
from graft.trainer.column_types import COLUMN_TYPES
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.knowledge_graph_data import KnowledgeGraphs
from graft.trainer.oracle_sentences import oracle_sources
from graft.trainer.packed_rows import packed_rows
from graft.trainer.row_mapping import RowMapping, tokenised_rows, tokenizer_fingerprint
from graft.trainer.row_settings import (
    chunk_rule,
    column_settings,
    cut_rule,
    oracle_settings,
    packed_size,
    token_settings,
    training_limit,
)
from graft.trainer.rows import check_columns, merged_duplicates, standard_rows
from graft.trainer.splits import load_splits, not_utf8, rows_during_training
from graft.trainer.streamed_rows import is_streamed, streamed_training

logger = logging.getLogger(__name__)

__all__ = [
    "load_splits",
    "prepare_evaluation",
    "prepare_training",
    "row_counts",
    "rows_during_training",
    "standard_rows_of",
]


def standard_rows_of(rows: Dataset, configuration: RunConfiguration, split: str) -> Dataset:
    """The rows under our column names; duplicates merged outside of training."""
    data, settings = configuration.data, column_settings(configuration, split, rows.column_names)
    check_columns(rows.column_names, settings)
    # One process: it is quick, and a row that is refused in a pool of processes can leave the pool waiting for ever.
    mapping = RowMapping(None, data.overwrite_cache)
    options = {"with_indices": True, "remove_columns": rows.column_names, "fn_kwargs": {"settings": settings}}
    try:
        standard = mapping(rows, standard_rows, repr(settings), desc=f"Reading {split}", **options)
    except UnicodeDecodeError as error:
        raise not_utf8(data, split, error) from error
    if len(standard) < len(rows) and not settings.repeats_references:
        logger.info("%s: %d rows without a target are left out.", split, len(rows) - len(standard))
    if split != "train" and data.merge_duplicates and data.id_column and len(set(standard["id"])) < len(standard):
        standard = _without_duplicates(standard, split)
    if len(standard) == 0:
        raise ConfigurationError(f"No row of the split {split} is left.")
    return standard


def _without_duplicates(rows: Dataset, split: str) -> Dataset:
    has_references = "references" in rows.column_names
    references = list(rows["references"]) if has_references else [[] for _ in range(len(rows))]
    first, merged = merged_duplicates(list(rows["id"]), references)
    logger.info("%s: %d rows with equal id became %d.", split, len(rows), len(first))
    rows = rows.select(first)
    return rows.remove_columns("references").add_column("references", merged) if has_references else rows


def _without_too_long(rows: Dataset, data: DataArguments, split: str, limit: int | None) -> Dataset:
    """What `data.on_too_long` says about rows whose source was cut."""
    cut = np.flatnonzero(np.asarray(rows["truncated"], dtype=bool))
    if len(cut) == 0 or data.on_too_long == "truncate":
        if len(cut):
            logger.info("%s: %d of %d sources were cut to %s tokens.", split, len(cut), len(rows), limit)
        return rows
    if data.on_too_long == "error":
        raise ConfigurationError(
            f"{len(cut)} sources of the split {split} exceed {limit} tokens, the first has the id "
            f"{rows[int(cut[0])]['id']!r}; `data.on_too_long` may be 'truncate' or 'skip'."
        )
    logger.info("%s: %d of %d rows exceed %s tokens and are left out.", split, len(cut), len(rows), limit)
    return rows.select(np.flatnonzero(~np.asarray(rows["truncated"], dtype=bool)))


def _truncated_training(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, configuration: RunConfiguration, max_positions: int | None
) -> Dataset:
    return _cut_to_limit(standard_rows_of(rows, configuration, "train"), tokenizer, configuration, max_positions)


def _cut_to_limit(
    standard: Dataset, tokenizer: PreTrainedTokenizerBase, configuration: RunConfiguration, max_positions: int | None
) -> Dataset:
    data, (function, settings) = configuration.data, cut_rule(configuration, max_positions)
    tokenised = tokenised_rows(standard, function, tokenizer, settings, data)
    return _without_too_long(tokenised, data, "train", settings.source_limit)


def _oracle_training(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, configuration: RunConfiguration, max_positions: int | None
) -> Dataset:
    data, settings = configuration.data, oracle_settings(configuration, max_positions)
    chosen = RowMapping(data.num_proc, data.overwrite_cache)(
        standard_rows_of(rows, configuration, "train"),
        oracle_sources,
        f"{settings!r} {tokenizer_fingerprint(tokenizer)}",
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        desc="Choosing sentences",
    )
    left = np.asarray(chosen["sentences_left"])
    logger.info("train: %d of %d sources lost sentences, %d in all.", (left > 0).sum(), len(left), left.sum())
    return _cut_to_limit(chosen.remove_columns("sentences_left"), tokenizer, configuration, max_positions)


def _oracle_and_truncated_training(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, configuration: RunConfiguration, max_positions: int | None
) -> Dataset:
    views = (_oracle_training, _truncated_training)
    return concatenate_datasets([view(rows, tokenizer, configuration, max_positions) for view in views])


def _chunked_training(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, configuration: RunConfiguration, max_positions: int | None
) -> Dataset:
    data = configuration.data
    standard = standard_rows_of(rows, configuration, "train")
    return _in_chunks(
        standard, tokenizer, configuration, max_positions, (data.max_target_length, data.capture_raw_text)
    )


def _in_chunks(
    standard: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    configuration: RunConfiguration,
    max_positions: int | None,
    kept: tuple[int, bool],
) -> Dataset:
    """Every document as rows of `data.chunk_size` tokens; `kept`: tokens of a target, whether texts are captured."""
    data, (function, settings) = configuration.data, chunk_rule(configuration, max_positions, kept)
    chunked = tokenised_rows(standard, function, tokenizer, settings, data)
    if cut := int(np.asarray(chunked["truncated"], dtype=bool).sum()):
        logger.info("%d documents lost a tail of fewer than %d tokens.", cut, data.min_chunk_tokens)
    return chunked


_TRAINING_VIEWS = {
    "truncated": _truncated_training,
    "chunked": _chunked_training,
    "oracle": _oracle_training,
    "oracle_and_truncated": _oracle_and_truncated_training,
}


def prepare_training(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    configuration: RunConfiguration,
    max_positions: int | None,
    graphs: KnowledgeGraphs | None = None,
) -> Any:
    """Rows to train on: input_ids, attention_mask, labels, length, truncated, id; those of a corpus are so already.

    Of a stream a stream, with the same rows.

    With `data.packing` these are input_ids, labels, position_ids, length, truncated, id of rows that share a row. The
    view "chunked" adds document_id, chunk_index, chunk_count and, where `data.capture_raw_text` asks for it, the
    columns of `document_chunks.TEXT_COLUMNS`; a knowledge graph adds chunk_ids and chunk_weights.

    Args:
        rows: the training split as loaded.
        max_positions: tokens the model was trained on, the limit where `data.max_source_length` is None.
        graphs: of the documents, where the configuration has a knowledge graph.

    Raises:
        ConfigurationError: a missing column, an empty source or target, a limit that leaves no room.
    """
    if configuration.retrieval is not None:
        return rows
    if is_streamed(rows):
        return streamed_training(rows, tokenizer, configuration, max_positions)
    prepared = _TRAINING_VIEWS[configuration.data.train_view](rows, tokenizer, configuration, max_positions)
    if len(prepared) == 0:
        raise ConfigurationError("No row of the split train is left.")
    if graphs is not None:
        prepared = graphs.with_columns(prepared, "train", configuration.data.train_view)
    return _packed(prepared, configuration, max_positions) if configuration.data.packing else prepared


def _packed(rows: Dataset, configuration: RunConfiguration, max_positions: int | None) -> Dataset:
    """Rows that share rows of as many tokens as one may have; whatever `data.num_proc` is, the same ones do."""
    data, size = configuration.data, packed_size(configuration, max_positions)
    names = ("input_ids", "labels", "position_ids", "length", "id", "truncated")
    packed = RowMapping(None, data.overwrite_cache)(
        rows,
        packed_rows,
        str(size),
        batch_size=1024,
        remove_columns=rows.column_names,
        features=Features({name: COLUMN_TYPES[name] for name in names}),
        fn_kwargs={"size": size},
        desc="Packing",
    )
    filled = int(np.asarray(packed["length"]).sum()) / (size * len(packed))
    logger.info("train: %d rows share %d of %d tokens, %.0f %% full.", len(rows), len(packed), size, 100 * filled)
    return packed


def prepare_evaluation(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    configuration: RunConfiguration,
    view: str,
    max_positions: int | None,
    split: str = "validation",
    graphs: KnowledgeGraphs | None = None,
) -> Any:
    """Rows to evaluate in one view, in the order of the data; those of a corpus are the same in every view.

    All have input_ids, attention_mask, id, source_tokens, truncated, length; with targets also labels and references.
    Causal rows have prompt_ids (with a target) or scored_bytes (without), and in the view "full" memory_ids, which may
    be empty. The scored tokens are the same in every view. "context" leaves out rows of more than `max_positions`. In
    the view "chunked" a document has several rows, which also say document_id, chunk_index and chunk_count. With
    `graphs` they have chunk_ids and chunk_weights, except in the view "without_graph".

    Raises:
        ConfigurationError: a missing column, an empty source or reference, a limit that leaves no room, no row left.
    """
    if configuration.retrieval is not None:
        return rows
    data, causal = configuration.data, configuration.model.task == "causal"
    target_limit = data.eval_max_target_length or data.max_target_length
    limit = data.eval_max_source_length
    standard = standard_rows_of(rows, configuration, split)
    if view == "chunked":
        return _in_chunks(standard, tokenizer, configuration, max_positions, (target_limit, False))
    if causal and not has_target(configuration):
        function = tokenisation.text_evaluation_rows
        if not tokenizer.is_fast:
            raise ConfigurationError(f"Scoring text needs the offsets of a fast tokenizer, not {type(tokenizer)}.")
    else:
        function = tokenisation.causal_evaluation_rows if causal else tokenisation.seq2seq_rows
        if view == "truncated":
            limits = [limit, training_limit(configuration, max_positions, target_limit)]
            limit = min((length for length in limits if length is not None), default=None)
    settings = token_settings(configuration, limit, target_limit, view)
    prepared = tokenised_rows(standard, function, tokenizer, settings, data)
    if limit == data.eval_max_source_length:
        prepared = _without_too_long(prepared, data, split, limit)
    if settings.view == "context" and max_positions is not None:
        prepared = _that_fit(prepared, max_positions, split)
    if len(prepared) == 0:
        raise ConfigurationError(f"No row of the split {split} is left for the view {view!r}.")
    return prepared if graphs is None else graphs.with_columns(prepared, split, view)


def _that_fit(rows: Dataset, max_positions: int, split: str) -> Dataset:
    lengths = np.asarray(rows["length"])
    if (lengths <= max_positions).all():
        return rows
    logger.warning(
        "%s: the view 'context' leaves out %d of %d rows, longer than the %d positions the model was trained on; with "
        "`data.eval_max_source_length` all views would see the same rows.",
        split,
        int((lengths > max_positions).sum()),
        len(rows),
        max_positions,
    )
    return rows.select(np.flatnonzero(lengths <= max_positions))


def row_counts(raw: Any, prepared: Any) -> dict[str, int]:
    """For a run's record: rows in the split, rows prepared from them, and how many of those had their source cut."""
    truncated = int(np.asarray(prepared["truncated"], dtype=bool).sum())
    return {"rows": len(raw), "prepared": len(prepared), "truncated": truncated}
