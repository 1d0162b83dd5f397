"""Why a vector does not help, or may not: what its weights, the loss along α and its donors' own scores say.

Every limit stands between what a vector that works was measured to have and what vectors that must fail have
(docs/anatomy.md). Knows findings; measures nothing, and says nothing of a vector that helps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

from rvdist.core.point import Vector
from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import compare
from rvdist.report.statistics.sample import sample, scores, sort_records
from rvdist.report.wording import printable
from rvdist.weights.anatomy.findings import Anatomy, Measures, Part
from rvdist.weights.compat import REFUSED_DISTANCE

NOISE = 0.5  # of the stable rank that noise of the same shape has: vectors that work 0.21 at most, shuffled ones 0.96
FAR = 0.045  # of ‖θ‖, from the target and from plus: 0.034 is not as good as 0.017, 0.051 is broken
DONE = 0.5  # of v, where the target went already: −0.01 with a vector that works, 1 with one applied twice
OUTSIDE = 0.2  # of the norm of embeddings and head: 0.1 does no harm, 0.2 a little, 0.4 breaks
LOSS = 0.3  # bits a byte: 0.1 with a vector that works, 0.55 and more with one that is too long
_OUTSIDE = ("embedding", "lm_head")


class Line(Protocol):
    """What a text costs along a straight line between models."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> Sequence[float]: ...
    @property
    def barrier(self) -> float: ...


@dataclass(frozen=True)
class Reason:
    """Why a vector may not help, and what to do: what was `measured` and the `limit` that it is beyond, where numbers
    say it."""

    name: str
    measured: float | None
    limit: float | None
    sentence: str
    advice: str


@dataclass(frozen=True)
class Outcome:
    """What a run found out of one vector: whether it helps (None: nobody asked), at the α's that were asked; whether
    plus does better than minus by itself, and on what (None: not asked)."""

    helps: bool | None = None
    alphas: tuple[float, ...] = ()
    donors: bool | None = None
    tasks: tuple[str, ...] = ()


def outcome(vector: Vector, findings: Findings) -> Outcome:
    """Of the arms that are the baseline plus α times this vector alone, and of its donors where they are arms."""
    tasks = tuple(dict.fromkeys(row.task for row in findings.benchmarks))
    plain = [arm for arm in findings.arms if arm.name == findings.baseline and not arm.point.active_terms]
    asked = [(arm.point.base, arm.prompt) for arm in plain]
    along = {
        arm.name: arm.point.active_terms[0].alpha
        for arm in findings.arms
        if [term.vector for term in arm.point.active_terms] == [vector] and (arm.point.base, arm.prompt) in asked
    }
    rows = [row for row in findings.benchmarks if row.arm in along and row.verdict is not None]
    donors = None
    alone = {arm.point.base: arm.name for arm in findings.arms if not arm.point.active_terms}
    if vector.minus in alone and vector.plus in alone:
        donors = _is_better(alone[vector.plus], alone[vector.minus], findings)
    return Outcome(
        any(row.verdict == "better" for row in rows) if rows else None,
        tuple(sorted(set(along.values()))),
        donors,
        tasks,
    )


def _is_better(plus: str, minus: str, findings: Findings) -> bool:
    """Whether one arm does better than another on any benchmark, taken alone."""
    answers = sort_records(findings.records)
    asked = {(row.task, row.metric, row.filter) for row in findings.benchmarks}
    for score in scores(findings.tasks, findings.groups):
        if score.primary and (score.task, score.metric, score.filter) in asked:
            found = compare(sample(answers, plus, score), sample(answers, minus, score))
            if found.verdict(score.higher_is_better) == "better":
                return True
    return False


@dataclass(frozen=True)
class Transfer:
    """What was looked at of one vector. `helps` and `donors` are those of its `Outcome`. `toward`: the cosine between v
    and θ − minus in each layer. `outside`, `inside`: ‖v‖ / ‖θ‖ of embeddings and head together, and of all else."""

    vector: str
    helps: bool | None
    donors: bool | None
    reach: float | None
    toward: tuple[float, ...]
    outside: float | None
    inside: float | None
    reasons: tuple[Reason, ...]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """Why it does not help, or may not; nothing of one that helps, or of which nothing can be said."""
        if self.helps or (self.helps is None and not self.reasons):
            return []
        name = f"“{printable(self.vector)}”"
        begin = f"{name} may not help" if self.helps is None else f"{name} does not help"
        if not self.reasons:
            unasked = (
                " It may hold another skill: score plus and minus as arms beside the target, and take another donor if "
                "plus does no better than minus."
            )
            return [
                f"{begin}, and nothing in its weights says why: its size, its direction and its structure are like "
                f"those of vectors that work.{unasked * (self.donors is None)}"
            ]
        return [f"{begin}: {reason.sentence} {reason.advice}" for reason in self.reasons]


def transfer(anatomy: Anatomy, vector: str, found: Outcome, lines: Sequence[Line] = ()) -> Transfer:
    """What may keep a vector from helping. `lines` are those of the text along it."""
    m = anatomy.whole.vectors.get(vector)
    cosines = [part.vectors[vector].toward for part in anatomy.layers if vector in part.vectors]
    toward = tuple(cosine for cosine in cosines if cosine is not None)
    reasons: list[Reason] = []
    outside, inside = (_relative(anatomy, vector, within) for within in (True, False))
    if m is not None and not found.helps:
        alpha = min((alpha for alpha in found.alphas if alpha > 0), default=1.0)
        reasons = [*_of_weights(anatomy, vector, m, alpha, outside), *_of_loss(lines), *_of_donors(found)]
    return Transfer(vector, found.helps, found.donors, m.reach if m else None, toward, outside, inside, tuple(reasons))


def _relative(anatomy: Anatomy, vector: str, outside: bool) -> float | None:
    own = [part for part in anatomy.kinds if (part.kind in _OUTSIDE) == outside and vector in part.vectors]
    theta = math.hypot(*(part.norm for part in own))
    return math.hypot(*(part.vectors[vector].norm for part in own)) / theta if theta else None


def _of_weights(anatomy: Anatomy, vector: str, m: Measures, alpha: float, outside: float | None) -> Iterator[Reason]:
    if m.distance is not None and m.distance >= REFUSED_DISTANCE:
        yield Reason(
            "another base",
            m.distance,
            REFUSED_DISTANCE,
            f"minus is {m.distance:.2f} · ‖θ‖ away from {anatomy.target} (siblings are below {REFUSED_DISTANCE:g}, "
            "unrelated models near 1.41): it was trained from another base.",
            "Take donors of the target's own base.",
        )
    elif m.relative is not None and m.relative >= REFUSED_DISTANCE:
        yield Reason(
            "donors of two bases",
            m.relative,
            REFUSED_DISTANCE,
            f"plus and minus are {m.relative:.2f} · ‖θ‖ apart: they do not come from one initialisation.",
            "Take as minus what plus was trained from.",
        )
    else:
        yield from _of_direction(m, alpha)
    likeness = _likeness(anatomy.tensors, vector)
    if likeness is not None and likeness >= NOISE:
        yield Reason(
            "noise",
            likeness,
            NOISE,
            f"its median matrix has {100 * likeness:.0f} % of the stable rank of noise (training leaves less than "
            f"{100 * NOISE:.0f} %): it has no direction that training would have left.",
            "Check that its files are as they were made, or take another donor.",
        )
    if outside is not None and outside >= OUTSIDE:
        yield Reason(
            "embeddings",
            outside,
            OUTSIDE,
            f"it changes embeddings and head by {100 * outside:.3g} % of their norm ({100 * OUTSIDE:g} % is too much): "
            "its donors have tokens of another meaning.",
            'Leave them out: vector.mask.exclude=[".*embed.*",".*lm_head.*"].',
        )


def _of_direction(m: Measures, alpha: float) -> Iterator[Reason]:
    """Of donors that are near the target."""
    if m.distance is None or m.relative is None or m.toward is None or not m.reach:
        return
    along, apart = m.relative, m.relative / m.reach  # ‖v‖ and ‖θ − minus‖, of ‖θ‖
    from_plus = math.sqrt(max(0.0, apart**2 + 2 * (alpha - 1) * m.toward * apart * along + ((alpha - 1) * along) ** 2))
    out = min(alpha * along, from_plus)
    if out >= FAR:
        yield Reason(
            "too far",
            out,
            FAR,
            f"at α = {alpha:g} it leads {100 * alpha * along:.3g} % of ‖θ‖ away from the target and "
            f"{100 * from_plus:.3g} % away from plus ({100 * FAR:g} % from both is too far).",
            f"Take a smaller α: {FAR / along / 2:.2g} and less.",
        )
    done = m.toward / m.reach
    if done >= DONE:
        yield Reason(
            "already there",
            done,
            DONE,
            f"the target has gone {100 * done:.0f} % of its way from minus already.",
            "There is little left to add; take the vector of another skill, or a target without this one.",
        )


def _likeness(tensors: Sequence[Part], vector: str) -> float | None:
    """The median, over v's matrices, of their stable rank against that of a matrix of independent elements, whose
    largest singular value is √rows + √columns times their size."""
    ratios = []
    for part in tensors:
        m = part.vectors.get(vector)
        if m and m.spectrum and m.spectrum.size > 1:
            small, large = m.spectrum.size, m.elements / m.spectrum.size
            ratios.append(m.spectrum.stable_rank * (math.sqrt(small) + math.sqrt(large)) ** 2 / (small * large))
    return median(ratios) if ratios else None


def _of_loss(lines: Sequence[Line]) -> Iterator[Reason]:
    for line in lines:
        if line.barrier >= LOSS:
            between = "minus and plus" if line.name == "donors" else "the target and α = 1"
            yield Reason(
                "a barrier",
                line.barrier,
                LOSS,
                f"between {between} the text costs {line.barrier:.2g} bits a byte more than at both ends "
                f"({LOSS:g} is too much).",
                "The models are not joined by a line; take donors of the target's own base.",
            )
        elif line.name == "target" and line.bits[-1] - line.bits[0] >= LOSS:
            rise = line.bits[-1] - line.bits[0]
            yield Reason(
                "loss",
                rise,
                LOSS,
                f"at α = 1 the text costs {rise:.2g} bits a byte more than without it ({LOSS:g} is too much).",
                "Take a smaller α.",
            )


def _of_donors(found: Outcome) -> Iterator[Reason]:
    if found.donors is False:
        yield Reason(
            "another skill",
            None,
            None,
            f"plus itself does not do better than minus on {', '.join(found.tasks)}.",
            "It does not hold this skill; take another donor.",
        )


def transfer_facts(found: Mapping[str, Transfer]) -> list[str]:
    """How each vector lies beside the way from its minus to the target, and its embeddings and head apart."""
    sentences = []
    for name, one in found.items():
        name = f"“{printable(name)}”"
        if one.reach is not None:
            sentence = f"{name} is {one.reach:.3g} times as long as the way from minus to the target"
            if one.toward:
                against, ends = sum(cosine < 0 for cosine in one.toward), (min(one.toward), max(one.toward))
                cosines = " to ".join(f"{round(end, 3) + 0.0:.3f}".replace("-", "−") for end in ends)
                sentence += f"; in {against} of {len(one.toward)} layers it points against that way (cosines {cosines})"
            sentences.append(f"{sentence}.")
        if one.outside is not None and one.inside is not None:
            sentences.append(
                f"{name} changes embeddings and head by {100 * one.outside:.3g} % of their norm, everything else by "
                f"{100 * one.inside:.3g} %."
            )
    return sentences
