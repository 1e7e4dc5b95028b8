"""What the blocks of a run say about its rows: which columns, how many tokens, which function makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.trainer import tokenisation
from graft.trainer.arguments import RunConfiguration
from graft.trainer.block_rules import has_target
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.document_chunks import (
    ChunkedSettings,
    ChunkRules,
    chunked_causal_rows,
    chunked_seq2seq_rows,
    chunked_text_rows,
)
from graft.trainer.rows import ColumnSettings
from graft.trainer.tokenisation import TokenSettings

_LAID_OUT_AS = {"without_graph": "context", "shuffled_graph": "context"}  # these compare with that view
Rule = tuple[Callable[..., Any], TokenSettings | ChunkedSettings]
"""A function from a batch of texts to a batch of rows, and what it is to know."""


def column_settings(configuration: RunConfiguration, split: str, columns: list[str]) -> ColumnSettings:
    """Where the texts of a split stand that has `columns`."""
    data = configuration.data
    target = data.target_column if data.messages_column is None else data.messages_column
    if split == "test" and target not in columns:
        target = None  # a test set may keep its targets to itself
    return ColumnSettings(
        split=split,
        source=data.source_column,
        target=target,
        prefix=data.prefix_column,
        id=data.id_column,
        messages=data.messages_column,
        skips_empty_target=data.on_empty_target == "skip",
        keeps_references=split != "train",
        repeats_references=split == "train" and data.train_on_all_references,
    )


def token_settings(configuration: RunConfiguration, limit: int | None, target_limit: int, view: str) -> TokenSettings:
    """What tokenising is to know; `limit`: most tokens of an input, None for all."""
    data, memory = configuration.data, configuration.memory or UnlimiformerConfig()
    return TokenSettings(
        source_prefix=data.source_prefix,
        source_suffix=data.source_suffix,
        max_prefix_length=data.max_prefix_length,
        source_limit=limit,
        target_limit=target_limit,
        scored_tokens=data.scored_tokens,
        local_tokens=memory.local_tokens,
        view=_LAID_OUT_AS.get(view, view),
        keeps_starts=configuration.knowledge_graph is not None and view != "without_graph",
    )


def training_limit(configuration: RunConfiguration, max_positions: int | None, target_limit: int) -> int | None:
    """Source tokens that the base model reads: as configured, or as many as it was trained on.

    Raises:
        ConfigurationError: the target takes all positions, or more are asked for than there are.
    """
    configured, causal = configuration.data.max_source_length, configuration.model.task == "causal"
    if configured is None and max_positions is not None and causal and has_target(configuration):
        if max_positions <= target_limit:
            raise ConfigurationError(
                f"`data.max_target_length` {target_limit} leaves the source none of the {max_positions} positions the "
                "model was trained on; lower it, or set `data.max_source_length`."
            )
        return max_positions - target_limit  # a decoder's answer stands in the same row
    remembers = configuration.memory is not None and configuration.memory.training != "standard"
    reads_any = causal or remembers
    if configured is not None and max_positions is not None and configured > max_positions and not reads_any:
        raise ConfigurationError(
            f"`data.max_source_length` {configured} exceeds the {max_positions} positions the model was trained on; a "
            "longer source is for evaluation with memory (`data.eval_max_source_length`), and for training with it, "
            "where `memory.training` is not 'standard'."
        )
    return max_positions if configured is None else configured


def cut_rule(configuration: RunConfiguration, max_positions: int | None) -> tuple[Callable[..., Any], TokenSettings]:
    """Training rows of the first tokens of each source; of text without a target, blocks of all of them."""
    data = configuration.data
    limit = training_limit(configuration, max_positions, data.max_target_length)
    _check_memory_acts(configuration, max_positions, limit)
    settings = token_settings(configuration, limit, data.max_target_length, "truncated")
    if configuration.model.task == "seq2seq":
        return tokenisation.seq2seq_rows, settings
    return tokenisation.causal_training_rows if has_target(configuration) else tokenisation.text_blocks, settings


def _check_memory_acts(configuration: RunConfiguration, max_positions: int | None, limit: int | None) -> None:
    """Refuse to train with a memory where no row is longer than what is read without one.

    Raises:
        ConfigurationError: names the regime, both lengths and what to raise.
    """
    memory, causal = configuration.memory, configuration.model.task == "causal"
    if memory is None or memory.training == "standard" or limit is None:
        return
    longest = limit + (configuration.data.max_target_length if causal and has_target(configuration) else 0)
    seen = memory.local_tokens if causal else memory.window or max_positions
    if seen is not None and longest <= seen:
        name = "memory.local_tokens" if causal else "memory.window"
        raise ConfigurationError(
            f"`memory.training` {memory.training!r} would never act: a training row has at most {longest} tokens, and "
            f"`{name}` {seen} are read without memory. Raise `data.max_source_length` above it, or lower `{name}`."
        )


def oracle_settings(configuration: RunConfiguration, max_positions: int | None) -> TokenSettings:
    """What choosing sentences is to know.

    Raises:
        ConfigurationError: nothing says how many tokens a source may have.
    """
    data = configuration.data
    limit = training_limit(configuration, max_positions, data.max_target_length)
    if limit is None:
        raise ConfigurationError(
            f"`data.train_view` {data.train_view!r} needs `data.max_source_length`: the model names no length that it "
            "was trained on."
        )
    return token_settings(configuration, limit, data.max_target_length, "oracle")


def chunk_rule(
    configuration: RunConfiguration, max_positions: int | None, kept: tuple[int, bool]
) -> tuple[Callable[..., Any], ChunkedSettings]:
    """Every document as rows of `data.chunk_size` tokens; `kept`: tokens of a target, whether texts are captured.

    Raises:
        ConfigurationError: nothing says how long a chunk is, or it is longer than the model reads.
    """
    data, (target_limit, capture_raw_text) = configuration.data, kept
    limit = training_limit(configuration, max_positions, target_limit)
    chunk_size = data.chunk_size if data.chunk_size is not None else limit
    if chunk_size is None:
        raise ConfigurationError("`data.chunk_size` is null and the model names no length that it was trained on.")
    if limit is not None and chunk_size > limit:
        raise ConfigurationError(f"`data.chunk_size` {chunk_size} exceeds the {limit} tokens that the model can read.")
    rules = ChunkRules(chunk_size, data.chunk_overlap, data.min_chunk_tokens, capture_raw_text)
    settings = ChunkedSettings(token_settings(configuration, None, target_limit, "chunked"), rules)
    if configuration.model.task == "seq2seq":
        return chunked_seq2seq_rows, settings
    return chunked_causal_rows if has_target(configuration) else chunked_text_rows, settings


def packed_size(configuration: RunConfiguration, max_positions: int | None) -> int:
    """Tokens of a row that several share.

    Raises:
        ConfigurationError: nothing says how many.
    """
    data = configuration.data
    size = training_limit(configuration, max_positions, data.max_target_length)
    if size is None:
        raise ConfigurationError("`data.packing` needs `data.max_source_length`: the model names no length.")
    return size + data.max_target_length if has_target(configuration) else size
