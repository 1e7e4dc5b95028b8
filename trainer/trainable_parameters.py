"""Which parameters of a model train, by patterns in their names; how many there are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let exactly those parameters train in whose names one of the patterns is found; returns their names.

    Args:
        model: changed in place: `requires_grad` of every parameter is set.
        patterns: regular expressions, searched anywhere in a name: "graph" or r"layers\\.[01]\\..*epsilon".

    Raises:
        ValueError: there is no pattern, one is no regular expression, or one matches nothing; nothing is changed.
    """
    return _set_trained(model, set(_matching(model, patterns)))


def train_all_but(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze exactly those parameters in whose names one of the patterns is found; returns the names of all others.

    Arguments and errors as in `train_only`; `[]` freezes nothing.
    """
    frozen = set(_matching(model, patterns)) if patterns else set()
    return _set_trained(model, {name for name, _ in model.named_parameters()} - frozen)


def count_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are; tied weights count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def _set_trained(model: nn.Module, chosen: set[str]) -> list[str]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, _ in model.named_parameters() if name in chosen]


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"`patterns` must be a list of at least one pattern, got {patterns!r}.")
    names = [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for pattern in patterns:
        try:
            matched = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"`patterns` must hold regular expressions, got {pattern!r}: {error}.") from error
        if not matched:
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            raise ValueError(
                f"`patterns` holds {pattern!r}, which is in no parameter's name; names are made of {', '.join(parts)}."
            )
        found += matched
    return found
