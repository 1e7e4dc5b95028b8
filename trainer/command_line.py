"""Overrides given on a command line: `--block.field value ...`, `--block.field=value`, `--no-block`, stock flat names.

Values are JSON where they read as JSON of a type that the option takes, and text otherwise, so `--model.name 2024`
names a folder and `--training.learning_rate 1e-5` is a number.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Override:
    """One option of a command line: the dotted path as written, without dashes, and its raw values."""

    path: str
    values: tuple[str, ...]


def split_overrides(tokens: Sequence[str]) -> list[Override]:
    """Group the tokens of a command line into options and their values.

    Raises:
        ValueError: the first token is no option, or an option has no name.
    """
    grouped: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            if not name:
                raise ValueError(f"An option must look like `--block.field value`, got {token!r}.")
            grouped.append((name, [value] if equals else []))
        elif grouped:
            grouped[-1][1].append(token)
        else:
            raise ValueError(f"Expected an option such as `--training.learning_rate 1e-5`, got {token!r}.")
    return [Override(name, tuple(values)) for name, values in grouped]


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type `hint`; an int fits a float, a bool fits no number."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin is list:
        return isinstance(value, list) and all(fits(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, options[0]) and fits(v, options[1]) for k, v in value.items())
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(hint, type) and isinstance(value, hint)


def describe(hint: Any) -> str:
    """The type `hint` in words a user reads: "a whole number", "one of 'a', 'b'", "a list of text", ..."""
    origin, options = get_origin(hint), get_args(hint)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if origin in (Union, types.UnionType):
        # An enum of transformers stands beside `str`; its members are text as well.
        named = [o for o in options if o in words or get_origin(o) is not None or o in (list, dict)]
        described = [describe(o) for o in named if not (o is int and float in options)]
        return " or ".join(dict.fromkeys(described))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in options)
    if origin is list:
        return f"a list of {describe(options[0])}"
    if origin is dict or hint is dict:
        return "an object"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _typed(raw: str, hint: Any) -> Any:
    """One raw value as JSON (or Python's spelling of true, false and null) if that fits, else as text."""
    spelling = {"True": "true", "False": "false", "None": "null"}
    try:
        value = json.loads(spelling.get(raw, raw))
    except json.JSONDecodeError:
        return raw
    return value if fits(value, hint) or not fits(raw, hint) else raw


def _item_hint(hint: Any) -> Any | None:
    """What a list of type `hint` holds, or None if `hint` allows no list."""
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(option) is list:
            return get_args(option)[0]
    return None


def typed_value(values: Sequence[str], hint: Any) -> Any:
    """The value that an option's raw `values` stand for, given the type it takes.

    None stands for true where a switch is allowed; several values, or one where only a list is allowed, make a list. A
    value that fits nothing is returned as it reads, for the caller to refuse with the option's name.
    """
    item = _item_hint(hint)
    if not values:
        return True if fits(True, hint) else [] if item is not None else None
    if len(values) == 1:
        value = _typed(values[0], hint)
        if not fits(value, hint) and item is not None and not isinstance(value, list):
            value = [_typed(values[0], item)]
        return value
    return [_typed(value, Any if item is None else item) for value in values]
