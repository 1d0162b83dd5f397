"""The picture of linear mode connectivity: what a text costs along straight lines between models. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import LINES, empty, render

_LABELS = {
    "donors": "from minus to plus",
    "target": "from the target along the vector",
    "vectors": "from the target along the vectors together",
}


def connectivity_plot(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> bytes:
    """PNG. `lines`: a name, shares of the way from 0 to 1, and bits a byte at each; beside it the straight line between
    its ends, above which a barrier would rise."""

    def draw() -> Figure:
        figure = empty(5.2, 3.2)
        axes = figure.add_subplot()
        for (name, shares, bits), (color, marker, dashes) in zip(lines, LINES, strict=False):
            axes.plot(shares, bits, color=color, marker=marker, linestyle=dashes, label=_LABELS[name])
            axes.plot([0, 1], [bits[0], bits[-1]], color=color, linewidth=0.7, linestyle=":")
        axes.set_xlabel("share of the way")
        axes.set_ylabel("bits a byte of the text")
        axes.legend(frameon=False)
        return figure

    (png,) = render(draw, "png")
    return png
