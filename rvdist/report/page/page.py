"""`report.html`: one file that needs no network and runs nothing but its own script.

Knows rows, arms, records and the template; computes nothing. Everything that came from a model or a task
reaches the browser either autoescaped or as JSON data that the script shows through textContent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rvdist.report.findings import Anatomy, Findings, Making
from rvdist.report.page.samples import choose_samples
from rvdist.report.paper import INSIDE_NOTE, Line, paper_arms
from rvdist.report.statistics.robustness import Change, Edited
from rvdist.report.statistics.seeds import Spread
from rvdist.report.summary import Row
from rvdist.report.wording import (
    Scale,
    Tested,
    by_task,
    formula,
    mark,
    metric_name,
    p_text,
    printable,
    survives,
    verdict_text,
)

_HERE = Path(__file__).parent
_WIDTH = 120  # of the small picture of an interval, in its own units


def write_page(
    path: Path, findings: Findings, making: Making, pictures: Mapping[str, bytes], anatomy: Anatomy | None = None
) -> None:
    """`pictures` are PNG: `alpha` and `robustness`, those there are."""
    anatomy = anatomy or Anatomy()
    sentence, *details = [*findings.claims, *anatomy.sentences[: not findings.rows], ""]
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"printable": printable, "name": _name, "width": _width}
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    seen = findings.detectable
    samples = choose_samples(findings.records, findings.tasks, [arm.name for arm in findings.arms], findings.baseline)
    html = environment.get_template("page.html.jinja").render(
        title=making.title,
        command=making.command,
        sentence=sentence,
        claims=[text for text in details if text],
        paper=_paper_table(findings.lines) if len(findings.arms) > 1 or findings.lacking else None,
        primary=[_task_table(group, findings.dissent, seen) for _, group in by_task(findings.benchmarks)],
        members=[_task_table(group, findings.dissent, seen) for _, group in by_task(findings.members)],
        others=[_task_table(list(group)) for _, group in groupby(findings.others, _score_of)],
        footnotes=findings.footnotes,
        edited=[
            _edited_table(list(group), findings.scales[task])
            for task, group in groupby(findings.edited, lambda row: row.task)
        ],
        baseline=findings.baseline,
        spreads=[_spread_line(spread, findings.scales[spread.task]) for spread in findings.spreads],
        arms=[
            {
                "name": arm.name,
                "prompt": arm.prompt,
                "formula": formula(arm.point),
                "digest": making.digests[arm.name],
                "json": json.dumps(arm.point.to_json(), indent=2),
            }
            for arm in findings.arms
        ],
        pictures=pictures,
        race=findings.race.table() if findings.race else [],
        anatomy=anatomy,
        versions=making.versions,
        timing=making.timing,
        notes=making.notes,
        data=_json_for_html(samples),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )
    path.write_bytes(html.encode("utf-8", "replace"))  # names may hold lone surrogates


def _score_of(row: Row) -> tuple[str, str, str]:
    return row.task, row.metric, row.filter


def _width(png: bytes) -> int:
    """At how many pixels of the page the letters of a picture, whose header has its own width, are as large as ours."""
    return round(int.from_bytes(png[16:20], "big") * 130 / 200)


def _name(text: str) -> Markup:
    """Where it must be broken, beside an underscore or a plus."""
    return Markup(str(escape(printable(text))).replace("_", "_<wbr>").replace("+", "<wbr>+"))


def _kind(tested: Tested) -> str:
    """A class of the style sheet."""
    kind = {"better": "better", "worse": "worse"}.get(tested.verdict or "", "none")
    return f"{kind} firm" if survives(tested) else kind


def _paper_table(lines: Sequence[Line]) -> dict[str, Any]:
    arms = paper_arms(lines)
    asked = [line for line in lines if line.cells]
    cells = [cell for line in asked for cell in line.cells.values()]
    notes = [INSIDE_NOTE] if any(cell.inside is not None for cell in cells) else []
    return {"arms": arms, "lines": lines, "kind": _kind, "notes": notes}


def _edited_table(rows: Sequence[Edited], scale: Scale) -> dict[str, Any]:
    def change(found: Change | None) -> dict[str, str] | None:
        if found is None:
            return None
        text = scale.change(found.delta, found.ci_low, found.ci_high)
        return {"text": text, "p": p_text(found.p_adjusted), "verdict": verdict_text(found), "kind": _kind(found)}

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


def _spread_line(spread: Spread, scale: Scale) -> dict[str, Any]:
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


def _task_table(
    rows: Sequence[Row],
    dissent: Mapping[tuple[str, str], Sequence[Row]] | None = None,
    detectable: Mapping[tuple[str, str], float] | None = None,
) -> dict[str, Any]:
    """The rows of one score, each followed by those of other filters that `dissent`. `detectable` are the minimal
    detectable effects, by task and arm."""
    first, scale = rows[0], Scale(rows)
    effects = {} if detectable is None else {row.arm: detectable.get((row.task, row.arm)) for row in rows}
    rows = [one for row in rows for one in (row, *(dissent or {}).get((row.task, row.arm), ()))]
    reach = max((abs(end) for row in rows for end in (row.delta_ci_low, row.delta_ci_high) if end), default=1.0)

    def place(x: float) -> float:
        return round(_WIDTH / 2 * (1 + 0.96 * x / reach), 1)

    lines = []
    for row in rows:
        drawn = row.delta is not None and row.delta_ci_low is not None and row.delta_ci_high is not None
        ends = [place(x or 0.0) for x in (row.delta_ci_low, row.delta, row.delta_ci_high)] if drawn else None
        lines.append(
            {
                "arm": row.arm if row.filter == first.filter else f"{row.arm}, by {row.filter}",
                "score": scale.score(row),
                "delta": scale.delta(row),
                "interval": ends,
                "detectable": _effect(effects.get(row.arm), scale) if row.filter == first.filter else "",
                "p": p_text(row.p_value),
                "p_adjusted": p_text(row.p_adjusted),
                "verdict": verdict_text(row),
                "kind": _kind(row),
            }
        )
    metric = metric_name(first.metric, first.filter)
    return {"task": first.task, "metric": metric, "unit": scale.unit, "n": first.n, "rows": lines, "width": _WIDTH}


def _effect(effect: float | None, scale: Scale) -> str:
    return "" if effect is None else scale.number(effect)


def _json_for_html(data: object) -> Markup:
    """JSON that cannot end its script element: ASCII, and neither <, > nor & in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
