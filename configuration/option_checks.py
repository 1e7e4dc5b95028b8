"""What options of graph layers are checked for; messages name the field, its value and what is allowed."""

import re
from dataclasses import fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from huggingface_hub.errors import StrictDataclassError


def read_options(of_class: type, name: str, options: Any) -> Any:
    """Options of `of_class`, from themselves or from a dict of its fields; errors name fields as `name.field`.

    Raises:
        ValueError: an unknown field, a value that `of_class` refuses, or neither options nor a dict.
    """
    if isinstance(options, dict):
        known = sorted(each.name for each in fields(of_class))
        if unknown := sorted(set(options) - set(known), key=str):
            nearest = get_close_matches(str(unknown[0]), known, n=1, cutoff=0.6)
            hint = f"did you mean `{name}.{nearest[0]}`? `{name}` has" if nearest else f"`{name}` has"
            raise ValueError(f"`{name}.{unknown[0]}` is unknown; {hint} {', '.join(known)}.")
        try:
            return of_class(**options)
        except (StrictDataclassError, ValueError) as error:  # the first is no ValueError; its cause says what is wrong
            raise ValueError(with_path(name, of_class, error)) from error
    if type(options).__name__ != of_class.__name__:  # the class may be a saved folder's own copy
        raise ValueError(
            f"`{name}` must be of {of_class.__name__}, a dict of its fields or None, got {type(options).__name__}."
        )
    return options


def with_path(path: str, of_class: type, error: BaseException) -> str:
    """What `error` says, with the fields of `of_class` it names written as they are given: `path.field`."""
    known = "|".join(each.name for each in fields(of_class))
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    said = re.sub(r"^Field '(\w+)'", r"`\1`", str(cause or error))  # of a wrong type, by huggingface_hub
    return re.sub(rf"`({known})(?=[`.=])", rf"`{path}.\1", said)


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
