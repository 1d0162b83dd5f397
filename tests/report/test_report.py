"""What the report stage prints and writes, beginning with the paper's table."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from made_up import REPORTED, make_arm, make_experiment, make_paper, make_records, make_task
from PIL import Image
from rich.console import Console

from rvdist.report.findings import Anatomy, Exhibit, Findings, Making
from rvdist.report.paper import paper_lines, write_paper_table
from rvdist.report.report import print_findings, write_report
from rvdist.report.statistics.compare import summarise

LACKING = {"humaneval_plus_instruct": "there is no file humaneval_plus"}
HOSTILE = "[bold]x[/bold] \x1b[31mred\x1b[0m \u202egnp \x00 $\\frac{"


@pytest.fixture(scope="module")
def findings() -> Findings:
    arms, records, tasks, groups = make_paper(60, members=2, seeds=2)
    rows = summarise(arms, records, tasks, "Baseline", groups)
    return Findings(arms, rows, records, tasks, groups, REPORTED, LACKING)


def shown(findings: Findings, width: int | None = None) -> str:
    out = io.StringIO()
    print_findings(findings, Console(file=out, force_terminal=width is not None, width=width, color_system=None))
    return out.getvalue()


def made(findings: Findings) -> Making:
    return Making("A report", "python -m rvdist.launch", {arm.name: "d1935700" for arm in findings.arms})


def cells(ours, theirs, reported, metric="exact_match"):
    arms = [make_arm("Baseline", 0.0), make_arm("+Vector", 1.0)]
    records = make_records("Baseline", theirs, "t", metric) + make_records("+Vector", ours, "t", metric)
    rows = summarise(arms, records, [make_task("t", metric)], "Baseline")
    return paper_lines(rows, {"t": {"Baseline": 1.0, "+Vector": reported, "nobody": 1.0}}, {})


def test_what_was_reported_stands_beside_our_interval(tmp_path):
    [line] = cells([1.0] * 60 + [0.0] * 40, [1.0] * 40 + [0.0] * 60, 12.3)
    base, arm = line.cells.values()
    assert (base.comparison, base.inside) == ("", None)  # the baseline has no change, whatever somebody reports
    assert arm.inside and arm.comparison == "reported +12.3, inside"
    [line] = cells([1.0] * 60 + [0.0] * 40, [1.0] * 40 + [0.0] * 60, -4.9)
    assert line.cells["+Vector"].comparison == "reported −4.9, outside"
    [line] = cells([3.5, 4.0, 9.0] * 2, [3.0, 3.0, 7.0] * 2, -25, "ppl")  # no share, so points are its own
    assert line.cells["+Vector"].comparison == "reported −25, outside"
    write_paper_table(tmp_path / "paper.csv", [line])
    [row] = csv.DictReader((tmp_path / "paper.csv").open(newline="", encoding="utf-8"))
    assert float(row["+Vector change"]) == pytest.approx(3.5 / 3) and row["+Vector reported"] == "-25"


def test_the_papers_table_as_csv(findings, tmp_path):
    write_paper_table(tmp_path / "paper.csv", findings.lines)
    lines = list(csv.DictReader((tmp_path / "paper.csv").open(newline="", encoding="utf-8")))
    names = ["gsm8k", "humaneval_instruct", "sciq", "bbh_cot_fewshot", "humaneval_plus_instruct"]
    assert [line["benchmark"] for line in lines] == names
    rows = {(row.task, row.arm): row for row in findings.rows if row.primary}
    for line in lines[:-1]:
        for arm in findings.arms:
            row = rows[line["benchmark"], arm.name]
            assert float(line[f"{arm.name} score"]) == pytest.approx(100 * row.value, abs=1e-5)
            if row.delta is not None:
                assert float(line[f"{arm.name} change_low"]) == pytest.approx(100 * row.delta_ci_low, abs=1e-5)
                assert line[f"{arm.name} verdict"] == row.verdict
    assert lines[0]["−Vector reported"] == "-11.8" and lines[0]["Baseline change"] == ""
    assert lines[-1]["metric"] == "not asked: there is no file humaneval_plus"


@pytest.mark.parametrize("width", [None, 100])
def test_the_terminal_shows_it_all(findings, width):
    text = shown(findings, width)
    assert all(len(line) <= 100 for line in text.splitlines()) or width is None
    for said in (
        "reported −11.8, ",
        "humaneval_plus_instruct: not asked: there is no file humaneval_plus",
        "all 5 edits",
        "sciq under 2 seeds: the standard deviation between seeds is ",
        "whether a reported change lies within",
    ):
        assert said in text.replace("\n", " "), said
    head = [line for line in text.splitlines() if line.startswith("benchmark")]
    assert len(head) == (1 if width is None else 2)
    assert [name for line in head for name in line.split()[1:]] == [arm.name for arm in findings.arms]
    assert "bbh_cot_fewshot_snarks" not in text  # a member of a group


def test_names_are_text_not_markup_nor_escapes(tmp_path):
    arms = [make_arm("Baseline", 0.0), make_arm(HOSTILE, 1.0)]
    records = []
    for task in ("[red]t", f"[red]t+{HOSTILE}"):
        records += make_records("Baseline", [[0.0, 1.0]] * 4, task) + make_records(HOSTILE, [[1.0, 1.0]] * 4, task)
    records = [type(r)(**{**vars(r), "doc": str(r.doc_id)}) for r in records]
    tasks = [make_task("[red]t"), make_task(f"[red]t+{HOSTILE}")]
    rows = summarise(arms, records, tasks, "Baseline")
    findings = Findings(arms, rows, records, tasks, (), {"[red]t": {HOSTILE: 1.0}}, {HOSTILE: HOSTILE})
    for width in (None, 300):
        text = shown(findings, width)
        assert text.count("[bold]x[/bold] �[31mred�[0m �gnp �") >= 5
        assert not {"\x1b[31m", "\u202e", "\x00"} & {c for c in ("\x1b[31m", "\u202e", "\x00") if c in text}
    write_report(tmp_path, findings, made(findings))
    assert (tmp_path / "robustness.pdf").read_bytes().startswith(b"%PDF")


def test_every_file_is_written(findings, tmp_path):
    write_report(tmp_path, findings, made(findings), Anatomy(exhibits=[Exhibit("Layers", b"PNG")]))
    pictures = {f"{name}.{kind}" for name in ("alpha", "changes", "robustness") for kind in ("png", "pdf")}
    tables = {"paper.csv", "robustness.csv", "seeds.csv", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | tables
    for name in pictures:
        picture = tmp_path / name
        if picture.suffix == ".png":
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
            assert all((edge == 255).all() for edge in edges) and (pixels < 200).any()  # nothing runs off the paper
        else:
            assert picture.read_bytes().startswith(b"%PDF") and b"CreationDate" not in picture.read_bytes()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 3


def test_what_there_is_nothing_to_say_of_is_not_written(tmp_path):
    arms, records, tasks = make_experiment((0.0,), tasks=1, n=10)
    rows = summarise(arms[:1], records, tasks, None)
    findings = Findings(arms[:1], rows, records, tasks)
    write_report(tmp_path / ".", findings, made(findings))
    assert {path.name for path in tmp_path.iterdir()} == {"alpha.png", "alpha.pdf", "paper.csv", "report.html"}
    empty = Findings([], [], [], [])
    assert shown(empty) == ""
    write_report(Path(tmp_path), empty, made(empty), Anatomy(["v is small."]))
    assert "v is small." in (tmp_path / "report.html").read_text(encoding="utf-8")
