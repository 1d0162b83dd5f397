"""Pictures of differences with their intervals: `changes` for the paper's table, `robustness` for edited questions.

Knows lines, rows and matplotlib's object interface; computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.paper import Line, paper_arms
from rvdist.report.pictures.drawing import QUIET, SERIES, columns_for, empty, grid, label, legend_below, reach, title
from rvdist.report.statistics.robustness import Change, Edited
from rvdist.report.wording import Scale

Ends = tuple[float, float | None, float | None]  # a difference, and its interval


def changes_figure(lines: Sequence[Line]) -> Figure | None:
    """Each arm's change on each benchmark, and the reported one beside it; None where nothing was compared."""
    shown = [line for line in lines if any(cell.row.delta is not None for cell in line.cells.values())]
    if not shown:
        return None
    styles = dict(zip(paper_arms(shown), cycle(SERIES), strict=False))
    arms = [arm for arm in styles if any(line.cells[arm].row.delta is not None for line in shown)]
    columns = columns_for(len(shown))
    height = 0.8 + 0.26 * len(arms)
    figure = empty(2.6 * columns + 1.6, height * math.ceil(len(shown) / columns) + 0.5)
    legend: dict[str, Any] = {}
    for i, line in enumerate(shown):
        axes = figure.add_subplot(math.ceil(len(shown) / columns), columns, i + 1)
        for place, arm in enumerate(arms):
            cell = line.cells[arm]
            row, factor = cell.row, cell.scale.factor
            if row.delta is not None:
                _interval(axes, place, (row.delta, row.delta_ci_low, row.delta_ci_high), factor, styles[arm])
            if cell.reported is not None:
                (legend["reported"],) = axes.plot(
                    cell.reported, place, "D", color=QUIET, markerfacecolor="white", markersize=6, zorder=5
                )
        _finish(axes, [label(arm) for arm in arms] if i % columns == 0 else [""] * len(arms))
        axes.set_xlabel("change, points" if line.unit else f"change, {label(line.metric)}")
        title(axes, line.task, f"{line.n}")
    legend_below(figure, legend)
    return figure


def robustness_figure(rows: Sequence[Edited], scales: Mapping[str, Scale]) -> Figure:
    """For each task and edit: what editing the questions did to each arm, and each arm's gain before and after.
    `scales` are the tasks'."""
    tasks = [(task, list(group)) for task, group in groupby(rows, lambda row: row.task)]
    arms = list(dict.fromkeys(row.arm for row in rows))
    gaining = [arm for arm in arms if any(row.arm == arm and row.gain for row in rows)]
    styles = dict(zip(arms, cycle(SERIES), strict=False))
    edits = {task: list(dict.fromkeys(row.edit for row in group)) for task, group in tasks}
    heights = [0.9 + (0.14 * len(arms) + 0.14) * (1 + len(edits[task])) for task, _ in tasks]
    figure = empty(4.2 if not gaining else 7.4, sum(heights) + 0.4)
    parts = figure.add_gridspec(len(tasks), 1 + bool(gaining), height_ratios=heights)
    legend: dict[str, Any] = {}
    for line, (task, group) in enumerate(tasks):
        factor, unit = scales[task].factor, f", {scales[task].step}".removesuffix(", ")
        names = edits[task]
        axes = figure.add_subplot(parts[line, 0])
        for row in group:
            legend[label(row.arm)] = _beside(axes, names.index(row.edit), row.arm, arms, row.change, factor, styles)
        _finish(axes, [label(name) for name in names])
        axes.set_xlabel(f"edited − as asked{unit}")
        title(axes, f"{task}, edited")
        if gaining:
            axes = figure.add_subplot(parts[line, 1])
            for row in group:
                if row.gain and row.gain_original:
                    _beside(axes, 1 + names.index(row.edit), row.arm, gaining, row.gain, factor, styles)
                    if row.edit == names[0]:
                        _beside(axes, 0, row.arm, gaining, row.gain_original, factor, styles)
            _finish(axes, ["as asked", *map(label, names)])
            axes.axhline(0.5, color=QUIET, linewidth=0.6, linestyle=(0, (1, 2)))
            axes.set_xlabel(f"difference{unit}")
            title(axes, "against the baseline")
    legend_below(figure, legend)
    return figure


def _beside(
    axes: Any, place: int, arm: str, arms: Sequence[str], change: Change, factor: float, styles: Mapping[str, Any]
) -> Any:
    """The interval of one of several arms that share a place."""
    y = place + 0.7 * ((arms.index(arm) + 0.5) / len(arms) - 0.5)
    return _interval(axes, y, (change.delta, change.ci_low, change.ci_high), factor, styles[arm])


def _interval(axes: Any, y: float, change: Ends, factor: float, style: tuple[str, str]) -> Any:
    color, marker = style
    delta, low, high = change
    x = factor * delta
    ends = reach(x, low, high, factor)
    return axes.errorbar(
        x, y, xerr=ends, color=color, marker=marker, markersize=5, capsize=2.5, linewidth=1.2, linestyle="", zorder=4
    )


def _finish(axes: Any, names: Sequence[str]) -> None:
    axes.axvline(0, color=QUIET, linewidth=0.9, zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    grid(axes, "x")
