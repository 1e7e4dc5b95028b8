"""Pictures of token graphs: a heat map, and a page with every layer's graph, its statistics and its parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...pages import figure, heading, heat_map_png, page, paragraph, table, token_heat
from .graph_parameters import GraphParameter, plot_graph_parameters

_MOST_DRAWN = 512
"""Tokens of a heat map; beyond, cells are smaller than dots."""


def draw_adjacency(graph: Tensor, path: str | Path, tokens: Sequence[str] = (), title: str = "") -> Path:
    """Draw a sparse (tokens, tokens) graph as a PNG: row i reads column j. Of a longer text, the last 512 tokens.

    Rows that hold nothing but zeros in front of all others were not recorded; they are left out.
    """
    dense = graph.to_dense()
    first = max(0, dense.shape[0] - _MOST_DRAWN)
    dense = dense[first:, first:]
    labels = [visible_piece(token) for token in tokens[first : first + len(dense)]]
    used = dense.abs().sum(1).nonzero()
    row = int(used[0]) if len(used) else 0
    return heat_map_png(
        dense[row:].tolist(),
        path,
        x_labels=labels,
        y_labels=labels[row:],
        title=title,
        axes_names=("read: token j", "reads: token i"),
    )


def visible_piece(token: str) -> str:
    """A token as a label: spaces and line ends are seen."""
    return token.replace("\n", "\\n").replace(" ", "·") or "∅"


def write_graph_page(
    path: str | Path,
    graphs: Mapping[int, tuple[str, Tensor]],
    statistics: Sequence[Mapping[str, Any]],
    parameters: Sequence[GraphParameter],
    tokens: Sequence[str],
) -> Path:
    """Write `path` (HTML) with its pictures beside it.

    Args:
        graphs: layer -> its kind and its sparse (tokens, tokens) graph.
        statistics: of each layer, see `GraphRecorder.statistics`.
        parameters: of the model; none are drawn if there are none.
        tokens: pieces of text, or none.
    """
    path = Path(path).with_suffix(".html")
    names = list(dict.fromkeys(name for row in statistics for name in row))
    body = [
        paragraph(
            "Row i of a graph weighs what token i reads: the edges j -> i from tokens that are not later. Statistics "
            "are over all recorded rows; mass kept is the share of attention that lies on edges."
        ),
        table(
            [[row.get(name, "") for name in names] for row in statistics], [name.replace("_", " ") for name in names]
        ),
    ]
    if parameters:
        plot = plot_graph_parameters(parameters, path.with_name(f"{path.stem}-parameters.png"))
        body += [heading("Parameters by layer"), figure(plot, "Trainable numbers of the graph layers.")]
    for layer, (kind, graph) in graphs.items():
        picture = path.with_name(f"{path.stem}-layer-{layer}.png")
        draw_adjacency(graph, picture, tokens, f"Layer {layer}, {kind}")
        body += [heading(f"Layer {layer}"), figure(picture, f"The graph of layer {layer} ({kind}).")]
        if tokens:
            read = graph.to_dense().abs()
            read.fill_diagonal_(0)
            body.append(paragraph("How much each token is read by later ones:"))
            body.append(token_heat(tokens, read.sum(0)[: len(tokens)].tolist()))
    page("Graphs of a text", "".join(body), path)
    return path
