"""Several models as one page: a table of targets × α × benchmarks, and the curve of each target.

Knows rows and the template; computes nothing, and tests no model against another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from rvdist.report.claims import headline
from rvdist.report.page.page import write_html
from rvdist.report.page.tables import kind_of
from rvdist.report.pictures.alpha import band
from rvdist.report.pictures.drawing import SERIES, grid, label, legend_below, panels, render, title
from rvdist.report.summary import Row
from rvdist.report.wording import Scale, by_task, verdict_text


@dataclass(frozen=True)
class Model:
    """One job of several: what it is called, the rows of its main table, and where its own reports are, from the page's
    directory on."""

    name: str
    rows: Sequence[Row]
    reports: tuple[str, ...] = ()

    def join(self, other: Model) -> Model:
        """With the rows of another that this has not, such as those of another α, by the order of α."""
        known = {(row.arm, row.task) for row in self.rows}
        new = [row for row in other.rows if (row.arm, row.task) not in known]
        tasks = list(dict.fromkeys(row.task for row in [*self.rows, *new]))
        rows = sorted(
            [*self.rows, *new], key=lambda row: (tasks.index(row.task), row.delta is not None, row.alpha or 0.0)
        )
        return replace(self, rows=rows, reports=tuple(dict.fromkeys([*self.reports, *other.reports])))


def write_models(path: Path, name: str, models: Sequence[Model]) -> None:
    """The page of all of them."""
    tasks = list(dict.fromkeys(row.task for model in models for row in model.rows))
    scales = {task: Scale([row for model in models for row in model.rows if row.task == task]) for task in tasks}
    picture = render(lambda: models_figure(models, scales), "png")
    write_html(
        path,
        "models.html.jinja",
        title=name,
        sentences=[f"{model.name}: {said}" for model in models if (said := headline(model.rows))],
        tasks=tasks,
        models=[
            {
                "name": model.name,
                "reports": [(report, quote(report, errors="replace")) for report in model.reports],
                "lines": _lines(model, tasks, scales),
            }
            for model in models
        ],
        picture=picture[0] if picture else None,
    )


def _lines(model: Model, tasks: Sequence[str], scales: dict[str, Scale]) -> list[dict[str, Any]]:
    own = {(row.arm, row.task): row for row in model.rows}
    return [
        {"arm": arm, "cells": [_cell(own.get((arm, task)), scales[task]) for task in tasks]}
        for arm in dict.fromkeys(row.arm for row in model.rows)
    ]


def _cell(row: Row | None, scale: Scale) -> dict[str, str]:
    if row is None:
        return {"kind": "", "score": "", "change": "", "verdict": ""}
    verdict = "" if row.delta is None else verdict_text(row)
    return {"kind": kind_of(row), "score": scale.score(row), "change": scale.delta(row), "verdict": verdict}


def models_figure(models: Sequence[Model], scales: dict[str, Scale]) -> Figure | None:
    """A panel for each benchmark, a curve for each model of which more than one α was scored; None without any."""
    shown: dict[str, list[tuple[str, list[Row]]]] = {}
    for model in models:
        for task, group in by_task(model.rows):
            curve = sorted(
                (row for row in group if row.alpha is not None and row.prompt == group[0].prompt),
                key=lambda row: row.alpha or 0.0,
            )
            if len({row.alpha for row in curve}) > 1:
                shown.setdefault(task, []).append((model.name, curve))
    if not shown:
        return None
    figure, grid_of_axes = panels(len(shown))
    styles = dict(zip([model.name for model in models], cycle(SERIES), strict=False))
    legend: dict[str, Any] = {}
    for axes, (task, curves) in zip(grid_of_axes, shown.items(), strict=True):
        factor = scales[task].factor
        for name, curve in curves:
            color, marker = styles[name]
            x = [row.alpha or 0.0 for row in curve]
            axes.fill_between(x, *band(curve, factor), color=color, alpha=0.12, linewidth=0)
            y = [factor * row.value for row in curve]
            (legend[label(name)],) = axes.plot(x, y, color=color, marker=marker, markersize=4)
        axes.set_xlabel("α")
        axes.set_ylabel(label(scales[task].unit))
        title(axes, task)
        grid(axes, "y")
    legend_below(figure, legend)
    return figure
