"""Rows of any data set under our own column names, with missing texts refused or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.trainer.configuration_error import ConfigurationError

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class ColumnSettings:
    """Where the texts of a row stand, and what happens without a target.

    Args:
        split: name of the split, for messages.
        source, target, prefix, id, messages: columns, None for none; `messages` replaces source and target.
        skips_empty_target: leave rows without a target out instead of refusing them.
        keeps_references: also give all targets of a row as the column `references`.
        repeats_references: a row for each target, one behind the other, instead of the first target alone.
    """

    split: str
    source: str = "source"
    target: str | None = "target"
    prefix: str | None = None
    id: str | None = None
    messages: str | None = None
    skips_empty_target: bool = False
    keeps_references: bool = False
    repeats_references: bool = False

    def needed(self) -> list[str]:
        """The columns a split must have."""
        texts = [self.messages] if self.messages else [self.source, self.target]
        return [name for name in (*texts, self.prefix, self.id) if name is not None]


def check_columns(present: Sequence[str], settings: ColumnSettings) -> None:
    """Refuse a split that lacks a column.

    Raises:
        ConfigurationError: names the column and lists those the split has.
    """
    if missing := [name for name in settings.needed() if name not in present]:
        raise ConfigurationError(
            f"The split {settings.split} has no column {missing[0]!r}; it has {', '.join(present)}. Name its columns "
            "with `data.source_column`, `data.target_column` (null for none), `data.prefix_column`, `data.id_column`."
        )


def _references(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def _split_messages(messages: Any, where: str, wants_target: bool) -> tuple[list[Any], list[str]]:
    """Everything before the assistant's last message, and that message as the reference."""
    if not messages or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise ConfigurationError(f"{where} must hold a list of messages with `role` and `content`, got {messages!r}.")
    if messages[-1]["role"] == "assistant":
        return list(messages[:-1]), _references(messages[-1]["content"])
    if wants_target:
        raise ConfigurationError(
            f"{where} must end with the assistant's message, got one of {messages[-1]['role']!r}."
        )
    return list(messages), []


def standard_rows(batch: Batch, indices: list[int], settings: ColumnSettings) -> Batch:
    """The columns id, source or messages, prefix, target (the first reference) and references, as far as they exist.

    Raises:
        ConfigurationError: a row without a source, or without a target where that is refused; names row and id.
    """
    rows: list[dict[str, Any]] = []
    for position, index in enumerate(indices):
        name = str(batch[settings.id][position]) if settings.id else str(index)
        where = f"Row {index} (id {name!r}) of the split {settings.split}"
        row: dict[str, Any] = {"id": name}
        references: list[str] | None = None
        if settings.messages:
            row["messages"], references = _split_messages(
                batch[settings.messages][position], where, settings.target is not None
            )
        else:
            row["source"] = batch[settings.source][position]
            if not isinstance(row["source"], str) or not row["source"].strip():
                raise ConfigurationError(f"{where} has no text in {settings.source!r}, got {row['source']!r}.")
            if settings.target:
                references = _references(batch[settings.target][position])
        if settings.prefix:
            row["prefix"] = batch[settings.prefix][position] or ""
        if settings.target and references is not None:
            if not references and settings.skips_empty_target:
                continue
            if not references:
                column = settings.messages or settings.target
                raise ConfigurationError(
                    f"{where} has an empty target in {column!r}; `data.on_empty_target: skip` leaves such rows out."
                )
            row |= {"references": references} if settings.keeps_references else {}
            trained = references if settings.repeats_references else references[:1]
            rows += [row | {"target": reference} for reference in trained]
        else:
            rows.append(row)
    names = ["id", "messages" if settings.messages else "source"]
    names += ["prefix"] if settings.prefix else []
    names += ["target"] if settings.target else []
    names += ["references"] if settings.target and settings.keeps_references else []
    return {name: [row[name] for row in rows] for name in names}


def merged_duplicates(ids: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[int], list[list[str]]]:
    """Rows with equal id as one: the first row of each id, and the different references of all of them, in order."""
    first: dict[str, int] = {}
    merged: dict[str, dict[str, None]] = {}
    for row, (name, texts) in enumerate(zip(ids, references, strict=True)):
        first.setdefault(name, row)
        merged.setdefault(name, {}).update(dict.fromkeys(texts))
    return list(first.values()), [list(texts) for texts in merged.values()]
