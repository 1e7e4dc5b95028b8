"""Pages and pictures that open anywhere: one HTML file without scripts or links to elsewhere, and PNG plots.

Functions that return HTML escape what they are given; only the `body` of a page is HTML already. matplotlib is
imported when a picture is drawn, and used without its global state, so threads and windows are not disturbed.
"""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .atomic_files import new_file, write_text

_STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.25rem; background: #fcfcfb; color: #22252a;
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e4e4e0; vertical-align: top; }
th { font-weight: 600; color: #5a6069; }
td.number, th.number { text-align: right; }
figure { margin: 1.2rem 0; } img { max-width: 100%; } figcaption { color: #5a6069; font-size: .9rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.85; background: #fff;
          border: 1px solid #e4e4e0; border-radius: 6px; padding: .9rem 1.1rem; }
.tokens span { border-radius: 3px; padding: .12em 0; }
"""

# One light-to-strong hue on white: dark text stays readable on all of it.
_HEAT = (244, 140, 60)
_LINES = ("#2f6db3", "#d9742b", "#3a8f5c", "#a4508b", "#6b7280", "#b59a2a")


def page(title: str, body: str, path: str | Path | None = None) -> str:
    """One whole HTML page; `title` is also its heading, `body` is HTML. Written to `path` as well, if given."""
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    if path is not None:
        write_text(path, text)
    return text


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """A table of plain values; numbers stand to the right, floats with four significant digits."""
    lines = [_row(row, "td") for row in rows]
    head = f"<thead>{_row(header, 'th')}</thead>\n" if header else ""
    return f"<table>\n{head}<tbody>\n{''.join(lines)}</tbody>\n</table>\n"


def _row(cells: Sequence[Any], tag: str) -> str:
    return "<tr>" + "".join(_cell(cell, tag) for cell in cells) + "</tr>\n"


def _cell(cell: Any, tag: str) -> str:
    is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
    text = f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if is_number else str(cell)
    return f"<{tag}{' class=number' if is_number else ''}>{escape(text)}</{tag}>"


def token_heat(tokens: Sequence[str], weights: Sequence[float], scale: float | None = None) -> str:
    """The tokens as running text, each on a ground as strong as its weight; the weight shows under the pointer.

    Args:
        tokens: pieces of text whose concatenation is the text, spaces and line ends included.
        weights: as many, at least 0, such as attention summed over queries.
        scale: the weight that gets the full colour, by default the largest. What is above it gets it too.

    Raises:
        ValueError: the lengths differ, or a weight is negative or not finite.
    """
    if len(tokens) != len(weights):
        raise ValueError(f"`weights` must be as many as `tokens`, got {len(weights)} for {len(tokens)}.")
    if wrong := [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]:
        raise ValueError(f"`weights` must be finite and at least 0, got {wrong[0]}.")
    full = (scale if scale is not None else max(weights, default=0.0)) or 1.0
    spans = (_token(token, weight, min(weight / full, 1.0)) for token, weight in zip(tokens, weights, strict=True))
    return f'<div class="tokens">{"".join(spans)}</div>\n'


def _token(token: str, weight: float, share: float) -> str:
    if share < 0.005:  # below what can be seen, plain text keeps the page of a book small
        return escape(token)
    red, green, blue = _HEAT
    style = f"background:rgba({red},{green},{blue},{share:.2f})"
    return f'<span style="{style}" title="{weight:.3g}">{escape(token)}</span>'


def figure(png: str | Path, caption: str) -> str:
    """A PNG file as part of the page itself, over its caption."""
    data = base64.b64encode(Path(png).read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"


def heat_map_png(
    matrix: Sequence[Sequence[float]],
    path: str | Path,
    x_labels: Sequence[str] = (),
    y_labels: Sequence[str] = (),
    title: str = "",
    axes_names: tuple[str, str] = ("", ""),
    scale_name: str = "",
) -> Path:
    """Draw a matrix as a grid of colours with its scale beside it.

    Args:
        matrix: rows of equal length, or an array (rows, columns).
        path: where the PNG goes.
        x_labels, y_labels: one for each column and row, or none. Of many, evenly spaced ones are written.
        title: a line above.
        axes_names: what columns and rows are.
        scale_name: what the colours measure.

    Raises:
        ValueError: `matrix` is empty or ragged, or labels are not as many as columns or rows.
    """
    widths = {len(row) for row in matrix}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"`matrix` must hold rows of one length above 0, got lengths {sorted(widths)}.")
    (columns,), rows = widths, len(matrix)
    for name, labels, count in (("x_labels", x_labels, columns), ("y_labels", y_labels, rows)):
        if len(labels) not in (0, count):
            raise ValueError(f"`{name}` must be {count} or none, got {len(labels)}.")
    canvas, axes = _canvas(title, axes_names, size=(9.0, min(max(2.4, 1.4 + 0.26 * rows), 9.0)))
    image = axes.imshow(
        matrix, aspect="auto", cmap="OrRd", interpolation="nearest", vmin=0 if _least(matrix) >= 0 else None
    )
    _label(axes, "x", x_labels, at_most=24)
    _label(axes, "y", y_labels, at_most=30)
    axes.tick_params(length=0)
    scale = canvas.colorbar(image, ax=axes, pad=0.02)
    scale.outline.set_visible(False)
    scale.set_label(_plain(scale_name), color="#5a6069")
    return _save(canvas, path)


def line_plot_png(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    title: str = "",
    axes_names: tuple[str, str] = ("", ""),
    logarithmic: bool = False,
) -> Path:
    """Draw lines by name, each a pair (x values, y values); a single point is drawn as a dot.

    Args:
        series: at least one; the legend shows if there are several.
        path: where the PNG goes.
        title: a line above.
        axes_names: what x and y are.
        logarithmic: y grows by factors.

    Raises:
        ValueError: there is no series, or x and y of one differ in length.
    """
    if not series:
        raise ValueError("`series` must hold at least one line, got none.")
    if uneven := [name for name, (x, y) in series.items() if len(x) != len(y)]:
        raise ValueError(f"`series` must pair x and y values of one length; those of {uneven} differ.")
    canvas, axes = _canvas(title, axes_names, size=(8.0, 4.5))
    for index, (name, (x, y)) in enumerate(series.items()):
        dots = "o" if len(x) <= 24 else None
        axes.plot(x, y, label=name, color=_LINES[index % len(_LINES)], linewidth=1.8, marker=dots, markersize=4)
    if logarithmic:
        _plain_log_scale(axes)
    axes.grid(color="#e4e4e0", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _save(canvas, path)


def _canvas(title: str, axes_names: tuple[str, str], size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that belongs to nobody's window, and its axes."""
    try:  # folders that load without graft may lack matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Drawing {title or 'a picture'} needs matplotlib: pip install matplotlib") from error

    drawing = Figure(figsize=size, dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    axes.set_title(_plain(title), loc="left", fontsize=12, color="#22252a")
    axes.set_xlabel(_plain(axes_names[0]), color="#5a6069")
    axes.set_ylabel(_plain(axes_names[1]), color="#5a6069")
    axes.tick_params(which="both", colors="#5a6069", labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9cbc6")
    return drawing, axes


def _label(axes: Any, which: str, labels: Sequence[str], at_most: int) -> None:
    if not labels:
        return
    step = math.ceil(len(labels) / at_most)
    shown = range(0, len(labels), step)
    texts = [_plain(labels[index]) for index in shown]
    if which == "x":
        turned = max(map(len, texts)) > 3
        axes.set_xticks(
            list(shown),
            texts,
            rotation=60 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
    else:
        axes.set_yticks(list(shown), texts)


def _plain_log_scale(axes: Any) -> None:
    """y by factors, with numbers such as 2 and 0.5 beside it, not 2 x 10^0; matplotlib chooses which."""
    axes.set_yscale("log")
    chooser = axes.yaxis.get_minor_formatter()

    def beside(value: float, place: int | None) -> str:
        chooser.set_locs(axes.yaxis.get_minorticklocs())
        return f"{value:g}" if chooser(value, place) else ""

    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(beside)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: no formulas, one line, not endless."""
    line = " ".join(text.split()) if text.strip() else text.replace("\n", "\\n")
    line = line if len(line) <= 80 else line[:79] + "…"
    return line.replace("$", r"\$")


def _least(matrix: Sequence[Sequence[float]]) -> float:
    return min(min(row) for row in matrix)


def _save(drawing: Any, path: str | Path) -> Path:
    with new_file(path) as temporary:
        # No date or version inside: the same figures give the same file.
        drawing.savefig(temporary, format="png", metadata={"Software": None})
    return Path(path)
