"""Rows as what the page's template shows of them: numbers in words, classes of the style sheet, places in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rvdist.report.paper import Cell
from rvdist.report.statistics.robustness import Change, Edited
from rvdist.report.statistics.seeds import Spread
from rvdist.report.summary import Row
from rvdist.report.wording import (
    Scale,
    Tested,
    mark,
    metric_name,
    p_text,
    survives,
    verdict_text,
)

_WIDTH = 120  # of the small picture of an interval, in its own units


def kind_of(tested: Tested) -> str:
    """A class of the style sheet."""
    kind = {"better": "better", "worse": "worse"}.get(tested.verdict or "", "none")
    return f"{kind} firm" if survives(tested) else kind


def edited_table(rows: Sequence[Edited], scale: Scale) -> dict[str, Any]:
    """A task's edited questions as the template shows them."""

    def change(one: Change | None) -> dict[str, str] | None:
        if one is None:
            return None
        text = scale.change(one.delta, one.ci_low, one.ci_high)
        return {"text": text, "p": p_text(one.p_adjusted), "verdict": verdict_text(one), "kind": kind_of(one)}

    def line(row: Edited, value: float, gain: Change | None, own: bool) -> dict[str, Any]:
        return {
            "arm": row.arm,
            "value": scale.number(value),
            "change": change(row.change if own else None),
            "gain": change(gain),
            "kept": change(row.gain_change if own else None),
            "persistence": (row.persistence or "") if own else "",
            "persistence_p": p_text(row.persistence_p) if own else "",
        }

    edits = [
        {"name": edit, "n": group[0].n, "rows": [line(row, row.value, row.gain, True) for row in group]}
        for edit, group in ((edit, list(group)) for edit, group in groupby(rows, lambda row: row.edit))
    ]
    first = rows[0]
    marked = any(mark(found) for row in rows for found in (row.change, row.gain, row.gain_original) if found)
    asked = [line(row, row.original, row.gain_original, False) for row in rows if row.edit == first.edit]
    return {
        "task": first.task,
        "metric": first.metric,
        "unit": scale.unit,
        "edits": [{"name": "as asked", "n": first.n, "rows": asked}, *edits],
        "marked": marked,
    }


def spread_line(spread: Spread, scale: Scale) -> dict[str, Any]:
    """A task's spread between seeds as the template shows it."""

    def interval(sd: float) -> str:
        return f"{scale.number(sd)} [{scale.number(spread.sd_low)}, {scale.number(spread.sd_high)}]"

    return {
        "task": spread.task,
        "arm": spread.arm,
        "seeds": ", ".join(map(str, spread.seeds)),
        "values": ", ".join(map(scale.number, spread.values)),
        "sd": interval(spread.sd),
        "deltas": ", ".join(scale.number(delta, sign=True) for delta in spread.deltas or ()),
        "delta_sd": "" if spread.delta_sd is None else scale.number(spread.delta_sd),
        "unit": scale.unit,
    }


def task_table(
    rows: Sequence[Row],
    dissent: Mapping[tuple[str, str], Sequence[Row]] | None = None,
    detectable: Mapping[tuple[str, str], float] | None = None,
    cells: Mapping[tuple[str, str], Cell] | None = None,
) -> dict[str, Any]:
    """The rows of one score, each followed by those of other filters that `dissent`. `detectable` are the minimal
    detectable effects and `cells` what was reported, by task and arm."""
    first, scale = rows[0], Scale(rows)
    rows = [one for row in rows for one in (row, *(dissent or {}).get((row.task, row.arm), ()))]
    reach = max((abs(end) for row in rows for end in (row.delta_ci_low, row.delta_ci_high) if end), default=1.0)

    def place(x: float) -> float:
        return round(_WIDTH / 2 * (1 + 0.96 * x / reach), 1)

    lines = []
    for row in rows:
        places = [place(x) for x in (row.delta_ci_low, row.delta, row.delta_ci_high) if x is not None]
        own = row.filter == first.filter
        effect = (detectable or {}).get((row.task, row.arm)) if own else None
        lines.append(
            {
                "arm": row.arm if own else f"{row.arm}, by {row.filter}",
                "score": scale.score(row),
                "delta": scale.delta(row),
                "interval": places if len(places) == 3 else None,
                "detectable": "" if effect is None else scale.number(effect),
                "p_adjusted": p_text(row.p_adjusted),
                "verdict": verdict_text(row),
                "kind": kind_of(row),
                "reported": cells[row.task, row.arm].comparison if cells and own else "",
                "answers": _answers(row, scale),
            }
        )
    metric = metric_name(first.metric, first.filter)
    return {"task": first.task, "metric": metric, "unit": scale.unit, "n": first.n, "rows": lines, "width": _WIDTH}


def _answers(row: Row, scale: Scale) -> str:
    """What a row's answers cost, in words; empty where nobody wrote it down."""
    said = []
    if row.tokens is not None:
        said.append(f"{row.tokens:.1f}{_ends(row.tokens_ci_low, row.tokens_ci_high)} tokens")
    if row.cut is not None:
        said.append(f"{100 * row.cut:.1f}{_ends(row.cut_ci_low, row.cut_ci_high, 100)} % cut")
    if row.in_format is not None:
        own = "" if row.value_in_format is None else f", which score {scale.number(row.value_in_format)}"
        ends = _ends(row.in_format_ci_low, row.in_format_ci_high, 100)
        said.append(f"{100 * row.in_format:.1f}{ends} % in format{own}")
    return "; ".join(said)


def _ends(low: float | None, high: float | None, factor: float = 1.0) -> str:
    """An interval behind its number; empty where nothing is known of it."""
    return f" [{factor * low:.1f}, {factor * high:.1f}]" if low is not None and high is not None else ""
