"""The rows of a run: the splits it needs, what trains, what is evaluated meanwhile, and how rows become batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Seq2SeqTrainingArguments

from graft.retrieval.corpus.retro_collator import DataCollatorForRetro
from graft.trainer.arguments import RunConfiguration
from graft.trainer.collators import (
    CausalEvaluationCollator,
    CausalMemoryCollator,
    CausalPackedCollator,
    CausalTrainingCollator,
    ChunkGraphCollator,
    Seq2SeqCollator,
    padding_id,
)
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.data import prepare_evaluation, prepare_training, row_counts, rows_during_training
from graft.trainer.knowledge_graph_data import KnowledgeGraphs
from graft.trainer.streamed_rows import endless, first_rows, is_streamed


def needed_splits(args: Seq2SeqTrainingArguments) -> list[str]:
    """The splits that a run reads."""
    needed = {
        "train": args.do_train,
        "validation": args.do_eval or args.eval_strategy != "no",
        "test": args.do_predict,
    }
    return [split for split, is_needed in needed.items() if is_needed]


def check_splits(args: Seq2SeqTrainingArguments, splits: Mapping[str, Any]) -> None:
    """Refuse a run that lacks a split.

    Raises:
        ConfigurationError: names the split and those there are.
    """
    for split in needed_splits(args):
        if split not in splits:
            raise ConfigurationError(f"The run needs the split {split}, but `data` has only {', '.join(splits)}.")


def training_texts(configuration: RunConfiguration, splits: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the training rows, for a tokenizer that is trained on them; raises only when read."""
    columns = (configuration.data.source_column, configuration.data.target_column)
    if "train" not in splits:
        raise ConfigurationError("A tokenizer can only be trained where there is a split train.")
    for row in splits["train"]:
        for column in columns:
            value = row.get(column) if column else None
            yield from [value] if isinstance(value, str) else value or []


def lay_out(
    configuration: RunConfiguration,
    args: Seq2SeqTrainingArguments,
    splits: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    graphs: KnowledgeGraphs | None = None,
) -> tuple[Any | None, dict[str, Any], dict[str, dict[str, int]]]:
    """Rows to train on, rows evaluated meanwhile by view, and how many rows became how many."""
    positions = getattr(config, "max_position_embeddings", None)
    train: Any | None = None
    meanwhile: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    if args.do_train:
        train = prepare_training(splits["train"], tokenizer, configuration, positions, graphs)
        if is_streamed(train):
            train = endless(train, configuration.data, args)
        else:
            counts["train"] = row_counts(splits["train"], train)
    if args.do_eval or args.eval_strategy != "no":
        part = rows_during_training(splits["validation"], configuration.data)
        for view in configuration.data.eval_views or []:
            meanwhile[view] = prepare_evaluation(part, tokenizer, configuration, view, positions, graphs=graphs)
            counts[f"validation_{view}"] = row_counts(part, meanwhile[view])
    return train, meanwhile, counts


def check_equal_rows(args: Seq2SeqTrainingArguments, datasets: Sequence[Any]) -> None:
    """Every process must see the same rows, or gradients would mix what was never one batch."""
    if args.world_size < 2:
        return
    ids = "\0".join(str(name) for rows in datasets for name in _ids(rows))
    seen = gather_object([hashlib.sha256(ids.encode()).hexdigest()])
    if len(set(seen)) > 1:
        raise RuntimeError(f"The {args.world_size} processes loaded different rows; give each the same files.")


def _ids(rows: Any) -> list[Any]:
    """All ids, of a stream the first: what comes later has not been read."""
    return [row["id"] for row in first_rows(rows, 64)] if is_streamed(rows) else list(rows["id"])


def training_collator(configuration: RunConfiguration, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What makes batches to train on, and to evaluate unless `evaluation_collator` does."""
    multiple, memory = configuration.data.pad_to_multiple_of, configuration.memory
    if configuration.retrieval is not None:
        return DataCollatorForRetro(padding_id(tokenizer))
    if configuration.model.task == "seq2seq":
        return Seq2SeqCollator(tokenizer, multiple)
    if memory is not None and memory.training != "standard":
        return CausalMemoryCollator(tokenizer, memory.local_tokens)
    if configuration.data.packing:
        return CausalPackedCollator(tokenizer, multiple)
    if configuration.knowledge_graph is not None:
        return ChunkGraphCollator(CausalTrainingCollator(tokenizer, multiple), "right")
    return CausalTrainingCollator(tokenizer, multiple)


def evaluation_collator(configuration: RunConfiguration, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What makes batches to evaluate, None where those of training will do."""
    if configuration.model.task == "seq2seq" or configuration.retrieval is not None:
        return None
    if configuration.knowledge_graph is not None:
        return ChunkGraphCollator(CausalEvaluationCollator(tokenizer), "left")
    return CausalEvaluationCollator(tokenizer)
