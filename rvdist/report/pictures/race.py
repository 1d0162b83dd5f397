"""The race on the page: every candidate's running mean and its interval, when it was dropped, and why.

Knows what the race was told, as numbers; computes intervals for the eye alone (Wilson's, of the documents seen). What
drops a candidate is the evidence of its opponents, which is said in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from rvdist.report.pictures.drawing import FAINT, QUIET, SERIES, empty, grid, label, legend_below, reach, title
from rvdist.report.statistics.intervals import wilson

BEST, TIED, DROPPED = "the best", "not told apart from it", "dropped"


@dataclass(frozen=True)
class Runner:
    """A candidate: its `alpha` if it is on the line, after each of its rounds how many documents it had seen and its
    mean score on them, its `fate` (BEST, TIED or DROPPED), and why it is that, in words."""

    name: str
    alpha: float | None
    rounds: Sequence[tuple[int, float]]
    fate: str
    why: str = ""

    @property
    def seen(self) -> int:
        """Documents that it has been asked."""
        return self.rounds[-1][0]

    @property
    def mean(self) -> float:
        """Its mean score on these."""
        return self.rounds[-1][1]

    def interval(self, place: int = -1) -> tuple[float, float]:
        """Of the mean after a round, in which a score counts as the share of a right answer that it is."""
        seen, mean = self.rounds[place]
        return wilson(mean, seen)


def rank(runners: Sequence[Runner]) -> list[Runner]:
    """Those with a score, the best first, then whoever lasted longest."""
    order = (BEST, TIED, DROPPED)
    ran = [runner for runner in runners if runner.rounds]
    return sorted(ran, key=lambda runner: (order.index(runner.fate), -runner.seen, -runner.mean))


def race_table(runners: Sequence[Runner]) -> list[tuple[str, str, str, str]]:
    """Candidate, mean score with its interval in percent, documents seen, and what became of it."""
    rows = []
    for runner in rank(runners):
        low, high = runner.interval()
        score = f"{100 * runner.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append((runner.name, score, f"{runner.seen:,}", f"{runner.fate} {runner.why}".strip()))
    return rows


def race_figure(runners: Sequence[Runner]) -> Figure | None:
    """On the left the running means, each with its band until it was dropped; on the right, where candidates lie along
    α, the last of them. No line joins what was not measured."""
    ran = rank(runners)
    if not ran:
        return None
    along = [runner for runner in ran if runner.alpha is not None]
    figure = empty(9.6 if len(along) > 1 else 6.4, 4.2)
    axes = figure.add_subplot(1, 2 if len(along) > 1 else 1, 1)
    shown = {runner.name: style for runner, style in zip(ran, SERIES, strict=False)}  # as many as can be told apart
    legend: dict[str, Any] = {}
    for runner in reversed(ran):  # the best on top
        color, marker = shown.get(runner.name, (QUIET, "o"))
        x = [seen for seen, _ in runner.rounds]
        y = [100 * mean for _, mean in runner.rounds]
        ends = [runner.interval(place) for place in range(len(x))]
        named = runner.name in shown
        low, high = ([100 * end[side] for end in ends] for side in (0, 1))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.14 if named else 0.05, linewidth=0, zorder=1)
        else:
            axes.errorbar(x, y, reach(y[0], low[0], high[0], 1), color=color, capsize=2, linewidth=0.8, zorder=1)
        (line,) = axes.plot(
            x, y, color=color, marker=marker, markersize=4 if named else 2.5, linewidth=1.3 if named else 0.8, zorder=3
        )
        if runner.fate == DROPPED:
            axes.plot(x[-1:], y[-1:], color=color, marker="x", markersize=8, markeredgewidth=1.6, zorder=4)
        legend[label(runner.name) if named else "others"] = line
    axes.set_xlim(0, 1.03 * max(runner.seen for runner in ran))
    axes.set_xlabel("documents seen")
    axes.set_ylabel("mean score so far, %")
    title(axes, "The race", "✕ dropped")
    grid(axes, "y")
    if len(along) > 1:
        _along_alpha(figure.add_subplot(1, 2, 2), along, shown)
    legend_below(figure, {name: legend[name] for name in sorted(legend, key=lambda name: _place(name, ran))})
    return figure


def _place(name: str, ran: Sequence[Runner]) -> int:
    return next((place for place, runner in enumerate(ran) if label(runner.name) == name), len(ran))


def _along_alpha(axes: Any, along: Sequence[Runner], shown: dict[str, tuple[str, str]]) -> None:
    for runner in along:
        color, marker = shown.get(runner.name, (QUIET, "o"))
        y = 100 * runner.mean
        axes.errorbar(
            runner.alpha, y, reach(y, *runner.interval(), 100),
            color=color, marker="x" if runner.fate == DROPPED else marker, markersize=6, capsize=3, linewidth=1.1,
        )  # fmt: skip
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_xlabel("α")
    axes.set_ylabel("mean score when last asked, %")
    title(axes, "Along α", "each from the documents it saw")
    grid(axes, "y")
