"""What options of graph layers are checked for; messages name the field, its value and what is allowed."""

from dataclasses import fields
from math import isfinite
from typing import Any


def read_options(of_class: type, name: str, options: Any) -> Any:
    """Options of `of_class`, from themselves or from a dict of its fields."""
    if isinstance(options, dict):
        known = {each.name for each in fields(of_class)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"`{name}` has no field {unknown}; it has {sorted(known)}.")
        return of_class(**options)
    if type(options).__name__ != of_class.__name__:  # the class may be a saved folder's own copy
        raise ValueError(
            f"`{name}` must be of {of_class.__name__}, a dict of its fields or None, got {type(options).__name__}."
        )
    return options


def check_positive(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is None, or a finite number above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be above 0 and finite, got {value}.")


def check_default(options: Any, *names: str) -> None:
    """Raise ValueError where a field was set that the chosen attention does not read."""
    for one in fields(options):
        if one.name in names and getattr(options, one.name) != one.default:
            raise ValueError(
                f"`{one.name}` is not read by `attention={options.attention!r}`: it must be {one.default!r}, got "
                f"{getattr(options, one.name)!r}."
            )


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless it lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")


def check_count(options: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields is at least 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(options, name)}.")
