"""No name or note that a stranger wrote makes an endless line anywhere: four megabytes are shown as some of them."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from made_up import make_arm, make_records, make_task, write
from rich.console import Console

from rvdist.core.errors import BadInput, Failed
from rvdist.core.log import FILE, Log
from rvdist.core.record import read_records, write_records
from rvdist.core.table import print_table
from rvdist.core.text import cell, printable
from rvdist.evaluate.suite import Suite
from rvdist.report.card.card import vector_card
from rvdist.report.card.metadata import Licence
from rvdist.report.findings import Anatomy, Exhibit
from rvdist.report.pictures.drawing import label
from rvdist.report.statistics.compare import summarise
from rvdist.report.summary import write_summary

LONG = "x" * 4_000_000
FIELDS = ["arm", "point", "prompt", "task", "filter", "doc"]


def test_a_line_of_a_log_of_the_terminal_and_of_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    for as_json in (False, True):
        log = Log(as_json, Console(file=shown, width=80))
        log.keep(tmp_path)
        log.say("note", f"note: {LONG} end", tensor=LONG, tensors=[LONG, {LONG: LONG}], nested={"a": (LONG,)})
        log.record("phase", LONG)
        log.fail(LONG, 1)
        log.fail(str(Failed(LONG)), 1)
    printed = capsys.readouterr()
    assert max(map(len, (tmp_path / FILE).read_text().splitlines())) < 500_000
    assert max(map(len, shown.getvalue().splitlines())) < 4100 and "end" in shown.getvalue()
    assert max(map(len, [*printed.err.splitlines(), *printed.out.splitlines()])) < 500_000
    assert "characters" not in printed.err and json.loads((tmp_path / FILE).read_text().splitlines()[0])["tensor"]


def test_a_table_a_cell_a_label_and_a_sentence() -> None:
    shown = io.StringIO()
    print_table(["name", LONG], [[LONG, "1"], ["a", LONG]], Console(file=shown))
    assert max(map(len, shown.getvalue().splitlines())) < 1000
    assert len(str(cell(LONG))) < 4100 and len(label(LONG)) < 50 and len(printable(LONG)) < 4100
    assert len(str(BadInput(f"{LONG}: is none"))) < 4100 and str(BadInput(f"{LONG}: is none")).endswith(": is none")


def test_a_page_and_a_summary(tmp_path: Path) -> None:
    arms = [make_arm("baseline", 0.0), make_arm(LONG, 1.0)]
    records = [record for arm in arms for record in make_records(arm.name, [0.0, 1.0, 1.0], LONG, response=LONG)]
    records = [replace(record, prompt=LONG, target=LONG, filtered=LONG) for record in records[:3]] + records[3:]
    anatomy = Anatomy([LONG], [Exhibit(LONG, b"PNG" * 10)], [(LONG, [LONG], [[LONG]])])
    page = write(
        tmp_path / "report.html", arms[:1], records[:3], [make_task(LONG)], title=LONG, notes=[LONG], command=LONG,
        versions={LONG: LONG}, timing={LONG: 1.0}, digests={"baseline": LONG}, lacking={LONG: LONG}, anatomy=anatomy,
    )  # fmt: skip
    assert len(page) < 1_000_000
    rows = summarise(arms, records, [make_task(LONG)], "baseline")
    write_summary(tmp_path / "summary.json", rows)
    assert max(map(len, (tmp_path / "summary.csv").read_text().splitlines())) < 50_000
    assert len(asdict(rows[0])["task"]) == len(LONG), "JSON keeps what was written"


def test_a_card() -> None:
    donors = {part: {"name": LONG, "revision": LONG} for part in ("plus", "minus")}
    description = {
        "formula": LONG, "donors": donors, "exact_for": LONG, "skipped": {LONG: LONG}, "tensors": {LONG: {}},
        "bytes": 1, "storage": {"dtype": LONG, "rank": 8, "density": None}, "relative_error": 0.1, "max_error": 0.1,
    }  # fmt: skip
    card = vector_card(description, versions={LONG: LONG}, licences={"plus": Licence(LONG)}, name="me/v")
    assert max(map(len, card.splitlines())) < 50_000


@pytest.mark.parametrize("field", [*FIELDS, "metrics"])
def test_a_record_with_such_a_name_is_refused(field: str, tmp_path: Path) -> None:
    (record,) = make_records("a", [1.0])
    write_records(tmp_path / "a.jsonl", [replace(record, **{field: {LONG: 1.0} if field == "metrics" else LONG})])
    with pytest.raises(BadInput, match="line 1 is no record .*has 4,000,000 characters, and names have at most"):
        list(read_records(tmp_path / "a.jsonl"))


def test_a_task_with_such_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "x"}\n')
    name = "t" * 100_000
    (tmp_path / "t.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{a}}'\ndoc_to_target: '{{a}}'\n"
    )
    with pytest.raises(BadInput, match="has a name of 100,000 characters; give it a shorter one"):
        Suite.load([name], include_path=tmp_path)
