"""The race on the page: who ran how far, and why not further; nothing is drawn that was not measured."""

from made_up import make_arm, make_records, make_task

from rvdist.report.findings import Findings, Making
from rvdist.report.pictures.alpha import alpha_figure
from rvdist.report.pictures.drawing import render
from rvdist.report.pictures.race import BEST, DROPPED, TIED, Runner, race_figure, race_table
from rvdist.report.report import write_report
from rvdist.report.statistics.compare import summarise

RACE = [
    Runner("baseline", 0.0, [(40, 0.3)], DROPPED, "after round 1: “alpha=1” and others are better"),
    Runner("alpha=0.5", 0.5, [(40, 0.5), (80, 0.55), (120, 0.56)], TIED),
    Runner("alpha=1", 1.0, [(40, 0.6), (80, 0.61), (120, 0.62)], BEST),
    Runner("alpha=9", 9.0, [], DROPPED),  # has no score
]


def test_the_table_says_who_ran_how_far_and_why_not_further():
    first, second, third = race_table(RACE)
    assert first == ("alpha=1", "62.0 [53.1, 70.2]", "120", "the best")  # 74.4 of 120: Wilson
    assert second[0] == "alpha=0.5" and second[3] == "not told apart from it"
    assert third[0] == "baseline" and third[2:] == ("40", "dropped after round 1: “alpha=1” and others are better")


def test_running_means_end_where_a_candidate_was_dropped():
    figure = race_figure(RACE)
    means, along = figure.axes
    lines = {tuple(line.get_xdata()): line for line in means.lines}
    assert set(lines) == {(40, 80, 120), (40,)} and len(means.collections) == 3, "a band each"
    assert [line for line in means.lines if line.get_marker() == "x"], "who was dropped is marked"
    assert all(line.get_linestyle() == "None" or len(line.get_xdata()) == 1 for line in along.lines[:3])
    assert race_figure([]) is None
    many = [Runner(f"c{k}", None, [(10, 0.1 * (k % 9))], DROPPED) for k in range(30)]
    assert len(render(lambda: race_figure(many), "png")) == 1 and len(race_figure(many).axes) == 1


def test_the_chosen_and_the_baseline_are_not_joined():
    arms = [make_arm("baseline", 0.0), make_arm("alpha=1", 1.0)]
    records = make_records("baseline", [1.0, 0.0] * 5) + make_records("alpha=1", [1.0, 1.0] * 5)
    rows = summarise(arms, records, [make_task()], "baseline")

    def joining(figure):
        return [
            line for line in figure.axes[0].lines if set(line.get_xdata()) == {0.0, 1.0} and line.get_marker() == "o"
        ]

    assert joining(alpha_figure(rows)) and not joining(alpha_figure(rows, joined=False))


def test_the_page_shows_the_race(tmp_path):
    arms = [make_arm("baseline", 0.0), make_arm("alpha=1", 1.0)]
    records = make_records("baseline", [1.0, 0.0] * 5) + make_records("alpha=1", [1.0, 1.0] * 5)
    rows = summarise(arms, records, [make_task()], "baseline")
    findings = Findings(arms, rows, records, [make_task()], runners=RACE)
    write_report(tmp_path, findings, Making("t", "c", {arm.name: "d" for arm in arms}))
    page = (tmp_path / "report.html").read_text()
    assert "<h2>The race</h2>" in page and "dropped after round 1" in page and "Every candidate" in page
    assert (tmp_path / "race.png").exists() and (tmp_path / "race.pdf").exists()
    write_report(tmp_path, Findings(arms, rows, records, [make_task()]), Making("t", "c", {a.name: "d" for a in arms}))
    assert "The race" not in (tmp_path / "report.html").read_text()
