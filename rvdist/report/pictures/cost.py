"""`cost.png`: what each benchmark's score costs in tokens, arm by arm, both with their 95 % intervals.

Knows rows and matplotlib's object interface; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import SERIES, grid, label, legend_below, name_panel, panels, reach
from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task

_MOST = 24  # arms that a legend can tell apart


def cost_figure(rows: Sequence[Row]) -> Figure | None:
    """A panel for each benchmark of which it is known how long answers are; None where there is none."""
    shown = by_task(row for row in rows if row.tokens is not None)
    if not shown:
        return None
    arms = list(dict.fromkeys(row.arm for _, group in shown for row in group))[:_MOST]
    styles = dict(zip(arms, cycle(SERIES), strict=False))
    figure, grid_of_axes = panels(len(shown))
    legend: dict[str, Any] = {}
    for axes, (_, group) in zip(grid_of_axes, shown, strict=True):
        scale = Scale(group)
        for row in [row for row in group if row.arm in styles]:
            color, marker = styles[row.arm]
            x, y = row.tokens or 0.0, row.value * scale.factor
            legend[label(row.arm)] = axes.errorbar(
                [x], [y],
                xerr=reach(x, row.tokens_ci_low, row.tokens_ci_high, 1),
                yerr=reach(y, row.ci_low, row.ci_high, scale.factor),
                color=color, marker=marker, markersize=5, capsize=2, linewidth=1.1, zorder=4,
            )  # fmt: skip
        axes.set_xlabel("tokens an answer")
        name_panel(axes, group[0], scale)
        grid(axes, "both")
    legend_below(figure, legend)
    return figure
