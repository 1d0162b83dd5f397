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
from markupsafe import Markup

from rvdist.point import Arm
from rvdist.record import Record, TaskInfo
from rvdist.report.samples import choose_samples
from rvdist.report.statistics import detectable_effects
from rvdist.report.summary import Row, baseline_of
from rvdist.report.wording import Scale, by_task, claims, footnotes, formula, p_text, printable, survives, verdict_text

_HERE = Path(__file__).parent
_WIDTH = 120  # of the small picture of an interval, in its own units


def write_page(
    path: Path,
    *,
    title: str,
    command: str,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    digests: Mapping[str, str],
    records: Sequence[Record],
    tasks: Sequence[TaskInfo],
    plot_png: bytes,
    versions: Mapping[str, str],
    timing: Mapping[str, float],
    notes: Sequence[str],
) -> None:
    """`digests` maps arm names to point digests; `timing` phases to seconds."""
    baseline = baseline_of(rows)
    sentence, *details = claims(rows)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    html = environment.get_template("page.html.jinja").render(
        title=title,
        command=command,
        sentence=sentence,
        claims=details,
        primary=[_task_table(group) for _, group in by_task(rows)],
        others=[_task_table(list(group)) for score, group in groupby(rows, _score_of) if not score[0]],
        footnotes=footnotes(rows, detectable_effects(records, tasks, baseline) if baseline else {}),
        arms=[
            {
                "name": arm.name,
                "prompt": arm.prompt,
                "formula": formula(arm.point),
                "digest": digests[arm.name],
                "json": json.dumps(arm.point.to_json(), indent=2),
            }
            for arm in arms
        ],
        plot=base64.b64encode(plot_png).decode(),
        versions=versions,
        timing=timing,
        notes=notes,
        data=_json_for_html(choose_samples(records, tasks, [arm.name for arm in arms], baseline)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )
    path.write_bytes(html.encode("utf-8", "replace"))  # names may hold lone surrogates


def _score_of(row: Row) -> tuple[bool, str, str, str]:
    return row.primary, row.task, row.metric, row.filter


def _task_table(rows: Sequence[Row]) -> dict[str, Any]:
    scale = Scale(rows)
    reach = max((abs(end) for row in rows for end in (row.delta_ci_low, row.delta_ci_high) if end), default=1.0)

    def place(x: float) -> float:
        return round(_WIDTH / 2 * (1 + 0.96 * x / reach), 1)

    lines = []
    for row in rows:
        drawn = row.delta is not None and row.delta_ci_low is not None and row.delta_ci_high is not None
        ends = [place(x or 0.0) for x in (row.delta_ci_low, row.delta, row.delta_ci_high)] if drawn else None
        lines.append(
            {
                "arm": row.arm,
                "score": scale.score(row),
                "delta": scale.delta(row),
                "interval": ends,
                "p": p_text(row.p_value),
                "p_adjusted": p_text(row.p_adjusted),
                "verdict": verdict_text(row),
                "kind": {"better": "better", "worse": "worse"}.get(row.verdict or "", "none"),
                "firm": survives(row),
            }
        )
    first = rows[0]
    metric = f"{first.metric} ({first.filter})" if first.filter != "none" else first.metric
    return {"task": first.task, "metric": metric, "unit": scale.unit, "n": first.n, "rows": lines, "width": _WIDTH}


def _json_for_html(data: object) -> Markup:
    """JSON that cannot end its script element: ASCII, and neither <, > nor & in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
