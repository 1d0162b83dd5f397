"""Along α: the best, its neighbours, and what no arm could have shown."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from made_up import make_arm, make_experiment, make_records, make_task
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import detectable_effects, summarise
from rvdist.report.statistics.sweep import Limit, limits, sweeps


def name_of(alpha):
    return "baseline" if alpha == 0 else f"α={alpha:g}"


def run(scores, tasks=("gsm8k",), metric="exact_match", higher_is_better=True):
    """Scores by α, the same of each task."""
    arms = [make_arm(name_of(alpha), alpha) for alpha in scores]
    infos = [make_task(task, metric, higher_is_better) for task in tasks]
    records = [
        r for task in tasks for alpha in scores for r in make_records(name_of(alpha), scores[alpha], task, metric)
    ]
    return arms, records, infos


def claimed(arms, records, tasks, baseline="baseline"):
    return Findings(arms, summarise(arms, records, tasks, baseline), records, tasks).claims


def right(k, n=100):
    return [1.0] * k + [0.0] * (n - k)


def test_the_best_and_its_neighbours_are_what_mcnemar_and_holm_say():
    rights = {-1.0: 30, 0.0: 50, 0.5: 75, 1.0: 72, 2.0: 40}
    arms, records, tasks = run({alpha: right(k) for alpha, k in rights.items()}, ("a", "b"))
    p_values = [binomtest(max(x - y, 0), abs(x - y), 0.5).pvalue for x, y in pairwise(rights.values())] * 2
    adjusted = multipletests(p_values, method="holm")[1]
    for place, sweep in enumerate(sweeps(arms, records, tasks)):
        assert (sweep.best, sweep.worst, sweep.level) == ("α=0.5", "α=-1", ())
        assert [one.alpha for one in sweep.neighbours] == [0.0, 1.0]
        assert [one.gain for one in sweep.neighbours] == pytest.approx([0.25, 0.03])
        assert [one.p_adjusted for one in sweep.neighbours] == pytest.approx(adjusted[4 * place + 1 : 4 * place + 3])


def test_one_sentence_stands_for_all_arms_of_a_sweep():
    arms, records, tasks = run({-1.0: right(30), 0.0: right(50), 0.5: right(75), 0.75: right(72), 2.0: right(95)})
    arms.append(make_arm("donor"))
    said = claimed(arms, records + make_records("donor", right(80)), tasks)
    assert len(said) == 3 and said[0].startswith("Of 5 comparisons with “baseline”, 5 show a difference; all survive")
    assert said[1].startswith(
        "gsm8k along α (5 points from −1 to 2): α = 2 is best with 95.0 %. Against “baseline” it rose"
    )
    assert "It is better than α = 0.75 (by 23.0 points, adjusted p <0.001). No larger α was tried." in said[1]
    assert "With α = −1, the worst, it fell by 20.0 points" in said[1] and "0.5" not in said[1]
    assert said[2].startswith("gsm8k rose by 30.0 points with “donor”")


def test_the_target_itself_may_be_the_best():
    (_, said) = claimed(*run({0.0: right(60), 0.5: right(58), 1.0: right(20)}))
    assert "α = 0 is best with 60.0 %: no α improved on the target. It cannot be told from α = 0.5." in said
    assert "No smaller α was tried." in said


def test_of_a_perplexity_the_lowest_is_the_best():
    rng = np.random.default_rng(0)
    scores = {alpha: list(9 + (alpha - 1) ** 2 + 0.1 * rng.standard_normal(40)) for alpha in (0.0, 1.0, 2.0)}
    arms, records, tasks = run(scores, metric="ppl", higher_is_better=False)
    (sweep,) = sweeps(arms, records, tasks)
    assert sweep.best == "α=1" and all(one.gain > 0.5 and one.p_adjusted < 0.05 for one in sweep.neighbours)
    assert "%" not in claimed(arms, records, tasks)[1].replace("95 % interval", "")


def test_the_nearest_to_the_target_of_those_that_score_alike():
    arms, records, tasks = run({0.0: right(50), 0.5: right(70), 1.0: right(70), 2.0: right(50)})
    (sweep,) = sweeps(arms, records, tasks)
    assert (sweep.best, sweep.level) == ("α=0.5", ("α=1",))
    assert "α = 0.5 is best with 70.0 %, as is α = 1." in claimed(arms, records, tasks)[1]
    said = claimed(*run({0.0: right(50), 0.5: right(70), 0.123456789: right(70), 1.0: right(70)}))[1]
    assert "α = 0.123456789 is best with 70.0 %, as are α = 0.5 and 1." in said
    said = claimed(*run({alpha: right(50) for alpha in (0.0, 0.5, 1.0)}))
    assert said[1] == "gsm8k along α (3 points from 0 to 1): every α scores 50.0 %."


def test_each_prompt_style_is_a_sweep_of_its_own():
    arms, records, tasks = run({0.0: right(50), 0.5: right(60), 1.0: right(70)})
    for alpha in (0.0, 0.5, 1.0):
        arms.append(make_arm(f"think {alpha:g}", alpha, "think"))
        records += make_records(f"think {alpha:g}", right(int(40 + 10 * alpha)))
    assert [(one.prompt, one.best) for one in sweeps(arms, records, tasks)] == [("plain", "α=1"), ("think", "think 1")]


def test_what_is_no_sweep_has_no_sentence():
    assert not sweeps(*run({0.0: right(50), 1.0: right(60)}))  # two points
    arms, records, tasks = run({0.0: right(50), 0.5: right(60), 1.0: right(60)})
    assert not sweeps(arms, [r for r in records if (r.arm, r.doc_id) != ("α=1", 3)], tasks)  # asked less
    assert not sweeps([make_arm(arm.name) for arm in arms], records, tasks)  # off the line


@pytest.mark.slow  # the correction itself is compared with statsmodels' above
def test_choosing_the_best_makes_no_noise_significant():
    """Seven α that do nothing: the best of them is rarely called better than a neighbour."""
    rng, called, rounds = np.random.default_rng(3), 0, 200
    for _ in range(rounds):
        ease = rng.random(80)
        scores = {a / 2: list((ease + 0.4 * rng.standard_normal(80) < 0.5).astype(float)) for a in range(7)}
        called += any(one.p_adjusted < 0.05 for one in sweeps(*run(scores))[0].neighbours)
    assert called <= 0.05 * rounds + 7  # two standard deviations above


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, [Limit("gsm8k", True, 0, 50)]),
        (5, [Limit("gsm8k", True, 5, 50)]),
        (6, []),
        (44, []),
        (46, [Limit("gsm8k", False, 4, 50)]),
    ],
)
def test_a_baseline_without_room_is_said(k, expected):
    """Six documents must change alike before the exact test can call a change: 2 · 2⁻⁶ < 0.05 < 2 · 2⁻⁵."""
    arms, records, tasks = run({0.0: right(k, 50), -1.0: right(0, 50)})
    assert limits(records, tasks, "baseline") == expected
    (row,) = [row for row in summarise(arms, records, tasks, "baseline") if row.arm != "baseline"]
    assert (row.verdict == "worse") == (k >= 6)  # the rule is that of the test itself
    said = [text for text in claimed(arms, records, tasks) if "could" in text]
    assert len(said) == len(expected)
    if k == 0:
        assert said == [
            "gsm8k: no fall can be told from chance (subtraction cannot be seen): “baseline” is at 0.0 %, and no "
            "document could fall."
        ]
    if k == 46:
        assert said == [
            "gsm8k: no rise can be told from chance: “baseline” is at 92.0 %, and only 4 of 50 documents could rise."
        ]


def test_the_page_gives_each_comparison_its_own_smallest_change(tmp_path):
    from made_up import write

    arms, records, tasks = make_experiment(tasks=1)
    html = write(tmp_path / "report.html", arms, records, tasks)
    table = re.search(r"<h2>Results</h2>(.*?)</table>", html, re.DOTALL)[1]
    shown = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[-1]
        for row in re.findall(r"<tr class=\"(?!task).*?</tr>", table, re.DOTALL)
    ]
    effects = detectable_effects(arms, records, tasks, "baseline")
    assert shown == [f"{100 * effects['task_0', a.name]:.1f}" if a.name != "baseline" else "" for a in arms]
    assert "Seen from" in table and len(set(shown)) > 2
