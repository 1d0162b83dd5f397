"""`alpha.png`: what each task's primary score does along α, with 95 % bands.

Knows rows and matplotlib's object interface; no pyplot, so nothing outlives a call. Arms on the line
target + α·v are curves, one for each prompt style; all other arms are marks beside the axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import FAINT, QUIET, columns_for, empty, grid, label, legend_below, title
from rvdist.report.summary import Row, baseline_of
from rvdist.report.wording import Scale, by_task, metric_name

# Okabe and Ito's palette, told apart without colour by shape and dashes too.
_CURVES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "v", ":")]
_MARKS = [("#CC79A7", "D"), ("#009E73", "P"), ("#E69F00", "X"), ("#56B4E9", "*"), ("#000000", "h")]


def alpha_figure(rows: Sequence[Row], joined: bool = True) -> Figure:
    """A panel for each task with a primary score. Not `joined`: the α's were chosen, and nothing is known of what is
    between them, so no line says so."""
    tasks = by_task(rows)
    columns = columns_for(len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = empty(6.4, 4.0) if len(tasks) == 1 else empty(3.6 * columns + 0.4, 2.9 * lines + 0.5)
    legend: dict[str, Any] = {}
    for i, (task, group) in enumerate(tasks):
        axes = figure.add_subplot(lines, columns, i + 1)
        legend |= _panel(axes, task, group, baseline_of(rows), joined)
    legend_below(figure, legend)
    return figure


def _panel(axes: Any, task: str, rows: Sequence[Row], baseline: str | None, joined: bool) -> dict[str, Any]:
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
    for prompt, (color, marker, dashes) in zip(prompts, cycle(_CURVES), strict=False):
        curve = sorted((row for row in on_line if row.prompt == prompt), key=lambda row: row.alpha or 0.0)
        x = [row.alpha or 0.0 for row in curve]
        y = [row.value * factor for row in curve]
        low, high = _ends(curve, factor)
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
    axes.set_ylabel(label(metric_name(rows[0].metric, rows[0].filter)) + (f", {scale.unit}" if scale.unit else ""))
    title(axes, task, f"{rows[0].n} documents")
    grid(axes, "y")
    return legend


def _bar(axes: Any, x: float, row: Row, factor: float, color: str, marker: str) -> Any:
    (low,), (high,) = _ends([row], factor)
    y = row.value * factor
    return axes.errorbar(
        x, y, [[y - low], [high - y]], color=color, marker=marker, markersize=6, capsize=3, linewidth=1.2, zorder=4
    )


def _ends(rows: Sequence[Row], factor: float) -> tuple[list[float], list[float]]:
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
