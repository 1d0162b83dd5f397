"""Several models as one page."""

import re
from dataclasses import replace

from made_up import make_experiment

from rvdist.report.page.models import Model, models_figure, write_models
from rvdist.report.statistics.compare import summarise
from rvdist.report.wording import Scale


def models():
    arms, records, tasks = make_experiment(n=60)
    rows = summarise(arms, records, tasks, "baseline")
    hostile = [replace(row, arm=row.arm.replace("donor", "<script>x</script>")) for row in rows]
    return [Model("target=a", rows, ("0/report.html",)), Model("target=b", hostile, ('x:"b"/report.html',))]


def test_the_page_has_every_model_arm_and_benchmark(tmp_path):
    made = models()
    write_models(tmp_path / "report.html", "2 models", made)
    html = (tmp_path / "report.html").read_text()
    text = re.sub(r"<[^>]*>", " ", html)
    assert "target=a" in text and "target=b" in text and '<a href="0/report.html">0/report.html</a>' in html
    assert '<a href="x%3A%22b%22/report.html">' in html and "<script>" not in html, "no address has a scheme"
    assert html.count("<tr>\n        <td>") == 12, "six arms of each"
    row = next(row for row in made[0].rows if row.arm == "α=1")
    assert Scale([row]).delta(row) in text and "Along α" in text and "image/png" in html


def test_jobs_that_differ_in_alpha_alone_are_one_model():
    whole, _ = models()
    parts = [
        Model("m", [row for row in whole.rows if row.arm in ("baseline", arm)], (f"{k}/report.html",))
        for k, arm in enumerate(("α=1", "α=-1"))
    ]
    joined = parts[0].join(parts[1])
    assert [row.arm for row in joined.rows] == ["baseline", "α=-1", "α=1"] * 2
    assert joined.reports == ("0/report.html", "1/report.html")
    scales = {row.task: Scale([row]) for row in joined.rows}
    figure = models_figure([joined], scales)
    assert len(figure.axes) == 2 and list(figure.axes[0].lines[0].get_xdata()) == [-1.0, 0.0, 1.0]
    assert models_figure([replace(joined, rows=joined.rows[:1])], scales) is None
