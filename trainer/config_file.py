"""Configuration files and command-line overrides, read into one checked `RunConfiguration`.

Files are JSON (or YAML by their suffix), merged from left to right, deep by block. Everything is checked before
anything is loaded, and each mistake gives one `ConfigurationError` naming the option, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, Seq2SeqTrainingArguments

from graft.configuration.configuration_unlimiformer import UnlimiformerConfig
from graft.configuration.option_checks import with_path
from graft.trainer.arguments import (
    AdapterArguments,
    DataArguments,
    GraphArguments,
    ModelArguments,
    RetrievalArguments,
    RunConfiguration,
)
from graft.trainer.block_rules import check_blocks, resolve_views
from graft.trainer.command_line import Override, describe, fits, split_overrides, typed_value
from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.old_names import OLD_NAMES

logger = logging.getLogger(__name__)

__all__ = ["ConfigurationError", "from_dict", "read_configuration", "to_dict"]

_BLOCKS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "memory": UnlimiformerConfig,
    "retrieval": RetrievalArguments,
    "graph": GraphArguments,
    "adapter": AdapterArguments,
}
_OPTIONAL = ("memory", "retrieval", "graph", "adapter", "generation", "metrics")  # what `--no-block` can take away
_METRICS_HINT = list[str | dict[str, Any]]
# Stock fields that would do by another way what a block of ours does, or that must not stand in a file.
_NOT_FOR_TRAINING = {"enable_jit_checkpoint", "generation_config", "generation_max_length", "generation_num_beams"}
_NOT_FOR_TRAINING |= {"hub_token", "local_rank"}


@cache
def _hints(block: str) -> dict[str, Any]:
    """Field -> type of a block; for `generation`, whose class has no annotations, every type is allowed."""
    if block in _BLOCKS:
        return get_type_hints(_BLOCKS[block])
    if block == "generation":
        return {name: Any for name in GenerationConfig().to_dict() if name != "transformers_version"}
    stock = get_type_hints(Seq2SeqTrainingArguments)
    names = [field.name for field in fields(Seq2SeqTrainingArguments) if field.name not in _NOT_FOR_TRAINING]
    ours = {"early_stopping_patience": int | None, "early_stopping_threshold": float}
    ours["fsdp"] = bool | str | None  # its annotation lacks the true that its documentation asks for
    return {name: stock[name] for name in names} | ours


@cache
def _all_paths() -> list[str]:
    blocks = (*_BLOCKS, "training", "generation")
    return [f"{block}.{name}" for block in blocks for name in _hints(block)] + [*blocks, "metrics"]


def _unknown(path: str, origin: str) -> ConfigurationError:
    """The error for a name no block has: what it is called now, or the nearest names there are."""
    last = path.rpartition(".")[2]
    if "trust" in last:
        return ConfigurationError(
            f"`{path}` {origin} is refused: consent to run a model's own code is the flag `--trust-remote-code` of "
            "the command line and never part of a configuration, so that a shared configuration executes nothing."
        )
    if last in OLD_NAMES:
        return ConfigurationError(f"`{path}` {origin} is an old name; instead there is {OLD_NAMES[last]}.")
    nearest = difflib.get_close_matches(path, _all_paths(), n=3, cutoff=0.7)
    if not nearest:  # the right field in the wrong block, or a misspelt field without its block
        by_field = {known.rpartition(".")[2]: known for known in _all_paths()}
        nearest = [by_field[name] for name in difflib.get_close_matches(last, by_field, n=3, cutoff=0.7)]
    if nearest:
        return ConfigurationError(
            f"`{path}` {origin} is unknown; did you mean {' or '.join(f'`{name}`' for name in nearest)}?"
        )
    return ConfigurationError(
        f"`{path}` {origin} is unknown; there are the blocks {', '.join([*_BLOCKS, 'training', 'generation'])} and "
        "the list metrics."
    )


def _read_file(path: Path) -> dict[str, Any]:
    """The blocks of one file; of a run.json, the configuration in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The configuration {str(path)!r} cannot be read: {error}.") from error
    try:
        contents = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise ConfigurationError(f"The configuration {str(path)!r} is not valid {kind}: {error}.") from error
    if isinstance(contents, dict) and isinstance(contents.get("configuration"), dict):
        contents = contents["configuration"]
    if not isinstance(contents, dict):
        raise ConfigurationError(
            f"The configuration {str(path)!r} must hold an object of blocks, got {type(contents).__name__}."
        )
    return contents


def _refuse_code(value: Any, path: str, origin: str) -> None:
    """Refuse, at any depth of a file, what would make a configuration run code or vouch for it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if "trust" in str(key):
                raise _unknown(f"{path}.{key}".lstrip("."), origin)
            _refuse_code(inner, f"{path}.{key}".lstrip("."), origin)
    elif path == "metrics" and isinstance(value, list):
        for metric in value:
            name = metric.get("name") if isinstance(metric, Mapping) else metric
            if isinstance(name, str) and ":" in name:
                raise ConfigurationError(
                    f"`metrics` {origin} names code, {name!r}, and is refused: a function of your own is the flag "
                    "`--metric module:function` of the command line, so that a shared configuration executes nothing."
                )


def _check_names_and_types(block: str, contents: Any, origin: str) -> None:
    """Refuse unknown names and wrong types of one block as it stands in a file or on a command line."""
    if block == "metrics":
        if not fits(contents, _METRICS_HINT):
            raise ConfigurationError(
                f"`metrics` {origin} must be a list of names or of objects with a `name`, got {contents!r}."
            )
        return
    if block not in (*_BLOCKS, "training", "generation"):
        raise _unknown(block, origin)
    if contents is None and block in _OPTIONAL:
        return
    if not isinstance(contents, dict):
        several = isinstance(contents, list) and block == "adapter"
        way_out = " A run trains one adapter: fold a LoRA with `graft-merge` first." if several else ""
        raise ConfigurationError(
            f"The block `{block}` {origin} must be an object of options, got {contents!r}.{way_out}"
        )
    for name, value in contents.items():
        if name not in _hints(block):
            raise _unknown(f"{block}.{name}", origin)
        if not fits(value, _hints(block)[name]):
            raise ConfigurationError(
                f"`{block}.{name}` {origin} must be {describe(_hints(block)[name])}, got {value!r}."
            )


def _merge(merged: dict[str, Any], contents: Mapping[str, Any], origin: str, path: str = "") -> None:
    """Lay `contents` over `merged`, deep by block; a replaced value is logged."""
    for name, value in contents.items():
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            _merge(merged[name], value, origin, here)
            continue
        if name in merged and merged[name] != value:
            logger.info("`%s` %s replaces %r by %r", here, origin, merged[name], value)
        merged[name] = dict(value) if isinstance(value, dict) else value


def _full_path(override: Override, origin: str) -> list[str]:
    """Block, field and possibly a key in it; a stock field may be written without its block."""
    parts = override.path.split(".")
    if len(parts) == 1 and parts[0] not in (*_BLOCKS, "training", "generation", "metrics"):
        flat = parts[0].replace("-", "_")
        if flat not in _hints("training"):
            raise _unknown(parts[0], origin)
        parts = ["training", flat]
    return parts


def _apply_override(merged: dict[str, Any], override: Override) -> None:
    origin = "on the command line"
    removed = override.path.removeprefix("no-")
    if override.path.startswith("no-") and removed in _OPTIONAL and not override.values:
        merged.pop(removed, None)
        return
    block, *rest = _full_path(override, origin)
    if not rest:
        hint: Any = _METRICS_HINT if block == "metrics" else dict[str, Any]
    elif block not in (*_BLOCKS, "training", "generation") or rest[0] not in _hints(block):
        raise _unknown(override.path, origin)
    else:
        hint = _hints(block)[rest[0]] if len(rest) == 1 else Any
    value = typed_value(override.values, hint)
    if value is None and not override.values:
        raise ConfigurationError(f"`--{override.path}` needs a value: {describe(hint)}.")
    for name in reversed(rest):
        value = {name: value}
    _check_names_and_types(block, value, origin)
    _merge(merged, {block: value}, origin)


def _build(block: str, contents: dict[str, Any]) -> Any:
    """The block's dataclass; what it refuses becomes one `ConfigurationError` that names `block.field`."""
    block_class = _BLOCKS[block]
    for field in fields(block_class):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in contents:
            raise ConfigurationError(f"`{block}.{field.name}` is missing: {describe(_hints(block)[field.name])}.")
    try:
        return block_class(**contents)
    except (StrictDataclassError, ValueError) as error:  # the first is no ValueError
        raise ConfigurationError(with_path(block, block_class, error)) from error


def from_dict(blocks: Mapping[str, Any], origin: str = "in the configuration") -> RunConfiguration:
    """Build and check a configuration from its blocks, as `to_dict` writes them.

    Raises:
        ConfigurationError: an unknown name, a wrong type or value, or two blocks that do not go together.
    """
    for block, contents in blocks.items():
        _check_names_and_types(block, contents, origin)
    missing = [block for block in ("model", "data") if block not in blocks]
    if missing:
        raise ConfigurationError(f"The block `{missing[0]}` is missing; a run needs `model`, `data` and `training`.")
    built = {block: _build(block, blocks[block]) for block in _BLOCKS if blocks.get(block) is not None}
    training = dict(blocks.get("training") or {})
    configuration = RunConfiguration(
        model=built["model"],
        data=built["data"],
        memory=built.get("memory"),
        retrieval=built.get("retrieval"),
        graph=built.get("graph"),
        adapter=built.get("adapter"),
        generation=dict(blocks.get("generation") or {}),
        metrics=list(blocks.get("metrics") or []),
        early_stopping_patience=training.pop("early_stopping_patience", None),
        early_stopping_threshold=training.pop("early_stopping_threshold", 0.0),
        training=training,
    )
    resolve_views(configuration)
    check_blocks(configuration)
    return configuration


def read_configuration(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read the files from left to right, lay the overrides over them, check everything.

    Args:
        paths: JSON or YAML files, or a run's `run.json`.
        overrides: the rest of a command line, such as ["--training.learning_rate", "1e-5", "--no-memory"].

    Raises:
        ConfigurationError: see `from_dict`; also a file that cannot be read, or one that would run code.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        contents = _read_file(Path(path))
        origin = f"in {path}"
        _refuse_code(contents, "", origin)
        for block, options in contents.items():
            _check_names_and_types(block, options, origin)
        _merge(merged, contents, origin)
    try:
        options_given = split_overrides(overrides)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    for override in options_given:
        _apply_override(merged, override)
    return from_dict(merged)


def to_dict(configuration: RunConfiguration) -> dict[str, Any]:
    """The blocks as JSON values; `from_dict` gives the same configuration back."""
    training = dict(configuration.training)
    if configuration.early_stopping_patience is not None:
        training["early_stopping_patience"] = configuration.early_stopping_patience
        training["early_stopping_threshold"] = configuration.early_stopping_threshold
    blocks = {
        "model": asdict(configuration.model),
        "data": asdict(configuration.data),
        "training": training,
        "memory": configuration.memory and asdict(configuration.memory),
        "retrieval": configuration.retrieval and asdict(configuration.retrieval),
        "graph": configuration.graph and asdict(configuration.graph),
        "adapter": configuration.adapter and asdict(configuration.adapter),
        "generation": dict(configuration.generation),
        "metrics": list(configuration.metrics),
    }
    return {name: block for name, block in blocks.items() if block}
