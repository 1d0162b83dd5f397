"""The race: which candidate has the best mean score, from as few samples as a stated confidence allows.

Candidates (weight points, or anything hashable) are scored on shared documents, a round at a time; those shown not to
be the best get no more. Owns the order of the documents and the evidence; knows no engine, no task and no α.

The score of a document of task t weighs 1/(n_t · T): the mean of all is the mean over T tasks. Documents are drawn
without replacement, with a chance in proportion to their weight. For two candidates a and b let y be the difference of
their scores on the next document, S the weighted sum of those seen and R the weight of those left. If a is better than
b by at most m over all documents, then y has a mean of at most μ = (m − S)/R, and (1 + y)/(1 + μ) is the return of a
bet that cannot grow on average. The wealth of whoever stakes the share ℓ on every document, averaged over ℓ, is
evidence for "a is better than b by more than m"; it ever reaches 1/δ with a chance of at most δ (Ville's inequality).
Sources: betting, arXiv 2010.09686 (Waudby-Smith & Ramdas); without replacement, arXiv 2006.04347 (the same), with
weights, arXiv 2305.06884 (Shekhar et al.); the average over ℓ, Cover's universal portfolio, arXiv 2110.14099 (Orabona &
Jun); averages of evidence over opponents, arXiv 1912.06116 (Vovk & Wang).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

C = TypeVar("C", bound=Hashable)  # a candidate
D = TypeVar("D", bound=Hashable)  # a document, within its task

# The nodes of the arcsine distribution, which Cover's portfolio averages over.
_STAKES = np.sin(np.pi * (np.arange(10) + 0.5) / 20) ** 2
_ROUNDING = 1e-6  # 1 + μ below zero by more than this: the hypothesis cannot be
_CERTAIN = 600.0  # log evidence is capped here, so that sums of it stay finite

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Eliminated(Generic[C]):
    """`evidence` against its being the best reached `bound`, at the end of round `round` (the first is 1);
    `by` is the opponent with the largest part in it."""

    candidate: C
    round: int
    by: C
    evidence: float
    bound: float


@dataclass(frozen=True)
class Standing(Generic[C]):
    """After `round` a candidate that ran in it has seen so many documents, and an estimated mean."""

    candidate: C
    round: int
    seen: int
    mean: float


@dataclass(frozen=True)
class Outcome(Generic[C]):
    """Where a race stands. With a chance of at least `confidence`, whenever it was stopped: the best is `best` or
    one of `tied`; and if `over`, `best` is worse than the best by at most `tolerance`. The best: by the mean over all
    documents of the race, those not scored included. `means` are estimates from the documents seen; `history` is how
    they came about."""

    best: C
    tied: tuple[C, ...]
    eliminated: tuple[Eliminated[C], ...]
    means: dict[C, float]
    over: bool
    rounds: int
    samples: int
    full_grid: int
    confidence: float
    tolerance: float
    history: tuple[Standing[C], ...] = ()


def split(tasks: Mapping[str, Sequence[D]], holdout: float, seed: int) -> tuple[dict[str, list[D]], dict[str, list[D]]]:
    """The documents of each task, parted by chance: for the search, and the share `holdout` for the confirmation of
    what it chose. At least one each. Raises ValueError where a task has too few."""
    random = np.random.default_rng([seed, 0])
    search: dict[str, list[D]] = {}
    confirmation: dict[str, list[D]] = {}
    for task, documents in tasks.items():
        if len(documents) < 2:
            raise ValueError(f"task {task} has {len(documents)} documents; a search and its confirmation need two")
        kept = min(max(1, round(holdout * len(documents))), len(documents) - 1)
        held = set(random.permutation(len(documents))[:kept].tolist())
        search[task] = [document for place, document in enumerate(documents) if place not in held]
        confirmation[task] = [document for place, document in enumerate(documents) if place in held]
    return search, confirmation


class Race(Generic[C, D]):
    """Ask `next` what to score, `tell` it the scores, until `next` returns None or for as long as you like."""

    def __init__(
        self,
        candidates: Sequence[C],
        tasks: Mapping[str, Sequence[D]],
        *,
        round_size: int,
        confidence: float = 0.95,
        tolerance: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not candidates or len(set(candidates)) != len(candidates):
            raise ValueError("a race needs candidates, each of them once")
        if not tasks or not all(tasks.values()):
            raise ValueError("a race needs tasks with documents")
        if round_size < 1 or not 0 < confidence < 1 or not 0 <= tolerance < 1:
            raise ValueError("a race needs a round of at least 1, a confidence and a tolerance between 0 and 1")
        self._candidates = tuple(candidates)
        self._round_size, self._confidence, self._tolerance = round_size, confidence, tolerance
        documents = [(task, document) for task, own in tasks.items() for document in own]
        weights = np.concatenate([np.full(len(own), 1 / len(own) / len(tasks)) for own in tasks.values()])
        order = np.argsort(np.random.default_rng([seed, 1]).exponential(size=len(weights)) / weights)
        self._documents = [documents[place] for place in order]
        self._weights = weights[order]
        self._left = self._weights[::-1].cumsum()[::-1]  # the weight of each document and those after it
        count = len(candidates)
        self._racing = list(range(count))
        self._seen = np.zeros(count, int)
        self._sums = np.zeros((2, count))  # of the scores seen: weighted and plain
        self._margins = np.array([0.0, -tolerance])
        self._wealth = np.zeros((2, len(_STAKES), count, count))  # log wealth by margin, stake, a, b
        self._eliminated: list[Eliminated[C]] = []
        self._withdrawn: set[C] = set()
        self._history: list[Standing[C]] = []
        self._rounds = 0
        self._over = self._is_over()

    def next(self) -> tuple[list[tuple[str, D]], list[C]] | None:
        """The documents (with their task) and the candidates of the next round; None when the race is over."""
        if self._over:
            return None
        begin = self._at
        return self._documents[begin : begin + self._round_size], [self._candidates[one] for one in self._racing]

    def tell(self, scores: Mapping[C, Sequence[float]]) -> None:
        """The scores of the round that `next` named: for each of its candidates one in [0, 1] a document, in order."""
        asked = self.next()
        if asked is None:
            raise ValueError("the race is over")
        documents, candidates = asked
        if set(scores) != set(candidates) or any(len(row) != len(documents) for row in scores.values()):
            raise ValueError("the scores are not those of the candidates and documents of this round")
        table = np.array([scores[candidate] for candidate in candidates], float)
        if not ((table >= 0) & (table <= 1)).all():
            raise ValueError("a score lies outside [0, 1]")
        self._bet(table)
        self._rounds += 1
        means = self._means()
        self._history += [
            Standing(self._candidates[one], self._rounds, int(self._seen[one]), float(means[one]))
            for one in self._racing
        ]
        self._eliminate()
        self._over = self._is_over()

    def withdraw(self, candidate: C) -> None:
        """One that races has no score, and races no more; another one must be left."""
        self._racing.remove(self._candidates.index(candidate))
        self._withdrawn.add(candidate)
        self._over = self._is_over()

    @property
    def outcome(self) -> Outcome[C]:
        """What is known now: the leader, and who is tied with it."""
        means = dict(zip(self._candidates, self._means(), strict=True))
        leader = self._leader()
        return Outcome(
            best=self._candidates[leader],
            tied=tuple(self._candidates[one] for one in self._racing if one != leader),
            eliminated=tuple(self._eliminated),
            means={one: float(mean) for one, mean in means.items() if one not in self._withdrawn},
            over=self._over,
            rounds=self._rounds,
            samples=int(self._seen.sum()),
            full_grid=len(self._candidates) * len(self._documents),
            confidence=self._confidence,
            tolerance=self._tolerance,
            history=tuple(self._history),
        )

    @property
    def _at(self) -> int:
        return int(self._seen.max())

    def _bet(self, table: Floats) -> None:
        racing, begin, size = self._racing, self._at, table.shape[1]
        weights, left = self._weights[begin : begin + size], self._left[begin : begin + size]
        differences = table[:, None] - table[None]  # [a, b, document]
        weighted = np.cumsum(weights * differences, -1)
        ahead = (self._sums[0, racing][:, None] - self._sums[0, racing][None])[..., None] + weighted
        before = ahead - weights * differences
        pairs = np.ix_(racing, racing)
        for wealth, margin in zip(self._wealth, self._margins, strict=True):
            floor = 1 + (margin - before) / left
            profit = (1 + differences) / np.maximum(floor, _ROUNDING) - 1
            profit[floor < -_ROUNDING] = math.inf
            for stake, own in zip(_STAKES, wealth, strict=True):
                own[pairs] += np.log1p(stake * profit).sum(-1)
        self._sums[0, racing] += table @ weights
        self._sums[1, racing] += table.sum(1)
        self._seen[racing] += size

    def _evidence(self, margin: int) -> Floats:
        """That a is better than b by more than the margin, [a, b]: 1 for candidates that have not met."""
        logs = np.logaddexp.reduce(self._wealth[margin], 0) - math.log(len(_STAKES))
        evidence: Floats = np.exp(np.minimum(logs, _CERTAIN))
        return evidence

    @property
    def _bound(self) -> float:
        """What the evidence of all opponents together must reach: each has a share of the chance to err."""
        return (len(self._candidates) - 1) / (1 - self._confidence)

    def _eliminate(self) -> None:
        evidence = self._evidence(0)
        np.fill_diagonal(evidence, 0)
        against, leader = evidence.sum(0), self._leader()
        for one in [one for one in self._racing if against[one] >= self._bound and one != leader]:
            by = self._candidates[int(evidence[:, one].argmax())]
            self._eliminated.append(
                Eliminated(self._candidates[one], self._rounds, by, float(against[one]), self._bound)
            )
            self._racing.remove(one)

    def _is_over(self) -> bool:
        leader = self._leader()
        others = [one for one in self._racing if one != leader]
        within = self._evidence(1)[leader, others] >= self._bound
        return bool(within.all()) or self._at == len(self._documents)

    def _means(self) -> Floats:
        """What is seen, and for what is left the mean of the documents seen, which were drawn by their weights."""
        left = np.append(self._left, 0.0)[self._seen]
        means: Floats = (self._sums[0] + left * self._sums[1] / np.maximum(self._seen, 1)).round(12)
        return means

    def _leader(self) -> int:
        """Of equals, the one listed first."""
        means = self._means()
        return max(self._racing, key=lambda one: (means[one], -one))
