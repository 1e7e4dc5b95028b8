"""The few numbers of a graph-aware model that mean something by themselves: read, drawn and set."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...pages import line_plot_png

_MEANINGFUL = (
    *("epsilon", "sharpening", "scale", "graph_scale", "threshold", "differential_lambda", "row_gain"),
    *("message_weight", "hop_weights", "mix"),
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_PARTS = {"self_attn": "attention", "graph": "graph", "mlp": "mlp"}


@dataclass(frozen=True)
class GraphParameter:
    """One number.

    Args:
        layer: decoder layer.
        kind: where it stands and what it is, such as "attention epsilon" or "graph layer 0 epsilon"; the scale of an
            update, lambda in the papers, is "graph scale".
        head: None where one number serves all heads.
        value: now.
    """

    layer: int
    kind: str
    head: int | None
    value: float


def graph_parameters(model: nn.Module) -> list[GraphParameter]:
    """epsilon, sharpening, lambda, thresholds and message weights of each layer, in the order of the layers.

    A model without graph layers has none.
    """
    rows = []
    for layer, kind, _, parameter in _found(model):
        values = parameter.detach().float().reshape(-1).tolist()
        heads: Sequence[int | None] = range(len(values)) if len(values) > 1 else [None]
        rows += [GraphParameter(layer, kind, head, value) for head, value in zip(heads, values, strict=True)]
    return sorted(rows, key=lambda row: row.layer)  # stable: kinds and heads stay in order


def _found(model: nn.Module) -> Iterator[tuple[int, str, str, nn.Parameter]]:
    """Layer, kind, last name and parameter of all that `_MEANINGFUL` names."""
    for name, parameter in model.named_parameters():
        place = _LAYER.search(name)
        if place is None:
            continue
        parts = place[2].split(".")
        number = parts.pop() if parts[-1].isdigit() else ""  # of a list, such as hops
        leaf = parts[-1]
        if leaf not in _MEANINGFUL or parts[0] not in _PARTS:
            continue
        inner = "".join(f" layer {part}" for part in parts[1:-1] if part.isdigit())
        yield int(place[1]), " ".join(filter(None, [_PARTS[parts[0]] + inner, leaf, number])), leaf, parameter


def plot_graph_parameters(rows: Sequence[GraphParameter], path: str | Path, title: str = "Graph parameters") -> Path:
    """Draw each kind of `graph_parameters` over the layers: its value, or the mean and range over heads.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one parameter, got none: the model has no graph layers.")
    series = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        by_layer: dict[int, list[float]] = {}
        for row in rows:
            if row.kind == kind:
                by_layer.setdefault(row.layer, []).append(row.value)
        layers = list(by_layer)
        several = any(len(values) > 1 for values in by_layer.values())
        name = f"{kind}, mean over heads" if several else kind
        series[name] = (layers, [sum(values) / len(values) for values in by_layer.values()])
        if several:
            series[f"{kind}, largest"] = (layers, [max(values) for values in by_layer.values()])
            series[f"{kind}, smallest"] = (layers, [min(values) for values in by_layer.values()])
    return line_plot_png(series, path, title, ("layer", "value"))


@torch.no_grad()
def set_parameters(model: nn.Module, name: str, value: float) -> list[str]:
    """Set every graph parameter called `name`, such as "threshold" or "epsilon", in place; returns their kinds.

    Raises:
        ValueError: the model has no such parameter, or `value` is not finite.
    """
    if not torch.isfinite(torch.tensor(float(value))):
        raise ValueError(f"`value` must be finite, got {value}.")
    found = list(_found(model))
    chosen = [(layer, kind, parameter) for layer, kind, leaf, parameter in found if leaf == name]
    if not chosen:
        known = ", ".join(sorted({leaf for _, _, leaf, _ in found})) or "none"
        raise ValueError(f"`name` must be one of the model's graph parameters ({known}), got {name!r}.")
    for _, _, parameter in chosen:
        parameter.fill_(value)
    return [f"layer {layer}: {kind}" for layer, kind, _ in chosen]
