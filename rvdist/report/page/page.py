"""`report.html`: one file that needs no network and runs nothing but its own script.

Knows rows, arms, records and the template; computes nothing. Everything that came from a model or a task
reaches the browser either autoescaped or as JSON data that the script shows through textContent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rvdist.core.text import cut
from rvdist.report.claims import headline
from rvdist.report.findings import Anatomy, Findings, Making
from rvdist.report.page.samples import choose_samples
from rvdist.report.page.tables import edited_table, spread_line, task_table
from rvdist.report.paper import INSIDE_NOTE
from rvdist.report.pictures.race import race_table
from rvdist.report.summary import Row
from rvdist.report.wording import by_task, formula, printable

_HERE = Path(__file__).parent
_LONGEST = 100_000  # characters of a text


def write_page(
    path: Path, findings: Findings, making: Making, pictures: Mapping[str, bytes], anatomy: Anatomy | None = None
) -> None:
    """Writes the page of a run. `pictures` are PNG: `alpha`, `cost`, `race` and `robustness`, those there are."""
    anatomy = anatomy or Anatomy()
    first = [headline(findings.benchmarks)] if findings.rows else []
    sentence, *details = [
        *filter(None, first),
        *findings.claims[:1],
        *anatomy.reasons,
        *findings.claims[1:],
        *anatomy.sentences[: not findings.rows],
        "",
    ]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    seen = findings.detectable
    cells = {(line.task, arm): cell for line in findings.lines for arm, cell in line.cells.items()}
    samples = choose_samples(findings.records, findings.tasks, [arm.name for arm in findings.arms], findings.baseline)
    write_html(
        path,
        "page.html.jinja",
        title=making.title,
        command=making.command,
        sentence=sentence,
        claims=[text for text in details if text],
        lacking=[line for line in findings.lines if line.lacking],
        inside=INSIDE_NOTE if any(cell.inside is not None for cell in cells.values()) else "",
        primary=[task_table(group, findings.dissent, seen, cells) for _, group in by_task(findings.benchmarks)],
        members=[task_table(group, findings.dissent, seen) for _, group in by_task(findings.members)],
        others=[task_table(list(group)) for _, group in groupby(findings.others, _score_of)],
        footnotes=findings.footnotes,
        edited=[
            edited_table(list(group), findings.scales[task])
            for task, group in groupby(findings.edited, lambda row: row.task)
        ],
        baseline=findings.baseline,
        spreads=[spread_line(spread, findings.scales[spread.task]) for spread in findings.spreads],
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
        race=race_table(findings.runners),
        anatomy=anatomy,
        versions=making.versions,
        timing=making.timing,
        notes=making.notes,
        data=_json_for_html(samples),
        script=Markup(script),
        script_hash=_csp_hash(script),
    )


def write_html(path: Path, template: str, **shown: object) -> None:
    """Writes a page of the `template`, with the style that all of them have."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_cut,
    )
    pages.filters |= {"printable": printable, "name": _name, "width": _width}
    pages.filters["base64"] = lambda png: Markup(base64.b64encode(png).decode())  # which is not cut
    html = pages.get_template(template).render(style=Markup(style), style_hash=_csp_hash(style), **shown)
    path.write_bytes(html.encode("utf-8", "replace"))  # names may hold lone surrogates


def _cut(value: object) -> object:
    """What the template shows: no text is endless."""
    return cut(value, _LONGEST) if isinstance(value, str) and not isinstance(value, Markup) else value


def _score_of(row: Row) -> tuple[str, str, str]:
    return row.task, row.metric, row.filter


def _width(png: bytes) -> int:
    """At how many pixels of the page the letters of a picture, whose header has its own width, are as large as ours."""
    return round(int.from_bytes(png[16:20], "big") * 130 / 200)


def _name(text: str) -> Markup:
    """Where it must be broken, beside an underscore or a plus."""
    return Markup(str(escape(printable(text))).replace("_", "_<wbr>").replace("+", "<wbr>+"))


def _json_for_html(data: object) -> Markup:
    """JSON that cannot end its script element: ASCII, and neither <, > nor & in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _csp_hash(text: str) -> str:
    """Of a script or style, for the page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
