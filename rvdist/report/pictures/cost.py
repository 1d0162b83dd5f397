"""`cost.png`: what each benchmark's score costs in tokens, arm by arm, both with their 95 % intervals.

Knows rows and matplotlib's object interface; computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import SERIES, columns_for, empty, grid, label, legend_below, title
from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task, metric_name

_MOST = 24  # arms that a legend can tell apart


def cost_figure(rows: Sequence[Row]) -> Figure | None:
    """A panel for each benchmark of which it is known how long answers are; None where there is none."""
    shown = [(task, [row for row in group if row.tokens is not None]) for task, group in by_task(rows)]
    shown = [(task, group) for task, group in shown if group]
    if not shown:
        return None
    arms = list(dict.fromkeys(row.arm for _, group in shown for row in group))[:_MOST]
    styles = dict(zip(arms, cycle(SERIES), strict=False))
    columns = columns_for(len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = empty(6.4, 4.0) if len(shown) == 1 else empty(3.6 * columns + 0.4, 2.9 * lines + 0.5)
    legend: dict[str, Any] = {}
    for place, (task, group) in enumerate(shown):
        axes = figure.add_subplot(lines, columns, place + 1)
        scale = Scale(group)
        for row in [row for row in group if row.arm in styles]:
            color, marker = styles[row.arm]
            x, y = row.tokens or 0.0, row.value * scale.factor
            legend[label(row.arm)] = axes.errorbar(
                [x], [y],
                xerr=_reach(x, row.tokens_ci_low, row.tokens_ci_high, 1),
                yerr=_reach(y, row.ci_low, row.ci_high, scale.factor),
                color=color, marker=marker, markersize=5, capsize=2, linewidth=1.1, zorder=4,
            )  # fmt: skip
        axes.set_xlabel("tokens an answer")
        axes.set_ylabel(
            label(metric_name(group[0].metric, group[0].filter)) + (f", {scale.unit}" if scale.unit else "")
        )
        title(axes, task, f"{group[0].n} documents")
        grid(axes, "both")
    legend_below(figure, legend)
    return figure


def _reach(at: float, low: float | None, high: float | None, factor: float) -> list[list[float]]:
    return [[0.0 if low is None else at - factor * low], [0.0 if high is None else factor * high - at]]
