"""What scores mean, in sentences: the same on the terminal, in the page and on the card.

Knows rows and what statistics say of them; knows no markup, so whoever shows the words escapes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rvdist.core.config import alpha_text
from rvdist.report.summary import LEVEL, Row, baseline_of
from rvdist.report.wording import MARK_NOTE, Scale, by_task, p_text, significant, survives

if TYPE_CHECKING:
    from rvdist.report.statistics.compare import FormatGain
    from rvdist.report.statistics.robustness import Edited
    from rvdist.report.statistics.seeds import Spread
    from rvdist.report.statistics.sweep import Limit, Sweep

FEW = 200  # documents of a skewed score, below which its intervals hold too seldom
CUT = 0.05  # a share of answers cut at the limit that is said


def claims(rows: Sequence[Row], sweeps: Sequence[Sweep] = (), most: int = 8) -> list[str]:
    """What changed in the primary scores and whether it survives the correction: a sentence for the whole, one for each
    sweep, then one for each difference found outside of them, the surest first."""
    baseline = baseline_of(rows)
    compared = [row for row in rows if row.primary and row.p_value is not None]
    arms = list(dict.fromkeys(row.arm for row in rows))
    if baseline is None:
        if len(arms) == 1:
            return [f"Nothing was compared: “{arms[0]}” alone has a score, with no baseline or other arm beside it."]
        return ["Nothing was compared: the run has no baseline with a score."]
    if not compared:
        return [f"Nothing was compared: the run has no other arm than “{baseline}” with a score."]
    total = f"{len(compared)} comparisons" if len(compared) > 1 else "one comparison"
    differing = sorted(filter(significant, compared), key=lambda row: (row.p_adjusted or 0.0, row.p_value or 0.0))
    scales = {task: Scale(group) for task, group in by_task(rows)}
    own = {(row.task, row.arm): row for row in rows if row.primary}
    along = [_sweep_sentences(sweep, own, scales[sweep.task], baseline) for sweep in sweeps]
    if not differing:
        return [f"In {total} with “{baseline}”, no difference can be told from chance.", *along]
    firm = sum(map(survives, differing))
    how_many = f"{len(differing)} {'shows a difference' if len(differing) == 1 else 'show a difference'}"
    of_those = {0: "none survives", len(differing): "all survive" if firm > 1 else "it survives"}.get(
        firm, f"{firm} survive"
    )
    if len(compared) == 1:
        sentences = [f"In the one comparison with “{baseline}”, there is a difference."]
    else:
        sentences = [f"Of {total} with “{baseline}”, {how_many}; {of_those} correction for their number (Holm)."]
    sentences += along
    swept = {(sweep.task, arm) for sweep in sweeps for arm in sweep.arms}
    alone = [row for row in differing if (row.task, row.arm) not in swept]
    for row in alone[:most]:
        scale = scales[row.task]
        sentences.append(f"{row.task} {_direction(row, scale)} with “{row.arm}” {_evidence(row, scale)}")
    if len(alone) > most:
        left = len(alone) - most
        sentences.append(f"{left} more {'is' if left == 1 else 'are'} in the table.")
    return sentences


def _direction(row: Row, scale: Scale) -> str:
    return f"{'rose' if (row.delta or 0) > 0 else 'fell'} by {scale.amount(row.delta or 0)}"


def _evidence(row: Row, scale: Scale) -> str:
    low, high = scale.number(row.delta_ci_low, sign=True), scale.number(row.delta_ci_high, sign=True)
    said = f"(95 % interval {low} to {high}; adjusted p {p_text(row.p_adjusted)}): {row.verdict_alone}"
    return f"{said}." if survives(row) else f"{said}, but this does not survive the correction."


def _sweep_sentences(sweep: Sweep, rows: Mapping[tuple[str, str], Row], scale: Scale, baseline: str) -> str:
    """Which α is best, how it compares with the baseline and with its neighbours, and how far the worst one fell."""
    own = {arm: rows[sweep.task, arm] for arm in sweep.arms}
    best, worst = own[sweep.best], own[sweep.worst]
    first, last = (_alpha(own[arm].alpha) for arm in (sweep.arms[0], sweep.arms[-1]))
    prompt = f", {sweep.prompt} prompt" if sweep.prompt else ""
    text = f"{sweep.task} along α ({len(own)} points from {first} to {last}{prompt}): "
    value = f"{scale.number(best.value)} {scale.unit}".strip()
    if len(sweep.level) == len(own) - 1:
        return f"{text}every α scores {value}."
    text += f"α = {_alpha(best.alpha)} is best with {value}"
    if sweep.level:
        verb = "are" if len(sweep.level) > 1 else "is"
        text += f", as {verb} α = {_join_names([_alpha(own[arm].alpha) for arm in sweep.level])}"
    if sweep.best == baseline:
        text += ": no α improved on the target."
    elif significant(best):
        text += f". Against “{baseline}” it {_direction(best, scale)} {_evidence(best, scale)}"
    else:
        text += f". No difference to “{baseline}” can be told from chance."
    text += _confirmed(sweep, scale, baseline)
    said = own[baseline].alpha if baseline in own and sweep.best != baseline else None
    neighbours = [one for one in sweep.neighbours if one.alpha != said]
    worse = [one for one in neighbours if one.p_adjusted < LEVEL]
    equal = [_alpha(one.alpha) for one in neighbours if one.p_adjusted >= LEVEL]
    if worse:
        numbers = [f"by {scale.amount(one.gain)}, adjusted p {p_text(one.p_adjusted)}" for one in worse]
        than = [f"α = {_alpha(one.alpha)} ({number})" for one, number in zip(worse, numbers, strict=True)]
        text += f" It is better than {_join_names(than)}."
    if equal:
        text += f" It cannot be told from α = {_join_names(equal, 'or')}."
    if not sweep.level and sweep.best in (sweep.arms[0], sweep.arms[-1]):
        text += f" No {'smaller' if sweep.best == sweep.arms[0] else 'larger'} α was tried."
    if worst is not best and significant(worst) and worst.verdict_alone == "worse":
        text += f" With α = {_alpha(worst.alpha)}, the worst, it {_direction(worst, scale)} {_evidence(worst, scale)}"
    return text


def _confirmed(sweep: Sweep, scale: Scale, baseline: str) -> str:
    """What the best of many is worth on documents that did not choose it."""
    one = sweep.confirmation
    if one is None or sweep.best == baseline:
        return ""
    if one.chosen == baseline:
        return " That these documents chose it flatters it: half of them would have chosen no α."
    found = one.found
    low, high = (scale.number(end, sign=True) for end in (found.low, found.high))
    said = {"better": "confirmed", "worse": "it is worse"}.get(one.verdict, "not confirmed")
    return (
        f" That these documents chose it flatters it: on {one.n:,} documents that did not, α = {_alpha(one.alpha)}, "
        f"the choice of the others, changes it by {scale.number(found.delta, sign=True)} "
        f"(95 % interval {low} to {high}; adjusted p {p_text(one.p_adjusted)}): {said}."
    )


def headline(rows: Sequence[Row]) -> str:
    """What a person wants to know first: which arm does best over all benchmarks, what it gains, what got worse, and
    what its answers cost. Empty where nothing was compared."""
    baseline = baseline_of(rows)
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    whole = {arm: own for arm, own in by_arm.items() if len(own) == len(by_arm.get(baseline or "", ()))}
    if baseline not in whole or len(whole) < 2:
        return ""
    scales = {task: Scale(group) for task, group in by_task(rows)}
    means = {arm: sum(row.value if row.higher_is_better else -row.value for row in own) for arm, own in whole.items()}
    best = max((arm for arm in whole if arm != baseline), key=lambda arm: means[arm])
    over = f"over {len(whole[best])} benchmarks" if len(whole[best]) > 1 else f"on {whole[best][0].task}"
    if means[best] <= means[baseline]:
        return f"No arm does better than “{baseline}” {over}."
    said = {
        verdict: ", ".join(f"{row.task} {scales[row.task].delta(row)}" for row in whole[best] if row.verdict == verdict)
        for verdict in ("better", "worse")
    }
    among = f", of {len(whole) - 1} arms on these documents" if len(whole) > 2 else ""
    text = f"“{best}” does best {over}{among}. "
    text += f"Better: {said['better']}. " if said["better"] else "Nothing of that can be told from chance. "
    text += f"Worse: {said['worse']}." if said["worse"] else "Nothing got detectably worse."
    tokens = [[row.tokens for row in whole[arm]] for arm in (best, baseline)]
    own, theirs = ([count for count in counts if count is not None] for counts in tokens)
    if own and len(own) == len(theirs):
        mean, before = sum(own) / len(own), sum(theirs) / len(theirs)
        text += f" An answer takes {mean:.1f} tokens; with “{baseline}” {before:.1f}."
    return text


def equivalence_sentences(rows: Sequence[Row], baseline: str, most: int = 8) -> list[str]:
    """Where it is known that nothing that matters changed."""
    equal = [row for row in rows if row.verdict == "equivalent" and row.margin is not None]
    if not equal:
        return []
    named = [f"{row.task} with “{row.arm}”" for row in equal[:most]]
    more = f", and {len(equal) - most} more" if len(equal) > most else ""
    return [f"Equivalent to “{baseline}”, within {100 * (equal[0].margin or 0.0):g} points: {', '.join(named)}{more}."]


def format_sentences(gains: Sequence[FormatGain], scales: Mapping[str, Scale]) -> list[str]:
    """Which differences are, or may be, only that more or fewer answers are in the asked format."""
    sentences = []
    for gain in gains:
        scale, rest = scales[gain.task], gain.rest
        low, high = (scale.number(end, sign=True) for end in (rest.low, rest.high))
        what = "is only format" if gain.only else "may be only format"
        sentences.append(
            f"{gain.task} with “{gain.arm}”: the difference {what}: {100 * gain.before:.1f} % of answers were in the "
            f"asked format, and {100 * gain.after:.1f} % are; without the documents of which that changed, "
            f"{scale.number(rest.delta, sign=True)} is left (95 % interval {low} to {high})."
        )
    return sentences


def cut_sentences(rows: Sequence[Row]) -> list[str]:
    """Where answers were cut at the limit of tokens, so that scores are those of unfinished answers."""
    sentences = []
    for task, group in by_task(rows):
        cut = [f"{100 * (row.cut or 0):.1f} % with “{row.arm}”" for row in group if (row.cut or 0.0) >= CUT]
        if cut:
            more = f", and {len(cut) - 8} more arms" if len(cut) > 8 else ""
            sentences.append(f"{task}: answers were cut at max_gen_toks: {', '.join(cut[:8])}{more}.")
    return sentences


def _alpha(alpha: float | None) -> str:
    return alpha_text(alpha or 0.0).replace("-", "−")


def _join_names(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def limit_sentences(
    limits: Iterable[Limit], scales: Mapping[str, Scale], rows: Sequence[Row], baseline: str
) -> list[str]:
    """What could not be seen whatever the arms did, a sentence for each."""
    values = {row.task: row.value for row in rows if row.arm == baseline and row.primary}
    sentences = []
    for limit in limits:
        scale, change = scales[limit.task], "fall" if limit.fall else "rise"
        at = f"“{baseline}” is at {scale.number(values[limit.task])} {scale.unit}".strip()
        few = "no document" if not limit.room else f"only {limit.room} of {limit.n:,} documents"
        effect = " (subtraction cannot be seen)" if limit.fall else ""
        sentences.append(f"{limit.task}: no {change} can be told from chance{effect}: {at}, and {few} could {change}.")
    return sentences


def footnotes(
    rows: Sequence[Row], detectable: Mapping[tuple[str, str], float], corrected: Mapping[tuple[str, str], float]
) -> list[str]:
    """What the reader of the table must know: the mark, and what was too small to be seen, by a comparison alone and at
    most where all are `corrected` for."""
    compared = sum(row.p_value is not None for row in rows)
    notes = []
    if any(row.primary and significant(row) and not survives(row) for row in rows):
        notes.append(MARK_NOTE)
    for task, group in by_task(rows):
        note, scale = f"{task}: {group[0].n} documents", Scale(group)
        effects = sorted((detectable[task, row.arm], row.arm) for row in group if (task, row.arm) in detectable)
        if effects:
            (least, low), (most, high) = effects[0], effects[-1]
            ends = [scale.amount(least), scale.amount(most)]
            if ends[0] == ends[1]:
                about = f"differences under about {ends[0]}"
            else:
                about = f"differences under about {ends[0]} with “{low}”, up to {ends[1]} with “{high}”,"
            all_ = [corrected[task, row.arm] for row in group if (task, row.arm) in corrected]
            holm = f"; under {scale.amount(max(all_))} where all {compared} are corrected for" if all_ else ""
            note += f"; {about} will often go unseen (power 80 %, taken alone{holm})"
        notes.append(note + ".")
    return notes + skew_notes(rows)


def skew_notes(rows: Sequence[Row]) -> list[str]:
    """Where an interval may hold less than it says: of few documents whose scores are no shares."""
    few = [(task, group[0].n) for task, group in by_task(rows) if not Scale(group).percent and group[0].n < FEW]
    return [
        f"{task}: scores without bounds, of fewer than {FEW} documents ({n}): if they are skewed, as lengths "
        "and losses are, 95 % intervals hold as seldom as in 84 % of cases."
        for task, n in few
    ]


def empty_sentences(counts: Sequence[tuple[str, str, int, int]]) -> list[str]:
    """Where answers are missing: of a task, an arm, how many are empty, of how many. A sentence for each task."""
    return [
        f"{task}: empty answers: {'; '.join(f'{none:,} of {all_:,} with “{arm}”' for _, arm, none, all_ in group)}."
        for task, group in groupby(counts, lambda one: one[0])
    ]


def persistence_claims(rows: Sequence[Edited], scales: Mapping[str, Scale], baseline: str | None) -> list[str]:
    """What editing a task's questions made of the differences to the baseline, a sentence for each task of which
    something can be told; of several edits for their mean."""
    sentences = []
    for task, group in groupby(rows, lambda row: row.task):
        edited = list(group)
        last = [row for row in edited if row.edit == edited[-1].edit]
        by_outcome: dict[str, list[str]] = {}
        for row in last:
            if row.persistence and row.persistence_p is not None and row.gain_original and row.gain:
                before, after = (scales[task].number(x.delta, sign=True) for x in (row.gain_original, row.gain))
                by_outcome.setdefault(row.persistence, []).append(f"“{row.arm}” ({before} as asked, {after} edited)")
        if by_outcome:
            said = "; ".join(f"{outcome} with {', '.join(arms)}" for outcome, arms in by_outcome.items())
            sentences.append(f"{task}, {last[0].edit}: the difference to “{baseline}” {said}.")
    return sentences


def spread_sentences(spreads: Sequence[Spread], scales: Mapping[str, Scale]) -> list[str]:
    """How much other seeds differ, a sentence for each benchmark."""
    sentences = []
    for task, group in groupby(spreads, lambda spread: spread.task):
        arms, scale = list(group), scales[task]
        low, high = (scale.amount(f(spread.sd for spread in arms)) for f in (min, max))
        text = f"{task} under {len(arms[0].seeds)} seeds: the standard deviation between seeds is {low}"
        text += f" to {high}, by arm" if len(arms) > 1 else ""
        if changes := [spread.delta_sd for spread in arms if spread.delta_sd is not None]:
            text += f"; of the changes at most {scale.amount(max(changes))}"
        sentences.append(f"{text}.")
    return sentences
