"""`alpha.png`: what each task's primary score does along α, with 95 % bands.

Knows rows and matplotlib's object interface; no pyplot, so nothing outlives a call. Arms on the line
target + α·v are curves, one for each prompt style; all other arms are marks beside the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import FAINT, LINES, QUIET, grid, label, legend_below, name_panel, panels, reach
from rvdist.report.summary import Row, baseline_of
from rvdist.report.wording import Scale, by_task

_MARKS = [("#CC79A7", "D"), ("#009E73", "P"), ("#E69F00", "X"), ("#56B4E9", "*"), ("#000000", "h")]


def alpha_figure(rows: Sequence[Row], joined: bool = True) -> Figure:
    """A panel for each task with a primary score. Not `joined`: the α's were chosen, and nothing is known of what is
    between them, so no line says so."""
    tasks = by_task(rows)
    figure, grid_of_axes = panels(len(tasks))
    legend: dict[str, Any] = {}
    for axes, (_, group) in zip(grid_of_axes, tasks, strict=True):
        legend |= _panel(axes, group, baseline_of(rows), joined)
    legend_below(figure, legend)
    return figure


def _panel(axes: Any, rows: Sequence[Row], baseline: str | None, joined: bool) -> dict[str, Any]:
    """Draw one task; returns what the legend must explain."""
    scale = Scale(rows)
    factor = scale.factor
    legend: dict[str, Any] = {}

    for row in rows:
        if row.arm == baseline:
            line = axes.axhline(row.value * factor, color=QUIET, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            legend[label(row.arm)] = line

    on_line = [row for row in rows if row.alpha is not None]
    prompts = list(dict.fromkeys(row.prompt for row in on_line))
    for prompt, (color, marker, dashes) in zip(prompts, cycle(LINES[:4]), strict=False):
        curve = sorted((row for row in on_line if row.prompt == prompt), key=lambda row: row.alpha or 0.0)
        x = [row.alpha or 0.0 for row in curve]
        y = [row.value * factor for row in curve]
        low, high = band(curve, factor)
        if len(curve) == 1 or not joined:
            handle, *_ = [_bar(axes, at, row, factor, color, marker) for at, row in zip(x, curve, strict=True)]
        else:
            axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0, zorder=2)
            (handle,) = axes.plot(x, y, color=color, marker=marker, linestyle=dashes, markersize=4.5, zorder=4)
        legend[f"target + α·v, {label(prompt)} prompt"] = handle

    alphas = sorted({row.alpha for row in on_line if row.alpha is not None}) or [0.0]
    others = [row for row in rows if row.alpha is None]
    span = alphas[-1] - alphas[0] or 1.0
    for place, (row, (color, marker)) in enumerate(zip(others, cycle(_MARKS), strict=False)):
        beside = alphas[-1] + span * (0.16 + 0.09 * place)
        legend[label(row.arm)] = _bar(axes, beside, row, factor, color, marker)
    if others and on_line:
        axes.axvline(alphas[-1] + span * 0.08, color=FAINT, linewidth=0.8, zorder=0)

    axes.set_xticks(alphas, minor=True)
    axes.set_xticks(labelled := _label(alphas), [f"{a:g}".replace("-", "−") for a in labelled])
    axes.set_xlim(alphas[0] - 0.06 * span, alphas[-1] + span * (0.06 + bool(others) * (0.06 + 0.09 * len(others))))
    axes.set_xlabel("α")
    name_panel(axes, rows[0], scale)
    grid(axes, "y")
    return legend


def _bar(axes: Any, x: float, row: Row, factor: float, color: str, marker: str) -> Any:
    y = row.value * factor
    ends = reach(y, row.ci_low, row.ci_high, factor)
    return axes.errorbar(x, y, ends, color=color, marker=marker, markersize=6, capsize=3, linewidth=1.2, zorder=4)


def band(rows: Sequence[Row], factor: float) -> tuple[list[float], list[float]]:
    """The lower and the upper ends of scores, times `factor`; a score itself where an end is not known."""
    low = [factor * (row.value if row.ci_low is None else row.ci_low) for row in rows]
    high = [factor * (row.value if row.ci_high is None else row.ci_high) for row in rows]
    return low, high


def _label(alphas: list[float]) -> list[float]:
    """The scored α that get a number: the ends, 0 and 1 first, then whatever does not touch a neighbour."""
    room = 0.14 * (alphas[-1] - alphas[0])
    kept: list[float] = []
    for alpha in (*(a for a in (0.0, 1.0) if a in alphas), alphas[0], alphas[-1], *alphas):
        if all(abs(alpha - other) >= room for other in kept) and alpha not in kept:
            kept.append(alpha)
    return sorted(kept)
