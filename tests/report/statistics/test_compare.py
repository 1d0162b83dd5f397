from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from made_up import make_arm, make_experiment, make_records, make_task
from scipy.stats import binom, binomtest, bootstrap, multinomial
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from rvdist.core.record import TaskInfo
from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import (
    compare_differences,
    compare_discordant,
    detectable_effects,
    holm,
    minimal_detectable_effect,
    summarise,
)
from rvdist.report.statistics.flips import FEW, _subset_sums, _tail, lattice, tails
from rvdist.report.statistics.sample import round_off
from rvdist.report.summary import Row, baseline_of, write_summary

BASE, ARM = make_arm("baseline", 0.0), make_arm("α=1", 1.0)


def compare(ours, theirs, task=None) -> Row:
    return compare_many([(ours, theirs)], task or make_task())[0]


def compare_many(replicates, task) -> list[Row]:
    """Each (ours, theirs) as a task of its own, in one table."""
    tasks = [replace(task, name=f"{task.name} {i}") for i in range(len(replicates))]
    metric = task.primary[0]
    records = []
    for (ours, theirs), each in zip(replicates, tasks, strict=True):
        records += make_records("baseline", theirs, each.name, metric) + make_records("α=1", ours, each.name, metric)
    return summarise([BASE, ARM], records, tasks, "baseline")[1::2]


def agrees(row: Row) -> bool:
    excludes = row.delta_ci_low > 0 or row.delta_ci_high < 0
    return excludes == (row.p_value < 0.05) == (row.verdict_alone != "no detectable difference")


def test_row_is_the_contract_of_summary_json():
    assert " ".join(field.name for field in fields(Row)) == (
        "arm point alpha prompt task metric filter primary higher_is_better seed value stderr ci_low ci_high n "
        "delta delta_ci_low delta_ci_high p_value p_adjusted verdict verdict_alone margin unseen "
        "tokens tokens_ci_low tokens_ci_high cut cut_ci_low cut_ci_high in_format in_format_ci_low in_format_ci_high "
        "value_in_format"
    )


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_an_interval_holds_its_score(score):
    for n in range(1, 60):
        [row] = summarise([BASE], make_records("baseline", [score] * n), [make_task()], None)
        assert row.ci_low <= row.value <= row.ci_high


def test_single_score_is_wilson():
    scores = [1.0] * 37 + [0.0] * 13
    [row] = summarise([BASE], make_records("baseline", scores), [make_task()], None)
    assert (row.value, row.n, row.seed) == (0.74, 50, 0)
    assert (row.ci_low, row.ci_high) == pytest.approx(proportion_confint(37, 50, method="wilson"))
    assert row.stderr == pytest.approx(np.std(scores, ddof=1) / math.sqrt(50))
    assert row.delta is row.p_value is row.p_adjusted is row.verdict is None


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_scores_that_do_not_vary_keep_an_honest_interval(score):
    for scores in ([score] * 20, [[score] * 4] * 20):
        [row] = summarise([BASE], make_records("baseline", scores), [make_task()], None)
        assert row.ci_high - row.ci_low > 0.1


def test_repeats_of_a_document_are_one_cluster():
    scores = [[1.0] * 8] * 10 + [[0.0] * 8] * 10
    [repeated] = summarise([BASE], make_records("baseline", scores), [make_task()], None)
    [once] = summarise([BASE], make_records("baseline", [s[0] for s in scores]), [make_task()], None)
    assert (repeated.n, repeated.value, repeated.stderr) == (once.n, once.value, once.stderr)
    assert repeated.ci_high - repeated.ci_low == pytest.approx(once.ci_high - once.ci_low, rel=0.15)
    assert (repeated.seed, once.seed) == (None, 0)


def test_a_document_counts_once_however_often_it_was_asked():
    """lm-eval's score where all were asked equally often; more answers of one document are no more evidence."""
    theirs, ours = [[1.0, 0.0], [1.0], [0.0], [1.0]], [[1.0] * 3, [0.0], [1.0], [1.0]]
    records = make_records("baseline", theirs) + make_records("α=1", ours)
    base, row = summarise([BASE, ARM], records, [make_task()], "baseline")
    assert base.value == pytest.approx(2.5 / 4) and row.value == pytest.approx(3 / 4)
    assert row.delta == pytest.approx(row.value - base.value)
    theirs = [[1.0] * 9 if i % 2 else [1.0] for i in range(40)]
    ours = [[1.0] if i % 2 else [1.0] * 9 for i in range(40)]
    row = compare(ours, theirs)
    assert (row.delta, row.p_value, row.verdict) == (0.0, 1.0, "cannot be seen")


def test_a_score_without_bounds_has_the_bootstraps_interval():
    values = np.random.default_rng(1).gamma(2.0, size=300)
    [row] = summarise([BASE], make_records("baseline", list(values)), [make_task()], None)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999).confidence_interval
    assert (row.ci_low, row.ci_high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


@pytest.mark.parametrize("b,c", [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (30, 30), (30, 48)])
def test_mcnemar_is_statsmodels(b, c):
    ours = [1.0] * b + [0.0] * c + [1.0] * 20 + [0.0] * 20
    theirs = [0.0] * b + [1.0] * c + [1.0] * 20 + [0.0] * 20
    row = compare(ours, theirs)
    expected = mcnemar([[20, c], [b, 20]], exact=True).pvalue if b + c else 1.0
    assert row.p_value == pytest.approx(expected)
    if b + c:
        assert row.p_value == pytest.approx(binomtest(b, b + c).pvalue)
    assert row.delta == pytest.approx((b - c) / len(ours)) == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert row.delta_ci_low <= row.delta <= row.delta_ci_high
    assert agrees(row)


def test_no_discordant_pair_still_has_an_interval():
    row = compare([1.0] * 30, [1.0] * 30)
    assert (row.delta, row.p_value) == (0.0, 1.0)
    # The most discordance that shows none among 30 pairs once in forty times.
    assert row.delta_ci_high == -row.delta_ci_low == pytest.approx(1 - 0.025 ** (1 / 30))


@pytest.mark.heavy
def test_mcnemar_and_its_interval_never_disagree():
    for n in (1, 7, 12, 25, 400):
        for discordant in range(min(n, 25) + 1):
            for b in range(discordant + 1):
                x = compare_discordant(b, discordant - b, n)
                assert (x.low > 0 or x.high < 0) == (x.p_value < 0.05), (b, discordant, n)
                assert -1 <= x.low <= x.delta <= x.high <= 1
    for discordant in (100, 333, 1000):
        for b in range(discordant + 1):
            x = compare_discordant(b, discordant - b, 1319)
            assert (x.low > 0 or x.high < 0) == (x.p_value < 0.05), (b, discordant)


def test_mcnemar_interval_covers_exactly():
    n = 40
    outcomes = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    counts = np.array([(b, c, n - b - c) for b, c in outcomes])
    intervals = np.array([(x.low, x.high) for x in (compare_discordant(b, c, n) for b, c in outcomes)])
    for better, worse in [(0.0, 0.0), (0.02, 0.01), (0.1, 0.1), (0.3, 0.05), (0.25, 0.25), (0.5, 0.5), (0.6, 0.0)]:
        chance = multinomial.pmf(counts, n, [better, worse, 1 - better - worse])
        delta = better - worse
        covered = (intervals[:, 0] <= delta + 1e-12) & (delta - 1e-12 <= intervals[:, 1])
        assert chance[covered].sum() >= 0.95, (better, worse)


def test_wilson_covers_on_average():
    n = 60
    k = np.arange(n + 1)
    low, high = proportion_confint(k, n, method="wilson")
    chances = np.linspace(0.1, 0.9, 33)
    coverage = [binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() for p in chances]
    assert min(coverage) >= 0.92 and np.mean(coverage) >= 0.945


@pytest.mark.heavy
def test_repeats_cover_and_never_disagree():
    """40 documents asked four times in two arms, an effect of 8 points in each of them."""
    rng = np.random.default_rng(0)
    replicates, n = [], 40
    for _ in range(500):
        ease = rng.choice([0.2, 0.6, 0.9], n)
        theirs = (rng.random((n, 4)) < ease[:, None]).astype(float)
        ours = (rng.random((n, 4)) < ease[:, None] + 0.08).astype(float)
        replicates.append((ours.tolist(), theirs.tolist()))
    rows = compare_many(replicates, make_task())
    assert all(map(agrees, rows))
    assert np.mean([row.ci_low <= np.mean([0.28, 0.68, 0.98]) <= row.ci_high for row in rows]) >= 0.93
    assert np.mean([row.delta_ci_low <= 0.08 <= row.delta_ci_high for row in rows]) >= 0.93


def test_few_changed_documents_do_not_cry_wolf():
    """A percentile bootstrap calls four changed documents significant; six are needed, as in McNemar."""
    for changed, verdict in [(0, False), (1, False), (3, False), (4, False), (5, False), (7, True)]:
        row = compare([[1.0, 0.0]] * changed + [[0.0, 0.0]] * (100 - changed), [[0.0, 0.0]] * 100)
        assert agrees(row)
        assert (row.verdict == "better") == verdict, changed
        assert row.delta_ci_low < row.delta_ci_high


def test_a_true_null_is_rejected_about_one_time_in_twenty():
    replicates = np.random.default_rng(2).exponential(size=(250, 2, 25)).tolist()
    rows = compare_many(replicates, make_task(metric="loss"))
    assert 0.02 < np.mean([row.p_value < 0.05 for row in rows]) < 0.08


@pytest.mark.parametrize("ours,theirs", [([2.5], [1.5]), ([0.3, 0.3], [0.3, 0.3]), ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])])
def test_degenerate_differences_claim_nothing(ours, theirs):
    row = compare(ours, theirs)
    assert row.verdict == "no detectable difference" and row.p_value > 0.05
    json.dumps(asdict(row), allow_nan=False)


def test_verdict_respects_direction():
    up, down = [1.0] * 40, [0.0] * 30 + [1.0] * 10
    lower = make_task(metric="error", higher_is_better=False)
    assert compare(up, down).verdict == "better"
    assert compare(down, up).verdict == "worse"
    assert compare(up, down, lower).verdict == "worse"
    assert compare(down, up, lower).verdict == "better"
    smooth = np.random.default_rng(0).random(50)
    assert compare(list(smooth + 1), list(smooth[::-1]), lower).verdict == "worse"


def test_holm_is_statsmodels():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 40):
        p_values = np.round(rng.random(n) ** 3, 2).tolist()  # some are equal
        assert holm(p_values) == multipletests(p_values, method="holm")[1].tolist()
    assert holm([]) == []


def test_holm_keeps_two_families():
    task = TaskInfo("t", "1", (("acc", "none"), ("norm", "none")), ("acc", "none"))
    base = make_arm("baseline", 0.0)
    arms = [base, make_arm("a", 0.5), make_arm("b", 1.0)]
    right = {"baseline": 10, "a": 19, "b": 18}
    records = []
    for arm, k in right.items():
        for acc, r in zip([1.0] * k + [0.0] * (30 - k), make_records(arm, [0.0] * 30, "t"), strict=True):
            records.append(type(r)(**{**asdict(r), "metrics": {"acc": acc, "norm": acc}}))
    rows = [row for row in summarise(arms, records, [task], "baseline") if row.p_value is not None]
    assert [row.primary for row in rows] == [True, True, False, False]
    for family in (rows[:2], rows[2:]):
        small, large = sorted(row.p_value for row in family)
        assert sorted(row.p_adjusted for row in family) == pytest.approx([2 * small, max(2 * small, large)])


def draw_sample(rng):
    """(differences, weights, strata, most): 0/1, repeats, floats; few or many; ties, gaps, constants; groups."""
    members = int(rng.choice([1, 1, 1, 2, 3, 12]))
    sizes = [int(rng.choice([1, 2, 3, 5, 8, 13, 17, 30, 90])) for _ in range(members)]
    n, kind = sum(sizes), rng.choice(["binary", "repeats", "floats", "skewed", "one size", "one sign"])
    shift = rng.choice([-0.4, -0.1, 0.0, 0.0, 0.1, 0.4, 1.0])
    if kind == "binary":
        values = rng.choice([-1.0, 0.0, 1.0], n, p=[0.3 - 0.3 * shift**2, 0.4, 0.3 + 0.3 * shift**2])
    elif kind == "repeats":
        values = rng.integers(-4, 5, n) / 4
    elif kind == "floats":
        values = rng.normal(shift, rng.choice([1e-6, 0.3, 1.0]), n)
    elif kind == "skewed":
        values = (rng.lognormal(0, 1.5, n) - 2) * 10.0 ** rng.integers(-6, 6)
    else:
        values = np.full(n, rng.choice([0.25, 1.0])) * (1 if kind == "one sign" else rng.choice([-1, 1], n))
    values = values * (rng.random(n) < rng.choice([0.05, 0.3, 1.0, 1.0]))
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        if rng.random() < 0.2:
            values[start : start + size] = values[start]  # a member that does not vary
    by_size = rng.random() < 0.5
    weights = np.repeat([1.0 if by_size else n / (members * size) for size in sizes], sizes)
    most = 1.0 if np.abs(values).max() <= 1 and rng.random() < 0.7 else math.inf
    return round_off(values, values) * weights, weights, sizes, most


@pytest.mark.parametrize("seed", range(4))
def test_interval_p_value_and_verdict_never_disagree(seed):
    rng = np.random.default_rng(seed)
    significant = 0
    for _ in range(250):
        drawn = draw_sample(rng)
        found = compare_differences(*drawn)
        mirrored = compare_differences(-drawn[0], *drawn[1:])
        assert 0 < found.p_value <= 1 and found.p_value == pytest.approx(mirrored.p_value)
        excludes = found.low > 0 or found.high < 0
        assert excludes == (found.p_value < 0.05), drawn
        assert math.isnan(found.low) or found.low <= found.delta <= found.high, drawn
        assert -drawn[3] <= found.delta <= drawn[3]
        said = found.verdict(True)
        assert said == ("no detectable difference" if not excludes else "better" if found.low > 0 else "worse")
        significant += excludes
    assert 40 < significant < 210


@pytest.mark.parametrize("n", [3, 5, 9, 14, 25])
def test_equal_arms_are_told_apart_no_more_often_than_said(n):
    """Of equal arms differences are as likely to have either sign. A bootstrap calls 4.9 % of them at 0.05/17 for three
    documents; flipping signs at most as many as it says, at every level."""
    rng = np.random.default_rng(n)
    p_values = []
    for i in range(1500):
        sizes = [rng.random(n), rng.integers(1, 5, n) / 4, rng.lognormal(size=n)][i % 3]
        differences = sizes * rng.choice([-1, 1], n)
        p_values.append(2 * min(tails(differences, lattice(differences))))
    for level in (0.05, 0.05 / 17, 0.05 / 250):
        assert np.mean(np.array(p_values) < level) <= level + 3 * math.sqrt(level / 1500)


def test_three_documents_prove_nothing():
    row = compare([0.5, 0.7, 0.6], [0.1, 0.2, 0.3])
    assert (row.p_value, row.verdict) == (0.25, "no detectable difference")
    assert row.delta_ci_low is row.delta_ci_high is None


def test_any_p_value_that_holm_needs_can_be_reached():
    rng = np.random.default_rng(0)
    clear = compare(list(rng.random(200) + 1), list(rng.random(200)))
    assert clear.p_value < 1e-20
    assert holm([clear.p_value] + [0.5] * 249)[0] < 0.05


def test_a_rounding_is_no_difference():
    theirs = list(np.random.default_rng(0).random(40))
    for ours in ([x + 1e-16 for x in theirs], [0.1 + (x - 0.1) for x in theirs]):
        row = compare(ours, theirs)
        assert (row.delta, row.p_value, row.verdict) == (0.0, 1.0, "no detectable difference")


def test_flips_are_all_the_ways_to_flip():
    rng = np.random.default_rng(0)
    for n in (1, 4, 7):
        for values in (rng.normal(0.5, 1, n), rng.integers(-2, 3, n) / 2, np.ones(n)):
            sums = [float(np.dot(signs, values)) for signs in itertools.product([1, -1], repeat=n)]
            up, down = (np.mean([s * x >= s * values.sum() - 1e-9 for x in sums]) for s in (1, -1))
            assert tails(values) == pytest.approx((up, down))


def test_the_approximation_is_that_of_all_ways_to_flip():
    rng = np.random.default_rng(1)
    for n in (FEW, 18):
        for _ in range(20):
            values = rng.normal(rng.choice([0.0, 0.4, 0.8]), 1, n)
            sums = _subset_sums(values)
            exact, approximate = (sums <= 0).mean(), _tail(values, 0.0)
            assert approximate == pytest.approx(exact, rel=0.25, abs=0.01)
    for better, worse in [(14, 6), (28, 12), (120, 80), (560, 440)]:
        signs = np.repeat([1.0, -1.0], [better, worse])
        assert _tail(signs, 1.0) == pytest.approx(binom.sf(better - 1, better + worse, 0.5), rel=0.05)


def test_missing_documents_are_refused_in_one_sentence():
    for ours, theirs, said in [(9, 10, "1 are missing in the arm"), (10, 9, "0 are missing in the arm")]:
        with pytest.raises(ValueError, match=said) as error:
            compare([1.0] * ours, [1.0] * theirs)
        assert "\n" not in str(error.value) and "gsm8k" in str(error.value)
    with pytest.raises(ValueError, match="no record"):
        compare([], [1.0])
    with pytest.raises(ValueError, match="none of the arms"):
        summarise([ARM], [], [make_task()], "baseline")
    with pytest.raises(ValueError, match="no finite"):
        compare([math.nan], [1.0])


def test_rows_do_not_depend_on_the_order_of_records():
    arms, records, tasks = make_experiment(n=30)
    records += [
        type(r)(**{**asdict(r), "seed": 1, "metrics": {"exact_match": float(i % 3 > 0)}}) for i, r in enumerate(records)
    ]
    assert summarise(arms, records, tasks, "baseline") == summarise(arms, records[::-1], tasks, "baseline")


def test_minimal_detectable_effect_has_its_power():
    """Exact power of the exact test at the effect: near 80 %, a little less because the test is discrete."""
    for n, discordance, level in [(150, 0.2, 0.05), (300, 0.1, 0.05), (60, 0.5, 0.05), (300, 0.2, 0.05 / 18)]:
        effect = minimal_detectable_effect(n, discordance, level=level)
        better = (discordance + effect) / 2 / discordance
        power = 0.0
        for m in range(n + 1):
            b = np.arange(m + 1)
            tail = np.minimum(1, 2 * binom.cdf(np.minimum(b, m - b), m, 0.5)) < level
            power += binom.pmf(m, n, discordance) * binom.pmf(b, m, better)[tail].sum()
        assert 0.7 < power < 0.85
    assert minimal_detectable_effect(3, 0.5) == 1.0
    effects = [minimal_detectable_effect(n, 0.2) for n in (10, 100, 1000, 10000)]
    assert effects == sorted(effects, reverse=True)


def test_detectable_effects_are_each_comparisons_own():
    other = make_arm("α=2", 2.0)
    records = make_records("baseline", [1.0] * 100) + make_records("α=1", [1.0] * 80 + [0.0] * 20)
    records += make_records("α=2", [1.0] * 95 + [0.0] * 5)
    found = detectable_effects([BASE, ARM, other], records, [make_task()], "baseline")
    assert found == {
        ("gsm8k", "α=1"): minimal_detectable_effect(100, 0.2),
        ("gsm8k", "α=2"): minimal_detectable_effect(100, 0.05),
    }
    arms, tasks = [BASE, ARM, other], [make_task()]
    (note,) = Findings(arms, summarise(arms, records, tasks, "baseline"), records, tasks).footnotes
    most = 100 * minimal_detectable_effect(100, 0.2, level=0.025)
    assert note.endswith(f"(power 80 %, taken alone; under {most:.1f} points where all 2 are corrected for).")
    same = make_records("baseline", [0.5]) + make_records("α=1", [0.5])
    assert detectable_effects([BASE, ARM], same, [make_task()], "baseline") == {}


def test_what_repeats_can_detect_has_its_power():
    """150 documents asked sixteen times: a gain as small as is said to be seen is seen in about 80 %."""
    rng, n, repeats = np.random.default_rng(0), 150, 16

    def draw(gain):
        ease = np.where(rng.random(n) < 0.5, 0.3, 0.6)
        ours, theirs = rng.binomial(repeats, ease + gain) / repeats, rng.binomial(repeats, ease) / repeats
        return ours - theirs

    differences = draw(0.0)
    size = float((differences**2).sum() / np.abs(differences).sum())
    effect = minimal_detectable_effect(n, float((differences**2).mean()), size)
    assert effect < 0.05  # 0.12 for documents asked once
    seen = [compare_differences(draw(effect), np.ones(n), (n,), 1.0).p_value < 0.05 for _ in range(200)]
    assert 0.7 < np.mean(seen) < 0.9


def test_summary_files(tmp_path):
    arms, records, tasks = make_experiment(n=20)
    rows = summarise(arms, records, tasks, "baseline")
    assert baseline_of(rows) == "baseline"
    write_summary(tmp_path / "summary.json", rows)
    assert [Row(**row) for row in json.loads((tmp_path / "summary.json").read_text())] == rows
    with (tmp_path / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and list(table[0]) == [field.name for field in fields(Row)]
    assert table[0]["arm"] == rows[0].arm and float(table[0]["value"]) == rows[0].value
