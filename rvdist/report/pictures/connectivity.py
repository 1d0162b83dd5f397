"""The picture of linear mode connectivity: what a text costs along straight lines between models. Computes nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LINES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--")]
_LABELS = {"donors": "from minus to plus", "target": "from the target along the vector"}


def connectivity_plot(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """PNG. `lines`: a name, shares of the way from 0 to 1, and bits a byte at each; beside it the straight line between
    its ends, above which a barrier would rise."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2, 3.2), dpi=200, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (name, shares, bits), (colour, marker, dashes) in zip(lines, _LINES, strict=False):
            axes.plot(shares, bits, color=colour, marker=marker, linestyle=dashes, label=_LABELS[name])
            axes.plot([0, 1], [bits[0], bits[-1]], color=colour, linewidth=0.7, linestyle=":")
        axes.set_xlabel("share of the way")
        axes.set_ylabel("bits a byte of the text")
        axes.legend(frameon=False)
        out = io.BytesIO()
        canvas.print_png(out)
        return out.getvalue()
