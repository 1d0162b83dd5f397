from __future__ import annotations

import io
from dataclasses import replace

import pytest
from made_up import make_arm, make_experiment, make_records, make_task
from rich.console import Console

from rvdist.core.record import TaskInfo
from rvdist.report.claims import claims
from rvdist.report.findings import Findings
from rvdist.report.report import print_findings
from rvdist.report.statistics.compare import summarise


def show(arms, records, tasks, terminal: bool, width: int = 100) -> str:
    out = io.StringIO()
    rows = summarise(arms, records, tasks, "baseline" if any(a.name == "baseline" for a in arms) else None)
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    print_findings(Findings(arms, rows, records, tasks), console)
    return out.getvalue()


def scores(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_numbers_on_the_line():
    arms = [make_arm("baseline", 0.0), make_arm("α=1", 1.0)]
    records = make_records("baseline", scores(20, 30)) + make_records("α=1", scores(36, 14))
    for terminal in (True, False):
        text = show(arms, records, [make_task()], terminal)
        [line] = [line for line in text.splitlines() if "α=1" in line and "[" in line]
        assert "72.0 [58.3, 82.5]" in line and "+32.0 [" in line and "<0.001" in line and line.split()[-1] == "better"
        assert "gsm8k rose by 32.0 points with “α=1”" in text.replace("\n", " ")
        assert "differences under about" in text


def test_fits_a_hundred_columns():
    text = show(*make_experiment(), terminal=True)
    table = text.split("\n\n")[1]
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    assert "…" not in table and table.count("\n") == 2 * 7  # no number is cut and no line is folded


@pytest.mark.parametrize("terminal", [True, False])
def test_another_filter_is_named_where_its_verdict_is_another(terminal):
    arms = [make_arm("baseline", 0.0), make_arm("up", 1.0), make_arm("same", 2.0)]
    records = [
        replace(record, filter=filtered)
        for filtered, rights in (("flexible-extract", (20, 36, 22)), ("strict-match", (20, 20, 20)))
        for arm, right in zip(arms, rights, strict=True)
        for record in make_records(arm.name, scores(right, 50 - right))
    ]
    pairs = (("exact_match", "strict-match"), ("exact_match", "flexible-extract"))
    task = TaskInfo("gsm8k", "3", pairs, pairs[1], {"exact_match": True})
    text = show(arms, records, [task], terminal, width=140)
    assert "exact_match (flexible-extract) %" in text
    (line,) = [line for line in text.splitlines() if "by strict-match" in line]
    assert "up, by strict-match" in line and "40.0 [" in line and line.endswith("no detectable difference")
    rows = summarise(arms, records, [task], "baseline")
    assert [row.primary for row in rows] == [False] * 3 + [True] * 3 and rows[4].verdict == "better"


def test_empty_answers_are_pointed_out():
    arms = [make_arm("baseline", 0.0), make_arm("mute", 20.0), make_arm("terse", 1.0)]
    repeated = "[1 of 2, 0 characters]\n\n[2 of 2, 0 characters]\n"
    records = make_records("baseline", scores(5, 5)) + make_records("mute", scores(0, 10), response=repeated)
    records += make_records("terse", scores(0, 4), response=" \n") + [
        replace(record, doc_id=4 + i, doc=f"gsm8k-{4 + i:05d}")
        for i, record in enumerate(make_records("terse", scores(2, 4), response="5"))
    ]
    text = " ".join(show(arms, records, [make_task()], terminal=False).split())
    assert "gsm8k: empty answers: 10 of 10 with “mute”." in text  # 4 of 10 with “terse” may be as they should


def test_what_holm_takes_back_is_marked():
    arms = [make_arm("baseline", 0.0)] + [make_arm(f"α={i}", float(i)) for i in range(1, 6)]
    records = make_records("baseline", scores(20, 30)) + make_records("α=1", scores(27, 23))
    for i in range(2, 6):
        records += make_records(f"α={i}", scores(20, 30))
    text = show(arms, records, [make_task()], terminal=False)
    [line] = [line for line in text.splitlines() if line.startswith("gsm8k  α=1")]
    assert line.endswith("no detectable difference†"), "as its p value after correction"
    assert "† significant alone" in text and "none survives" in text and "does not survive" in text


def test_without_a_baseline_there_is_no_claim():
    text = show([make_arm("α=1", 1.0)], make_records("α=1", scores(5, 5)), [make_task()], terminal=False)
    assert "no baseline" in text and "50.0 [" in text and "better" not in text


def test_a_metric_that_is_no_share_is_not_percent():
    arms = [make_arm("baseline", 0.0), make_arm("α=1", 1.0)]
    records = make_records("baseline", [11.5, 12.5, 13.0], metric="ppl") + make_records(
        "α=1", [11.0, 12.0, 12.0], metric="ppl"
    )
    text = show(arms, records, [make_task(metric="ppl")], terminal=False)
    assert "12.33 [" in text and "%" not in text.split("\n\n")[1].replace("95 %", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_text_not_markup_nor_escapes(terminal):
    name = "[bold]x[/bold] \x1b[31mred\x1b[0m \u202egnp \x00"
    arms = [make_arm("baseline", 0.0), make_arm(name, 1.0)]
    records = make_records("baseline", scores(1, 3), "[red]t") + make_records(name, scores(2, 2), "[red]t")
    text = show(arms, records, [make_task("[red]t")], terminal, width=200)
    assert "[bold]x[/bold] �[31mred�[0m �gnp �" in text and "[red]t" in text
    assert not {"\x1b[31m", "\u202e", "\x00"} & {c for c in ("\x1b[31m", "\u202e", "\x00") if c in text}


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["baseline"], "Nothing was compared: “baseline” alone has a score, with no baseline or other arm beside it."),
        (["α=1", "α=2"], "Nothing was compared: the run has no baseline with a score."),
    ],
)
def test_why_nothing_was_compared(arms, said):
    """Where the other arms, or the baseline, failed."""
    made = [make_arm(name, float(k)) for k, name in enumerate(arms)]
    records = [record for name in arms for record in make_records(name, [1.0, 0.0, 1.0])]
    rows = summarise(made, records, [make_task()], "baseline" if arms == ["baseline"] else None)
    assert claims(rows) == [said]
