"""How pictures look and become files: one style, one palette, PNG for pages and PDF for papers.

Knows matplotlib's object interface; no pyplot, so nothing outlives a call.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rvdist.report.summary import Row
from rvdist.report.wording import Scale, metric_name, printable

INK, QUIET, FAINT = "#222222", "#6b7280", "#e5e7eb"
# Okabe and Ito's palette, told apart without colour by shape and dashes too.
LINES = [
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "v", ":"),
    ("#E69F00", "D", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-."), ("#8C6D31", "*", ":"),
    ("#7F7F7F", "h", "-"), ("#6A51A3", "<", "--"),
]  # fmt: skip
SERIES = [(color, marker) for color, marker, _ in LINES[:8]]  # without dashes, fewer can be told apart
STYLE = {
    "text.parse_math": False,  # names may contain dollar signs
    "pdf.fonttype": 42,  # text stays text, which publishers ask for
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def render(draw: Callable[[], Figure | None], *formats: str) -> list[bytes]:
    """The figure as `png` or `pdf`, without a date, so that the same numbers are the same bytes; nothing if there is
    no figure."""
    files = []
    with rc_context(STYLE):
        figure = draw()
        for format_ in formats if figure else ():
            file = io.BytesIO()
            if format_ == "pdf":
                FigureCanvasPdf(figure).print_pdf(file, metadata={"CreationDate": None})
            else:
                FigureCanvasAgg(figure).print_png(file)
            files.append(file.getvalue())
    return files


def empty(width: float, height: float) -> Figure:
    """A figure of so many inches, whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.04)
    return Figure(figsize=(width, height), dpi=200, layout=layout)


def columns_for(panels: int) -> int:
    """How many of so many panels stand side by side."""
    return 2 if panels == 4 else min(panels, 3)


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure and its axes, one for each benchmark; a single one is larger."""
    columns = columns_for(count)
    rows = math.ceil(count / columns)
    figure = empty(6.4, 4.0) if count == 1 else empty(3.6 * columns + 0.4, 2.9 * rows + 0.5)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def name_panel(axes: Any, row: Row, scale: Scale) -> None:
    """The benchmark and the number of its documents above, the score beside the axes."""
    axes.set_ylabel(label(metric_name(row.metric, row.filter)) + (f", {scale.unit}" if scale.unit else ""))
    title(axes, row.task, f"{row.n} documents")


def legend_below(figure: Figure, entries: Mapping[str, Any]) -> None:
    """A legend below all axes, in as many columns as fit."""
    if entries:
        inches_each = 0.08 * (max(map(len, entries)) + 7)
        columns = max(1, min(len(entries), int(figure.get_figwidth() / inches_each)))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def title(axes: Any, left: str, right: str = "") -> None:
    """A title on the left of the axes, and something quiet on the right."""
    axes.set_title(label(left), loc="left", fontsize=10, fontweight="bold")
    axes.set_title(label(right), loc="right", fontsize=8, color=QUIET)


def reach(at: float, low: float | None, high: float | None, factor: float) -> list[list[float]]:
    """What matplotlib calls an error: how far the interval from `low` to `high`, times `factor`, goes from `at`; not at
    all to an end that is None."""
    return [[0.0 if low is None else at - factor * low], [0.0 if high is None else factor * high - at]]


def grid(axes: Any, along: str) -> None:
    """Faint lines behind what is drawn, across the axis `along`."""
    axes.grid(axis=along, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def label(text: str) -> str:
    """As matplotlib may show it: in one line, not too long, and never hidden."""
    text = printable(text)
    if len(text) > 40:
        text = text[:39] + "…"
    return f" {text}" if text.startswith("_") else text  # matplotlib hides legend entries that start with _
